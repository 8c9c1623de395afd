"""Level distributions that adapt to the statistics of the loss."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from .._validation import require_number
from ..loss import DiffusionLoss
from ..ops.problem import TableRule
from ..ops.reference import moments_of, weight_table
from .fixed import LogNormal, LogUniform
from .sampler import LevelSampler
from .table import Table


class AdaptiveLevels(Table):
    """p = (1 - floor) · tilted base + floor · base, with a tilt that `update` recomputes after a training step.

    Weights and levels multiply: a noise level contributes w·p to the objective. With `corrected`, the sample weight
    base/p turns this into w·base, and only the variance of the gradient changes. In both cases the `count` of the
    statistics follows p, and their `mass` sums the sample weights.

    All state is in buffers, so copies, `state_dict` and a resumed run are exact. An update is some forty small
    operations without synchronisation, and is not needed at every step.
    """

    def __init__(
        self, base: LevelSampler, bins: int, log_snr_range: tuple[float, float], floor: float, corrected: bool
    ) -> None:
        if isinstance(bins, bool) or not isinstance(bins, int) or bins < 2:
            raise ValueError(f"bins is {bins!r}, expected an integer from 2 to 1024: the criterion's")
        super().__init__(torch.ones(bins), log_snr_range, base, corrected)
        self.floor = require_number("floor", floor, above=0.0)
        if self.floor > 1.0:
            raise ValueError(f"floor is {floor!r}, expected at most 1: the share of levels drawn from the base")

    @torch.no_grad()
    def update(self, criterion: DiffusionLoss, log_snr: Tensor | None = None) -> None:
        """Recompute the tilt from the statistics; call it after the criterion, on every rank.

        The criterion's level-free loss averages over these levels from then on.

        Args:
            criterion: the training loss, with the bins of this sampler.
            log_snr: [B] of this rank's last batch, for samplers that use per-sample losses.

        Raises:
            ValueError: the criterion has other bins, is on another device, or has weights that depend on more than
                log-SNR, if the sampler uses them. The sampler is then unchanged.
        """
        statistics = criterion.statistics
        if statistics.bins != self.bins:
            raise ValueError(
                f"the criterion's bins are {tuple(statistics.bins)}, expected {tuple(self.bins)} (number, low, high): "
                "make sampler and criterion with the same bins and log_snr_range"
            )
        if statistics.state.device != self.ratio.device:
            raise ValueError(
                f"the criterion is on {statistics.state.device}, expected {self.ratio.device}: the sampler's. "
                f"Use sampler.to({str(statistics.state.device)!r})."
            )
        factors = self._factors(criterion, log_snr)
        total = (factors * self._numbers(self.masses)).sum()
        ratio = (1.0 - self.floor) * factors / total + self.floor
        # Factors that are all 0, or not all finite, define no distribution: keep the old one.
        self._set(torch.where(total.isfinite() & (total > 0), ratio, self._numbers(self.ratio)))
        ratio = self._numbers(self.ratio)  # of the next batch's levels
        statistics.set_level_shares(self._numbers(self.masses) * ratio, 1.0 / ratio if self.corrected else None)

    @abstractmethod
    def _factors(self, criterion: DiffusionLoss, log_snr: Tensor | None) -> Tensor:
        """The tilt of each bin, positive, up to a constant factor. [K] float64."""

    @property
    def bin_centers(self) -> Tensor:
        """Log-SNR in the middle of each bin. [K] float32."""
        return self.bins.centers(self.ratio.device)


def require_not_adaptive(name: str, sampler: object) -> LevelSampler:
    """Check that a sampler neither adapts nor holds one that does: an adaptive one reads its bins where it draws."""
    if not isinstance(sampler, LevelSampler):
        raise TypeError(f"{name} is a {type(sampler).__name__}, expected an object from vadiff.levels")
    for module in sampler.modules():
        if isinstance(module, AdaptiveLevels):
            kind = type(module).__name__
            raise TypeError(
                f"{name} is adaptive ({kind}) and follows the criterion at the levels that it draws itself, expected a "
                f"fixed sampler: make the changed one the base of {kind}"
            )
    return sampler


class _StatisticLevels(AdaptiveLevels):
    """Levels tilted by w·s, s a smoothed statistic of the base loss, shrunk to the average where samples are few."""

    statistic: ClassVar[str]
    default_base: ClassVar[type[LevelSampler]]
    default_corrected: ClassVar[bool]

    def __init__(
        self,
        base: LevelSampler | None = None,
        bins: int = 128,
        log_snr_range: tuple[float, float] = (-16.0, 16.0),
        floor: float = 0.1,
        corrected: bool | None = None,
        smoothing: float = 0.5,
        prior: float = 32.0,
    ) -> None:
        corrected = self.default_corrected if corrected is None else corrected
        super().__init__(base or self.default_base(), bins, log_snr_range, floor, corrected)
        smoothing = require_number("smoothing", smoothing, at_least=0.0)
        prior = require_number("prior", prior, above=0.0)
        # The rule of the weight table with a negative exponent; the floor replaces `clip`.
        self._rule = TableRule(self.statistic, -1.0, smoothing, float("inf"), prior)

    def _factors(self, criterion: DiffusionLoss, log_snr: Tensor | None) -> Tensor:
        weighting = criterion.weighting
        if not weighting.pointwise:
            raise ValueError(
                f"the criterion's weighting is {weighting}, expected one whose weight depends on log-SNR alone, which "
                f"{type(self).__name__} multiplies by the loss: give it a center, or use another weighting"
            )
        moments = moments_of(criterion.statistics.state, self.bins)
        spread = weight_table(moments, self.bins, self._rule).double().exp()
        return spread * criterion.weight_at(self.bin_centers).double()


class SecondMoment(_StatisticLevels):
    """p ∝ base · w·√E[g²] with exact 1/p correction: Improved DDPM's importance sampling (arXiv 2102.09672, eq. 18).

    Of all distributions, this one estimates the expected loss with the least variance. The objective is still base·w.

    Args:
        base: the distribution of the objective.
        bins, log_snr_range: the criterion's.
        floor: share of levels drawn from the untilted base, > 0; no sample weight is above 1/floor.
        corrected: return base/p as sample weight, the default; if False, the objective becomes w·p.
        smoothing: width of the local fit over neighbouring bins, in log-SNR units.
        prior: number of samples at which ln s of a bin is shrunk to half.

    Raises:
        ValueError: an argument out of bounds.
    """

    statistic: ClassVar[str] = "rms"
    default_base = LogNormal
    default_corrected = True


class LossSpread(_StatisticLevels):
    """p ∝ base · w·std[g], not corrected: more draws where losses vary more.

    Derived in the variance-aware paper (arXiv 2603.10391, eq. 11: p ∝ sigma(log_snr)); its code does not use it.

    Args:
        base: the distribution to tilt; by default uniform in log-SNR between sigma 0.002 and 80.
        corrected: as in `SecondMoment`, false by default.
        bins, log_snr_range, floor, smoothing, prior: as in `SecondMoment`.

    Raises:
        ValueError: an argument out of bounds.
    """

    statistic: ClassVar[str] = "std"
    default_base = LogUniform
    default_corrected = False
