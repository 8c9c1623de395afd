"""The lowest loss any network can have: its estimation, a model's gap to it, and the schedule made of both."""

from .conditional import estimate_given_class
from .curve import ConvertedLoss, OptimalLoss
from .estimators import Estimate, estimate, estimate_until
from .gap import GapLevels, GapWeighting, ModelGap, model_gap
from .posterior import ESTIMATORS
from .scaling import ScalingLaw, fit_scaling_law

__all__ = [
    "ESTIMATORS",
    "ConvertedLoss",
    "Estimate",
    "GapLevels",
    "GapWeighting",
    "ModelGap",
    "OptimalLoss",
    "ScalingLaw",
    "estimate",
    "estimate_given_class",
    "estimate_until",
    "fit_scaling_law",
    "model_gap",
]
