"""Adaptive weightings: a table of ln w over log-SNR bins, rebuilt from the statistics after every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from .._validation import is_number, require_number
from ..ops.problem import Bins, TableRule
from ..ops.reference import log_weight_at
from .base import Weighting


@dataclass(frozen=True)
class AdaptiveWeighting(Weighting):
    """Weight by the inverse of a statistic s of the base loss in each bin, w = c * s**-strength.

    The weights are smoothed over neighbouring bins, shrunk towards 1 where samples are few, and scaled to preserve the
    expected loss: sum(m w mu) = sum(m mu) with mass m and mean mu of each bin. No warm-up is needed: the shrinkage
    fades as bins fill.

    Args:
        strength: exponent; 0 is the trainer's own objective, 1 makes w * s equal in all bins.
        smoothing: width h of the local fit over neighbouring bins, in log-SNR units; 0 for none.
        clip: largest factor between a bin's weight and the average one, before rescaling; `inf` for none.
        prior: number of samples at which ln w of a bin is shrunk to half.

    Raises:
        ValueError: an argument out of bounds.
    """

    strength: float = 1.0
    smoothing: float = 0.5
    clip: float = 10.0
    prior: float = 32.0
    rule: TableRule = field(init=False, repr=False, compare=False)  # the arguments, for the kernels

    statistic: ClassVar[str]

    def __post_init__(self) -> None:
        if type(self) is AdaptiveWeighting:
            raise TypeError("AdaptiveWeighting has no statistic of its own: use VarianceAware or LossLevel")
        strength = require_number("strength", self.strength)
        smoothing = require_number("smoothing", self.smoothing, at_least=0.0)
        if not is_number(self.clip) or not self.clip >= 1.0:
            raise ValueError(f"clip is {self.clip!r}, expected a number of at least 1")
        prior = require_number("prior", self.prior, above=0.0)
        object.__setattr__(self, "rule", TableRule(self.statistic, strength, smoothing, float(self.clip), prior))

    def weight_at(self, log_snr: Tensor, log_weights: Tensor, bins: Bins) -> Tensor:
        return log_weight_at(log_weights, log_snr, bins).exp()


class VarianceAware(AdaptiveWeighting):
    """Weight by 1 / standard deviation of the base loss: weighted losses have the same spread at every noise level.

    This holds for every prediction type, since the base loss is the trainer's whole objective at that level. The idea
    is that of "Variance-Aware Adaptive Weighting for Diffusion Model Training" (arXiv 2603.10391); the formulas in its
    code contain no estimate of the variance.
    """

    statistic: ClassVar[str] = "std"


class LossLevel(AdaptiveWeighting):
    """Weight by 1 / mean of the base loss: every noise level has the same weighted mean loss.

    The closed form of what EDM2's learned uncertainty converges to (arXiv 2312.02696, equations 25 and 26).
    """

    statistic: ClassVar[str] = "mean"
