"""Noise levels that follow the statistics of the loss."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..loss import DiffusionLoss
from ..ops.problem import TableRule
from ..ops.reference import moments_of, weight_table
from .fixed import LogNormal, LogUniform
from .sampler import LevelSampler, require_number
from .table import Table


class AdaptiveLevels(Table):
    """p = (1 - floor) · tilted base + floor · base, the tilt rebuilt by `update` after a training step.

    Weights and levels multiply: what a noise level gets is w·p. Where `corrected`, the sample weight base/p takes the
    second factor out again and the objective is that of w alone; only the noise of its gradient changes. Either way
    statistics see the levels' share of samples in `count`, and the sample weights in `mass`.

    All state is in buffers: copies, `state_dict` and a resumed run are exact. An update waits for nothing; some forty
    small operations, it need not come at every step.
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
        """Follow the loss: call it after the criterion, on every rank.

        Args:
            criterion: the loss trained on; its bins are this sampler's.
            log_snr: [B], those of this rank's last batch, for samplers that look at single losses.

        Raises:
            ValueError: the criterion has other bins, or is on another device, or has weights by more than log-SNR
                where the sampler follows them. The sampler stays as it was.
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
        # Weights that are 0 everywhere, or infinite somewhere, say nothing of where to draw.
        self._set(torch.where(total.isfinite() & (total > 0), ratio, self._numbers(self.ratio)))

    @abstractmethod
    def _factors(self, criterion: DiffusionLoss, log_snr: Tensor | None) -> Tensor:
        """The tilt of each bin, positive, to any scale. [K] float64."""

    @property
    def bin_centers(self) -> Tensor:
        """Log-SNR in the middle of each bin. [K] float32."""
        # Made on the device: a copy to it would wait.
        ks = torch.arange(self.bins.size, dtype=torch.float64, device=self.ratio.device)
        return (self.bins.low + (ks + 0.5) * self.bins.width).float()


class _StatisticLevels(AdaptiveLevels):
    """Tilted by w·s with s a statistic of the base loss: smoothed, and shrunk to the average where few samples were."""

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
        # The weight table's own rule with the exponent turned round; the floor does what `clip` does there.
        self._rule = TableRule(self.statistic, -1.0, smoothing, float("inf"), prior)

    def _factors(self, criterion: DiffusionLoss, log_snr: Tensor | None) -> Tensor:
        weighting = criterion.weighting
        if not weighting.pointwise:
            raise ValueError(
                f"the criterion's weighting is {weighting}, expected one whose weight depends on log-SNR alone, which "
                f"{type(self).__name__} multiplies with the loss: give it a center, or use another"
            )
        moments = moments_of(criterion.statistics.state, self.bins)
        spread = weight_table(moments, self.bins, self._rule).double().exp()
        return spread * criterion.weight_at(self.bin_centers).double()


class SecondMoment(_StatisticLevels):
    """p ∝ base · w·√E[g²] with exact 1/p correction: Improved DDPM's importance sampling (arXiv 2102.09672, eq. 18).

    The levels that estimate the expected loss with the least variance. The objective stays that of base and w.

    Args:
        base: the distribution of the objective.
        bins, log_snr_range: the criterion's.
        floor: share of levels drawn from the base as it is, > 0; no sample weight is above 1/floor.
        corrected: give base/p as sample weight, the default; without, the objective changes to w·p.
        smoothing: width of the local fit over neighbouring bins, in log-SNR units.
        prior: samples at which a bin's own evidence counts half.

    Raises:
        ValueError: an argument out of bounds.
    """

    statistic: ClassVar[str] = "rms"
    default_base = LogNormal
    default_corrected = True


class LossSpread(_StatisticLevels):
    """p ∝ base · w·std[g], not corrected: more draws where losses scatter more.

    The sampling the variance-aware paper derives (arXiv 2603.10391, eq. 11: p ∝ sigma(log_snr)); its code never ran it.

    Args:
        base: what is tilted; by default uniform in log-SNR between sigma 0.002 and 80.
        corrected: as in `SecondMoment`, false by default.
        bins, log_snr_range, floor, smoothing, prior: as in `SecondMoment`.

    Raises:
        ValueError: an argument out of bounds.
    """

    statistic: ClassVar[str] = "std"
    default_base = LogUniform
    default_corrected = False
