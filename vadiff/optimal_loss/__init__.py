"""The lowest loss any network can have: its estimation, and a model's gap to it."""

from typing import Any

from .conditional import estimate_given_class
from .curve import ConvertedLoss, OptimalLoss
from .direct import direct_gap
from .estimators import Estimate, estimate, estimate_until
from .gap import ModelGap, model_gap
from .posterior import ESTIMATORS
from .scaling import ScalingLaw, fit_scaling_law

__all__ = [
    "ESTIMATORS",
    "ConvertedLoss",
    "Estimate",
    "ModelGap",
    "OptimalLoss",
    "ScalingLaw",
    "direct_gap",
    "estimate",
    "estimate_given_class",
    "estimate_until",
    "fit_scaling_law",
    "model_gap",
]


def __getattr__(name: str) -> Any:
    """Old names of version 0.1: `levels.GapLevels` and `weighting.GapWeighting`.

    This is the only import of a module that itself depends on this package.
    """
    from .. import levels, weighting

    moved = {"GapLevels": levels, "GapWeighting": weighting}
    if name not in moved:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(moved[name], name)
