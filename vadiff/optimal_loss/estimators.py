"""Monte Carlo estimates of the optimal loss and their standard errors; `posterior` computes single draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._validation import require_count, require_number
from .curve import OptimalLoss, checked_sigmas
from .posterior import Devices, Problem

_DRAWS_AT_ONCE = 512  # smaller matrix products run slower
_DRAWS_PER_SUBSET = 64  # draws that share a subset, so that their products are a GEMM

_LEAST_DRAWS = 512  # minimum before a standard error is used

Progress = Callable[["Estimate"], None]
"""Called after every batch of draws with the estimate so far."""


class Estimate(NamedTuple):
    """An intermediate result of an estimate."""

    optimal: OptimalLoss
    levels_done: int
    flops: float  # of the matrix products so far


def estimate(
    data: Tensor,
    sigmas: Tensor | Sequence[float],
    draws: int = 2048,
    estimator: str = "full",
    subset: int | None = None,
    correction: float | None = None,
    seed: int = 0,
    *,
    chunk: int = 4096,
    device: Devices = None,
    progress: Progress | None = None,
) -> OptimalLoss:
    """Estimate J* of a data set at some noise levels, from exactly `draws` noisy samples at each.

    All levels use the same draws of source and noise, which are generated on the CPU for any device.

    Args:
        data: [N, ...] floating, at least two samples. float64 data is computed in float64, anything else in float32
            with float64 sums over chunks and draws.
        sigmas: [T] noise levels > 0 of a variance-exploding process.
        draws: noisy samples per level.
        estimator: "full" (exact but for the draws), "snis" (far too high below middle sigma), "dol" (too low there),
            "cdol" (close to full at a fraction of the cost) or "cdol_paper" (cDOL as the paper writes it, J* = A - B,
            to reproduce its numbers; noisier, and at low noise often negative: not for weights and levels).
        subset: L, samples the softmax runs over for all but "full"; N/10 by default.
        correction: C, divisor of the source's weight; 2·N/L for "cdol", 4·N/L for "cdol_paper" by default.
        seed: of sources, noise and subsets.
        chunk: data rows per GEMM. Bounds the memory: 3 matrices of 512 x chunk beside the data and T x 512 x D.
        device: one or several devices to compute on; the data's by default. Several devices split the data.
        progress: called after every 512 draws (at most 64 with a subset).

    Raises:
        TypeError: data is not a floating-point tensor.
        ValueError: an argument out of bounds.

    Example:
        >>> images = torch.randn(1000, 3, 8, 8)
        >>> optimal = vadiff.optimal_loss.estimate(images, [0.5, 1.0, 2.0], draws=256)
        >>> (optimal.loss / images[0].numel()).tolist()  # [T]: as a mean over elements
        [...]
    """
    require_count("draws", draws, 1)
    levels = checked_sigmas(sigmas).tolist()
    return _run(Problem(data, estimator, subset, correction, seed, chunk, device), levels, draws, None, progress)


def estimate_until(
    data: Tensor,
    sigmas: Tensor | Sequence[float],
    limit: int = 16384,
    relative: float = 0.05,
    absolute: float = 1e-3,
    estimator: str = "full",
    subset: int | None = None,
    correction: float | None = None,
    seed: int = 0,
    *,
    chunk: int = 4096,
    device: Devices = None,
    progress: Progress | None = None,
) -> OptimalLoss:
    """Estimate J* with as many draws as each level needs.

    A level is done when the standard error of J* is at most max(relative·J*, absolute·total variance), checked after
    512 draws and then every 512 (at most 64 with a subset), or after `limit` draws.

    Args:
        limit: draws per level at most.
        relative: of J*, positive.
        absolute: of the total variance, positive.
        data, sigmas, estimator, subset, correction, seed, chunk, device, progress: as in `estimate`.

    Raises:
        TypeError: data is not a floating-point tensor.
        ValueError: an argument out of bounds.
    """
    require_count("limit", limit, 1)
    for name, value in (("relative", relative), ("absolute", absolute)):
        require_number(name, value, above=0.0)
    levels = checked_sigmas(sigmas).tolist()
    problem = Problem(data, estimator, subset, correction, seed, chunk, device)
    return _run(problem, levels, limit, (relative, absolute * problem.total_variance), progress)


def _run(
    problem: Problem,
    sigmas: list[float],
    draws: int,
    tolerance: tuple[float, float] | None,
    progress: Progress | None,
) -> OptimalLoss:
    """Run all batches; a level within the tolerance (relative, absolute) gets no more draws."""
    at_once = _DRAWS_AT_ONCE if problem.subset is None else min(_DRAWS_PER_SUBSET, max(1, draws // 8))
    tallies = [_Tally() for _ in sigmas]
    active = list(range(len(sigmas)))
    flops = 0.0
    optimal = None
    for batch in problem.batches(draws, at_once):
        variances = problem.posterior_variance([sigmas[level] for level in active], batch)
        # Draws that share a subset are not independent: their mean is one observation.
        for level, values in zip(active, variances, strict=True):
            tallies[level].add(values, grouped=problem.subset is not None)
        rows = problem.subset or problem.samples
        products = 2 + (len(active) if problem.has_means else 0)
        flops += 2.0 * len(batch.sources) * rows * problem.elements * products
        if tolerance is not None:
            active = [level for level in active if not tallies[level].within(*tolerance)]
        optimal = OptimalLoss(
            sigma=torch.tensor(sigmas, dtype=torch.float64),
            loss=torch.tensor([tally.mean for tally in tallies], dtype=torch.float64),
            stderr=torch.tensor([tally.stderr for tally in tallies], dtype=torch.float64),
            draws=torch.tensor([tally.draws for tally in tallies]),
            elements=problem.elements,
            total_variance=problem.total_variance,
            samples=problem.samples,
            estimator=problem.estimator,
        )
        if progress is not None:
            progress(Estimate(optimal, len(sigmas) - len(active), flops))
        if not active:
            break
    assert optimal is not None
    return optimal


class _Tally:
    """Mean over draws, and its standard error over independent observations."""

    def __init__(self) -> None:
        self.draws = 0
        self._sum = 0.0
        self._observations: list[float] = []

    def add(self, values: Tensor, grouped: bool) -> None:
        self.draws += len(values)
        self._sum += float(values.sum())
        self._observations += [float(values.mean())] if grouped else values.tolist()

    @property
    def mean(self) -> float:
        return self._sum / self.draws

    @property
    def stderr(self) -> float:
        """NaN with a single observation."""
        size = len(self._observations)
        return float(np.std(self._observations, ddof=1)) / math.sqrt(size) if size > 1 else math.nan

    def within(self, relative: float, absolute: float) -> bool:
        return self.draws >= _LEAST_DRAWS and self.stderr <= max(relative * self.mean, absolute)
