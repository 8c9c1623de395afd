"""A criterion's statistics merged into a few intervals of log-SNR, for tables, trackers and the diagnosis."""

from __future__ import annotations

import numbers
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .ops.reference import moments_of, variance
from .statistics import LogSNRStatistics
from .weighting import Weighting

BANDS = 16


class Criterion(Protocol):
    """The attributes of a `vadiff.DiffusionLoss` that are read here."""

    weighting: Weighting
    statistics: LogSNRStatistics
    loss: str
    _last_log_snr: Tensor | None  # [B] of the last call

    @property
    def bin_centers(self) -> Tensor: ...

    @property
    def weights(self) -> Tensor: ...


class Bands(NamedTuple):
    """Statistics of the base loss g over neighbouring bins; [N] float64 each, NaN where a band is empty."""

    edges: Tensor  # [N + 1] log-SNR
    samples: Tensor  # effective number of samples, after forgetting
    mean: Tensor
    std: Tensor
    weight: Tensor  # mean over the samples of the weight at their bin's centre

    @property
    def share(self) -> Tensor:
        """Share of the samples in each band; NaN before the first sample."""
        return self.samples / self.samples.sum()


def bands_of(criterion: Criterion, bands: int = BANDS) -> Bands:
    """The statistics of a criterion, merged into `bands` intervals of log-SNR, on the CPU.

    Moments are merged by Chan's formula: a band's std is that of its samples, not a mean over its bins.

    Args:
        criterion: trained or not.
        bands: number of intervals, at least 1; capped at the number of bins. If it does not divide that number, some
            intervals hold one bin more.

    Raises:
        ValueError: bands is not a positive integer.
    """
    bins = criterion.statistics.bins
    if not isinstance(bands, numbers.Integral) or isinstance(bands, bool) or bands < 1:
        raise ValueError(f"bands is {bands!r}, expected a positive integer")
    number = min(int(bands), bins.size)
    n, mean, m2, _ = moments_of(criterion.statistics.state.cpu(), bins)  # [K] float64 each
    weight = criterion.weights.cpu().double()  # [K]
    band = band_of_bins(bins.size, number)

    def total(values: Tensor) -> Tensor:  # [K] → [N]
        return torch.zeros(number, dtype=torch.float64).index_add_(0, band, values)

    count = total(n)
    average = total(n * mean) / count  # NaN where a band is empty
    away = (mean - average[band]).where(n > 0, 0.0)
    first = torch.searchsorted(band, torch.arange(number + 1))  # first bin of each band
    return Bands(
        edges=bins.low + first.double() * bins.width,
        samples=count,
        mean=average,
        std=variance(count, total(m2 + n * away.square())).sqrt(),
        weight=total((n * weight).where(n > 0, 0.0)) / count,
    )


def band_of_bins(bins: int, bands: int) -> Tensor:
    """The band of each bin: [bins] int64, from 0 to bands - 1."""
    return torch.arange(bins) * bands // bins
