"""The weights of "Variance-Aware Adaptive Weighting for Diffusion Model Training" (arXiv 2603.10391), as published.

The paper's code, its equation 13 and its README have three different formulas. None of them estimates a variance;
`VarianceAware` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from .._ranks import number_of_ranks
from .._validation import check_log_snr, require_number
from .base import Weighting
from .fixed import FixedWeighting


@dataclass(frozen=True)
class _Bump(FixedWeighting):
    """A weight that falls with the distance of log-SNR from a centre.

    Args:
        alpha: 1/alpha is the square of the bump's width, in log-SNR units; 0 gives w = 1.
        center: log-SNR of the centre. None: the mean of the finite log-SNR of the batch, over all ranks;
            `criterion.weights` is then NaN.

    Raises:
        ValueError: an argument out of bounds.
    """

    alpha: float = 0.05
    center: float | None = None

    def __post_init__(self) -> None:
        require_number("alpha", self.alpha, at_least=0.0)
        if self.center is not None:
            require_number("center", self.center, otherwise=", or None for the batch mean")

    @property
    def pointwise(self) -> bool:
        return self.center is not None

    def __call__(self, log_snr: Tensor) -> Tensor:
        return self.for_batch(log_snr, sync=False)

    def for_batch(self, log_snr: Tensor, sync: bool) -> Tensor:
        check_log_snr(log_snr)
        if self.alpha == 0:  # 0 times an infinite distance would be NaN
            return torch.ones_like(log_snr, dtype=torch.float32).where(~log_snr.isnan(), math.nan)
        log_snr = log_snr.double()
        center: float | Tensor | None = self.center
        if center is None:
            finite = log_snr.isfinite()
            center = _mean(torch.where(finite, log_snr, 0.0), finite, sync)
        return self._bump(self.alpha * (log_snr - center).square()).float()

    def _bump(self, distance: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Cauchy(_Bump):
    """1/(1 + alpha·(log_snr - center)**2): what the paper's code runs, with alpha 0.01, 0.05 or 0.1.

    The code's centre is the mean of the batch (center=None), which varies by 0.2 around 2.4, the middle of EDM's
    levels. Its log-SNR includes sigma_data, which cancels against the mean. The weight multiplies EDM's loss; the
    alternative is to sample levels with a density of this shape (`levels.Table`). See also `levels.Cauchy`.
    """

    center: float | None = 2.4

    def _bump(self, distance: Tensor) -> Tensor:
        return 1.0 / (1.0 + distance)


class Gaussian(_Bump):
    """exp(-alpha·(log_snr - center)**2): the paper's equation 13, where the centre is the mean of the batch."""

    def _bump(self, distance: Tensor) -> Tensor:
        return (-distance).exp()


@dataclass(frozen=True)
class LossZScore(Weighting):
    """1 + alpha·(g - mean)/std over the losses g of the batch, of all ranks: the README's formula, detached.

    std is that of the population: it divides by the number of losses, not by one less.

    Samples with a large loss get more weight. A sample's loss changes its own weight, and the expected loss is not
    preserved, which breaks this package's first rule (causal) and third rule (loss-preserving). `criterion.weights` is
    NaN. A NaN loss makes the weights of its batch NaN.

    Args:
        alpha: 0 gives w = 1.

    Raises:
        ValueError: alpha is not finite.
    """

    alpha: float = 0.1

    needs_losses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_number("alpha", self.alpha)

    @property
    def pointwise(self) -> bool:
        return False

    def weights_of_losses(self, loss: Tensor, sample_weight: Tensor | None, sync: bool) -> Tensor:
        """Weights [B] float32 of the batch's losses g [B]; all 1 if the losses are equal up to float64 rounding.

        Masked samples (sample weight 0) are excluded from mean and std, whatever their loss is.
        """
        counted = torch.ones_like(loss, dtype=torch.bool) if sample_weight is None else sample_weight != 0
        loss = torch.where(counted, loss.detach().double(), 0.0)
        mean = _mean(loss, counted, sync)
        deviation = torch.where(counted, loss - mean, 0.0)
        std = _mean(deviation.square(), counted, sync).sqrt()
        equal = std <= 1e-12 * mean.abs()
        return (1.0 + self.alpha * torch.where(equal, 0.0 * deviation, deviation / std)).float()


def _mean(values: Tensor, counted: Tensor, sync: bool) -> Tensor:
    """Mean of the counted values, over all ranks if `sync`; 0 if none counts. Others must be 0. float64 scalar."""
    total = torch.stack([values.sum(), counted.sum().double()])
    if sync and number_of_ranks() > 1:
        torch.distributed.all_reduce(total, ReduceOp.SUM)
    return total[0] / total[1].clamp(min=1.0)
