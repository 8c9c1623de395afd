"""The lowest loss any network can have: its estimation, a model's gap to it, and the schedule made of both."""

from .curve import ConvertedLoss, OptimalLoss
from .estimators import ESTIMATORS, Estimate, estimate, estimate_until

__all__ = [
    "ESTIMATORS",
    "ConvertedLoss",
    "Estimate",
    "OptimalLoss",
    "estimate",
    "estimate_until",
]
