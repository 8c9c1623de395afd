"""Adaptive weightings: a table of ln w over log-SNR bins, rebuilt from the statistics after every step."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..ops.problem import Bins, TableRule
from ..ops.reference import log_weight_at
from .base import Weighting


@dataclass(frozen=True)
class AdaptiveWeighting(Weighting):
    """Weight by the inverse of a statistic s of the base loss in each bin, w = c * s**-strength.

    Smoothed over neighbouring bins, shrunk towards 1 where few samples were seen, and scaled so that the expected loss
    stays what it was: sum(m w mu) = sum(m mu). Nothing is learned and nothing needs a warm-up: bins gain confidence
    as they fill.

    Args:
        strength: exponent; 0 is the trainer's own objective, 1 balances fully.
        smoothing: width h of the local fit over neighbouring bins, in log-SNR units; 0 smooths nothing.
        clip: largest factor between a bin's weight and the average one, before rescaling; `inf` for none.
        prior: samples at which a bin's own evidence counts half.

    Raises:
        ValueError: an argument out of bounds.
    """

    strength: float = 1.0
    smoothing: float = 0.5
    clip: float = 10.0
    prior: float = 32.0
    rule: TableRule = field(init=False, repr=False, compare=False)  # what the kernels need to know

    statistic: ClassVar[str]

    def __post_init__(self) -> None:
        if type(self) is AdaptiveWeighting:
            raise TypeError("AdaptiveWeighting has no statistic of its own: use VarianceAware or LossLevel")
        for name, lowest, strict, finite in (
            ("strength", -math.inf, True, True),
            ("smoothing", 0.0, False, True),
            ("clip", 1.0, False, False),
            ("prior", 0.0, True, True),
        ):
            value = getattr(self, name)
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            above = number and (value > lowest if strict else value >= lowest)
            if not above or (finite and not math.isfinite(value)):
                bound = "" if lowest == -math.inf else f" {'above' if strict else 'of at least'} {lowest:g}"
                raise ValueError(f"{name} is {value!r}, expected a{' finite' if finite else ''} number{bound}")
        numbers_given = (float(value) for value in (self.strength, self.smoothing, self.clip, self.prior))
        object.__setattr__(self, "rule", TableRule(self.statistic, *numbers_given))

    def weight_at(self, log_snr: Tensor, log_weights: Tensor, bins: Bins) -> Tensor:
        return log_weight_at(log_weights, log_snr, bins).exp()


class VarianceAware(AdaptiveWeighting):
    """Weight by 1 / standard deviation of the base loss: every noise level ends up with equally noisy losses.

    Whatever the parameterisation, since the base loss is the trainer's whole objective at that level. After the idea of
    "Variance-Aware Adaptive Weighting for Diffusion Model Training" (arXiv 2603.10391), with an estimator of the
    variance; the formulas its authors ran contain none.
    """

    statistic: ClassVar[str] = "std"


class LossLevel(AdaptiveWeighting):
    """Weight by 1 / mean of the base loss: every noise level ends up with the same mean loss.

    The closed form of what EDM2's learned uncertainty converges to (arXiv 2312.02696, equations 25 and 26).
    """

    statistic: ClassVar[str] = "mean"
