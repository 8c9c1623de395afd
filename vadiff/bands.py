"""A criterion's statistics merged into a few intervals of log-SNR, for tables, trackers and the diagnosis."""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .ops.reference import moments_of, variance
from .statistics import LogSNRStatistics
from .weighting import Weighting

BANDS = 16

FEWEST = 64.0
LEAST_SHARE = 0.01
RELATIVE_ERROR = 0.2
"""A band of log-SNR counts if it has this many samples, this share of all, and a mean with a standard error below this
share of it."""

COVERED = 0.8
"""Least share of the samples in bands that count: below it no ratio is known."""

_STARVED = 0.1  # of an even share over the bands that have samples


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


class Spread(NamedTuple):
    """How much the base loss differs between the bands that count: highest ÷ lowest.

    A ratio is NaN if fewer than two bands count, if they hold too few of the samples (`COVERED`), or if a value is not
    positive.
    """

    known: Tensor  # [N] bool: the bands that count
    mean_ratio: float
    std_ratio: float
    weighted_ratio: float  # of weight × mean; NaN also if the weight is unknown


def spread_of(bands: Bands) -> Spread:
    """Highest ÷ lowest mean, std and weight × mean over the bands that count."""
    known = known_bands(bands)
    return Spread(
        known, *(ratio(bands, known, values) for values in (bands.mean, bands.std, bands.weight * bands.mean))
    )


def known_bands(bands: Bands) -> Tensor:
    """The bands that count, [N] bool: see `FEWEST`, `LEAST_SHARE`, `RELATIVE_ERROR`.

    Others are left out: the highest and the lowest of many noisy means would be noise, and a band with few of the
    samples has little to give, however high its loss is.
    """
    error = bands.std / bands.samples.sqrt()
    enough = (bands.samples >= FEWEST) & (bands.share >= LEAST_SHARE)
    return enough & (error <= RELATIVE_ERROR * bands.mean.abs())


def ratio(bands: Bands, known: Tensor, values: Tensor) -> float:
    """Highest ÷ lowest of [N] values over the known bands, or NaN, see `Spread`."""
    found = values[known]
    if len(found) < 2 or not bool((found > 0).all()) or share_within(bands, known) < COVERED:
        return math.nan
    return (found.max() / found.min()).item()


def share_within(bands: Bands, known: Tensor, values: Tensor | float = 1.0) -> float:
    """Share of the sum of |values| over the samples that lies in the known bands; NaN without samples."""
    total = (bands.samples * values).abs().nan_to_num()
    return (total[known].sum() / total.sum()).item()


def starved_bands(bands: Bands) -> tuple[tuple[float, float], ...]:
    """(low, high) of each run of bands with samples, but far less than an even share of them."""
    seen = bands.samples > 0
    bound = _STARVED * bands.samples.sum().item() / max(int(seen.sum()), 1)
    edges = bands.edges.tolist()
    found: list[tuple[float, float]] = []
    for i in (seen & (bands.samples < bound)).nonzero().flatten().tolist():
        low = found.pop()[0] if found and found[-1][1] == edges[i] else edges[i]
        found.append((low, edges[i + 1]))
    return tuple(found)
