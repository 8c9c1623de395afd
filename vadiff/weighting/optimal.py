"""Weights computed from a data set's optimal loss (arXiv 2506.13763)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from .._validation import require_number
from .fixed import MAX_WEIGHT, SNRWeighting


@runtime_checkable
class OptimalCurve(Protocol):
    """The attributes of an optimal loss J* that weightings and levels read, as of `vadiff.optimal_loss.OptimalLoss`.

    A protocol, so that `vadiff.optimal_loss` and `vadiff.weighting` do not import each other.
    """

    @property
    def elements(self) -> int:
        """D, the number of elements of one sample."""

    @property
    def total_variance(self) -> float:
        """Trace of the data's covariance."""

    def log_loss_at(self, log_snr: Tensor) -> Tensor:
        """ln(J*/D) at each log-SNR, float64."""

    def sigma_star(self) -> float:
        """The largest sigma at which J* is below 1e-3 of the total variance."""


def require_curve(optimal: object) -> None:
    """Raise TypeError unless `optimal` is an optimal-loss curve."""
    if not isinstance(optimal, OptimalCurve):
        raise TypeError(f"optimal is a {type(optimal).__name__}, expected a vadiff.optimal_loss.OptimalLoss")


@dataclass(frozen=True)
class InverseOptimalLoss(SNRWeighting):
    """min(D/J*, cap) on the x0 loss, J*/D the lowest loss per element that any network can have (arXiv 2506.13763).

    An optimal model then has loss 1 at every noise level; EDM2's learned weighting and `LossLevel` approach this weight
    as the gap closes.

    Args:
        optimal: the data set's J*, from `vadiff.optimal_loss.estimate`.
        cap: upper bound of the weight of the x0 loss, needed because J* goes to 0 with the noise.
        prediction_type, sigma_data, max_weight: see `SNRWeighting`.

    Raises:
        TypeError: `optimal` is not a `vadiff.optimal_loss.OptimalLoss`.
        ValueError: an argument out of bounds.
    """

    optimal: OptimalCurve
    cap: float = 1e3
    prediction_type: str = "edm"
    sigma_data: float = 0.5
    max_weight: float = MAX_WEIGHT

    _positive: ClassVar[tuple[str, ...]] = ("cap",)

    def __post_init__(self) -> None:
        require_curve(self.optimal)
        super().__post_init__()

    def log_x0_weight(self, log_snr: Tensor) -> Tensor:
        return (-self.optimal.log_loss_at(log_snr)).clamp(max=math.log(self.cap))


@dataclass(frozen=True)
class GapWeighting(SNRWeighting):
    """scale·min(D/J*, cap) + bump·N(ln sigma; bump_mean, bump_std²)·[sigma < sigma*] on the x0 loss per element.

    The weight of the optimal-loss schedule (arXiv 2506.13763, section 5). The paper's values of its constants are
    unknown. These defaults make the first term 1 up to sigma* and proportional to 1/J* above; the bump adds up to 0.4.

    Args:
        optimal: the data set's J*.
        cap: the paper's w*; by default D/J* at sigma*, where J* is 1e-3 of the total variance.
        scale: the paper's a; by default 1/cap.
        bump: factor of the Gaussian; 1 in the paper, 0 for none.
        bump_mean: its centre in ln(sigma); by default 1 below ln(sigma*).
        bump_std: its width in ln(sigma).
        prediction_type, sigma_data, max_weight: see `SNRWeighting`.

    Raises:
        TypeError: `optimal` is not a `vadiff.optimal_loss.OptimalLoss`.
        ValueError: an argument out of bounds, or a curve without a sigma*.
    """

    optimal: OptimalCurve
    cap: float | None = None
    scale: float | None = None
    bump: float = 1.0
    bump_mean: float | None = None
    bump_std: float = 1.0
    prediction_type: str = "edm"
    sigma_data: float = 0.5
    max_weight: float = MAX_WEIGHT

    _log_star: float = field(init=False, repr=False, compare=False)

    _positive = ("bump_std",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_curve(self.optimal)
        object.__setattr__(self, "_log_star", math.log(self.optimal.sigma_star()))
        for name, lowest in (("cap", 0.0), ("scale", 0.0), ("bump_mean", -math.inf)):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), above=lowest, otherwise=", or None")
        require_number("bump", self.bump, at_least=0.0)

    def log_x0_weight(self, log_snr: Tensor) -> Tensor:
        cap = 1e3 * self.optimal.elements / self.optimal.total_variance if self.cap is None else self.cap
        scale = 1.0 / cap if self.scale is None else self.scale
        center = self._log_star - 1.0 if self.bump_mean is None else self.bump_mean
        log_sigma = -0.5 * log_snr
        inverse = (-self.optimal.log_loss_at(log_snr)).clamp(max=math.log(cap)).exp()
        bump = (-0.5 * ((log_sigma - center) / self.bump_std).square()).exp() / (self.bump_std * math.sqrt(math.tau))
        return (scale * inverse + self.bump * torch.where(log_sigma < self._log_star, bump, 0.0)).log()
