"""Estimators of the optimal loss: posterior variance of the data given a noisy sample, by exact softmax over the data.

Draw a source x_s of the data and noise eps; the posterior over the data given x_s + sigma·eps has the logits

    a_n = -|x_n - x_s|²/(2 sigma²) + eps·(x_n - x_s)/sigma        (a_s = 0)

and J* is the mean over draws of its variance, sum_n p_n |x_n|² - |sum_n p_n x_n|². The products x_s·x_n and eps·x_n are
two GEMMs that serve all noise levels, sum_n p_n x_n is one more per level. Over chunks of the data the softmax is kept
online: running maximum, sum, and sums weighted by it.

"full" takes all the data; "snis" a random subset; "dol" the source and a random subset; "cdol" the same with the source
divided by C, that is ln C off its logit. Source: arXiv 2506.13763, section 3 (equations 7, 9 to 11).

With all the data the variance is |x_n|² less the square of the mean. Over a random subset that is too low, as the mean
follows the subset; there the same quantity is taken as half the squared distance of two draws of the posterior, of
which the source is one: sum_n p_n |x_n - x_s|²/2, linear in p and without the third GEMM. In this form C = 2N/L is
nearest to the full estimate, within 3 % of the total variance on digits and CIFAR-10 at every level. (N/L gives the
source its weight among all the data, but 1/sum of a random sum is larger than that of its mean, and J* comes out low;
the paper's 4N/L, which leans against its own form's loss of variance too, comes out high at middle sigma.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._validation import is_number
from .curve import OptimalLoss

ESTIMATORS = ("full", "snis", "dol", "cdol")

_DRAWS_AT_ONCE = 256
_DRAWS_PER_SUBSET = 64  # a subset is shared by this many draws, so that they are a GEMM

_LEAST_DRAWS = 512  # before a standard error is believed
_LOWEST = -1e30  # a logit below any; -inf would make -inf - -inf
_FAR = -60.0  # below the largest logit; not much further a weight is denormal, and a CPU's products are 6 times slower

Devices = torch.device | str | Sequence[torch.device | str] | None
Progress = Callable[["Estimate"], None]
"""Called after every batch of draws with the estimate so far."""


class Estimate(NamedTuple):
    """An estimate as it grows."""

    optimal: OptimalLoss
    levels_done: int
    flops: float  # of the matrix products so far


class _Sums(NamedTuple):
    """Online softmax of some draws over part of the data, at each of T levels. Weights are e**(logit - top)."""

    top: Tensor  # [T, m] largest logit
    total: Tensor  # [T, m] float64, sum of weights
    spread: Tensor  # [T, m] float64, weighted sum of |x_n|²; over a subset of |x_n - x_s|²/2
    mean: Tensor  # [T, m, D] weighted sum of x_n; over a subset [T, m, 0]


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

    The same draws of source and noise serve all levels. They come from the CPU, whatever the device.

    Args:
        data: [N, ...] floating, at least two samples. float64 data is computed in float64, anything else in float32
            with float64 for what is summed over chunks and draws.
        sigmas: [T] noise levels > 0 of a variance-exploding process.
        draws: noisy samples per level.
        estimator: "full" (exact but for the draws), "snis" (far too high below middle sigma), "dol" (too low there) or
            "cdol" (close to full at a fraction of the cost).
        subset: L, samples the softmax runs over for all but "full"; N/10 by default.
        correction: C of "cdol": what the source's weight is divided by. 2·N/L by default; the paper has 4·N/L.
        seed: of sources, noise and subsets.
        chunk: data rows per GEMM. Bounds the memory: 3 matrices of 256 x chunk beside the data and T x 256 x D.
        device: where to compute; the data's by default. Several split the data between them.
        progress: called after every 256 draws (64 with a subset).

    Raises:
        TypeError: data is not a floating-point tensor.
        ValueError: an argument out of bounds.

    Example:
        >>> images = torch.randn(1000, 3, 8, 8)
        >>> optimal = vadiff.optimal_loss.estimate(images, [0.5, 1.0, 2.0], draws=256)
        >>> (optimal.loss / images[0].numel()).tolist()  # [T]: as a mean over elements
        [...]
    """
    _require_count("draws", draws, 1)
    levels = _checked_sigmas(sigmas)
    return _run(_Problem(data, estimator, subset, correction, seed, chunk, device), levels, draws, None, progress)


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

    A level is done when the standard error of J* is at most max(relative·J*, absolute·total variance), looked at after
    512 draws and then every 256 (64 with a subset), or when it has had `limit` draws.

    Args:
        limit: draws per level at most.
        relative: of J*, positive.
        absolute: of the total variance, positive.
        data, sigmas, estimator, subset, correction, seed, chunk, device, progress: as in `estimate`.

    Raises:
        TypeError: data is not a floating-point tensor.
        ValueError: an argument out of bounds.
    """
    _require_count("limit", limit, 1)
    for name, value in (("relative", relative), ("absolute", absolute)):
        if not is_number(value) or not 0 < value < math.inf:
            raise ValueError(f"{name} is {value!r}, expected a positive finite number")
    levels = _checked_sigmas(sigmas)
    problem = _Problem(data, estimator, subset, correction, seed, chunk, device)
    return _run(problem, levels, limit, (relative, absolute * problem.total_variance), progress)


@dataclass
class _Shard:
    """Rows of the data that a softmax runs over, on one device."""

    rows: Tensor  # [n] int64 on the CPU: which rows of the data set these are
    values: Tensor  # [n, D]
    norms: Tensor  # [n] |x_n|²


@dataclass
class _Batch:
    """Draws that run over the same data."""

    sources: Tensor  # [m] int64, rows of the data set
    noise: Tensor  # [m, D]
    shards: list[_Shard]
    left_out: Tensor | None  # [m] int64: a row of the data set each draw skips, where the source is counted apart


class _Problem:
    """The data on its devices, and how draws are made."""

    def __init__(
        self,
        data: Tensor,
        estimator: str,
        subset: int | None,
        correction: float | None,
        seed: int,
        chunk: int,
        device: Devices,
    ) -> None:
        flat = _checked_data(data)
        self.samples, self.elements = flat.shape
        size, self.self_logit = _checked_options(estimator, subset, correction, self.samples)
        _require_count("chunk", chunk, 1)
        places = (data.device,) if device is None else (device,) if isinstance(device, (str, torch.device)) else device
        self.devices = [torch.device(place) for place in places]
        if not self.devices:
            raise ValueError("device is empty, expected at least one")
        # J* does not change with a shift, and the products get smaller.
        self.data = flat - flat.mean(0)  # [N, D]
        parts = self.data.split(1024)  # all at once, torch would copy the data to float64
        norms = torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts])
        if not bool(norms.isfinite().all()):
            raise ValueError("data has NaN or infinite values, expected finite numbers")
        self.norms = norms.square().to(flat.dtype)  # [N]
        self.total_variance = float(self.norms.mean(dtype=torch.float64))
        self.estimator = estimator
        self.apart = estimator in ("dol", "cdol")
        self.subset = None if estimator == "full" else size
        self.chunk = chunk
        self.seed = seed
        self.whole = self._split(torch.arange(self.samples)) if self.subset is None else []

    def batches(self, draws: int, at_once: int) -> Iterator[_Batch]:
        """Batches of `at_once` draws, the last one cut off where there have been `draws`."""
        for number, start in enumerate(range(0, draws, at_once)):
            generator = torch.Generator().manual_seed(_stream(self.seed, number))
            sources = torch.randint(self.samples, (at_once,), generator=generator)
            noise = torch.randn(at_once, self.elements, dtype=self.data.dtype, generator=generator)
            sources, noise = sources[: draws - start], noise[: draws - start]
            if self.subset is None:
                yield _Batch(sources, noise, self.whole, None)
                continue
            rows = torch.randperm(self.samples, generator=generator)[: self.subset]
            left_out = None
            if self.apart:  # itself, or the first row of a subset it is not in: L - 1 others remain either way
                left_out = torch.where(torch.isin(sources, rows), sources, rows[0])
            yield _Batch(sources, noise, self._split(rows), left_out)

    def _split(self, rows: Tensor) -> list[_Shard]:
        everything = len(rows) == self.samples
        rows = rows.sort().values
        shards = []
        for device, part in zip(self.devices, rows.tensor_split(len(self.devices)), strict=True):
            taken = slice(int(part[0]), int(part[-1]) + 1) if everything and len(part) else part  # a slice is no copy
            shards.append(_Shard(part, self.data[taken].to(device), self.norms[taken].to(device)))
        return shards

    def posterior_variance(self, sigmas: list[float], batch: _Batch) -> Tensor:
        """Variance of the posterior of each draw at each level, [T, m] float64."""
        clean, norms = self.data[batch.sources], self.norms[batch.sources]
        parts = [self._over(shard, sigmas, batch, clean, norms) for shard in batch.shards]
        if self.apart:  # the source itself, at distance 0
            shape = (len(sigmas), len(clean))
            none = torch.zeros(shape, dtype=torch.float64)
            top = torch.full(shape, self.self_logit, dtype=clean.dtype)
            parts.append(_Sums(top, none + 1.0, none, clean.new_zeros(*shape, 0)))
        sums = _Sums(*(value.to(self.devices[0]) for value in parts[0]))
        for part in parts[1:]:
            sums = _merge(sums, _Sums(*(value.to(self.devices[0]) for value in part)))
        if self.subset is not None:
            return (sums.spread / sums.total).cpu()
        mean = sums.mean / sums.total.to(sums.mean.dtype)[..., None]
        square = torch.linalg.vector_norm(mean, dim=2, dtype=torch.float64).square()
        return (sums.spread / sums.total - square).clamp(min=0.0).cpu()

    def _over(self, shard: _Shard, sigmas: list[float], batch: _Batch, clean: Tensor, norms: Tensor) -> _Sums:
        """Online softmax of all draws over one device's rows."""
        device = shard.values.device
        met = batch.sources if batch.left_out is None else batch.left_out
        draw, row = (met[:, None] == shard.rows).nonzero(as_tuple=True)
        clean, noise = clean.to(device), batch.noise.to(device)
        own = (noise * clean).sum(1, keepdim=True)  # [m, 1] eps·x_s
        half_norms = 0.5 * norms.to(device)[:, None]
        shape = (len(sigmas), len(clean))
        sums = _Sums(
            torch.full(shape, _LOWEST, dtype=clean.dtype, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
            torch.zeros(*shape, self.elements if self.subset is None else 0, dtype=clean.dtype, device=device),
        )
        for start in range(0, len(shard.values), self.chunk):
            values, value_norms = (x[start : start + self.chunk] for x in (shard.values, shard.norms))
            near = (clean @ values.T).sub_(0.5 * value_norms).sub_(half_norms).clamp_(max=0.0)  # -|x_n - x_s|²/2
            along = (noise @ values.T).sub_(own)  # eps·(x_n - x_s)
            here = (row >= start) & (row < start + self.chunk)
            place = (draw[here].to(device), row[here].to(device) - start)
            near[place] = along[place] = 0.0  # its own source exactly: in the GEMM's rounding some 1e-4/sigma²
            for level, sigma in enumerate(sigmas):
                top, total, spread, mean = (value[level] for value in sums)
                weights = torch.add(near, along, alpha=sigma).mul_(1.0 / sigma**2)  # logits [m, chunk]
                if batch.left_out is not None:
                    weights[place] = _LOWEST
                higher = torch.maximum(top, weights.amax(1))
                scale = (top - higher).exp()
                weights.sub_(higher[:, None]).clamp_(min=_FAR).exp_()
                total.mul_(scale).add_(weights.sum(1))
                if self.subset is None:
                    spread.mul_(scale).add_(weights @ value_norms)
                    mean.mul_(scale[:, None]).addmm_(weights, values)
                else:
                    spread.mul_(scale).sub_(weights.mul_(near).sum(1))
                top.copy_(higher)
        return sums


def _merge(one: _Sums, other: _Sums) -> _Sums:
    top = torch.maximum(one.top, other.top)
    a, b = (one.top - top).exp(), (other.top - top).exp()
    return _Sums(
        top,
        one.total * a + other.total * b,
        one.spread * a + other.spread * b,
        one.mean * a[..., None] + other.mean * b[..., None],
    )


def _run(
    problem: _Problem,
    sigmas: list[float],
    draws: int,
    tolerance: tuple[float, float] | None,
    progress: Progress | None,
) -> OptimalLoss:
    """All batches; a level within the tolerance (relative, absolute) gets no more."""
    at_once = _DRAWS_AT_ONCE if problem.subset is None else min(_DRAWS_PER_SUBSET, max(1, draws // 8))
    tallies = [_Tally() for _ in sigmas]
    active = list(range(len(sigmas)))
    flops = 0.0
    optimal = None
    for batch in problem.batches(draws, at_once):
        variances = problem.posterior_variance([sigmas[level] for level in active], batch)
        # Draws that share a subset are not independent: their mean is one observation then.
        for level, values in zip(active, variances, strict=True):
            tallies[level].add(values, grouped=problem.subset is not None)
        rows = problem.subset or problem.samples
        products = 2 + (len(active) if problem.subset is None else 0)
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


def _checked_data(data: Tensor) -> Tensor:
    """[N, D] on the CPU, float64 or float32."""
    if not isinstance(data, Tensor) or not data.is_floating_point():
        got = f"dtype {data.dtype}" if isinstance(data, Tensor) else f"type {type(data).__name__}"
        raise TypeError(f"data has {got}, expected floating-point samples as a network sees them (images in [-1, 1])")
    if data.dim() < 2 or len(data) < 2 or data[0].numel() == 0:
        raise ValueError(f"data has shape {tuple(data.shape)}, expected (N, ...) with at least two samples")
    return data.detach().to("cpu", torch.float64 if data.dtype == torch.float64 else torch.float32).flatten(1)


def _checked_options(estimator: str, subset: int | None, correction: float | None, samples: int) -> tuple[int, float]:
    """L and -ln C."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    if estimator == "full" and subset is not None:
        raise ValueError(f"subset is {subset!r} with estimator 'full', expected None: it takes all the data")
    if estimator != "cdol" and correction is not None:
        raise ValueError(f"correction is {correction!r} with estimator {estimator!r}, expected None: cdol has one")
    size = max(2, samples // 10) if subset is None else subset
    if isinstance(size, bool) or not isinstance(size, int) or not 2 <= size <= samples:
        raise ValueError(f"subset is {subset!r}, expected an integer from 2 to {samples}, the size of the data set")
    c = 2.0 * samples / size if correction is None else correction
    if not is_number(c) or not 0 < c < math.inf:
        raise ValueError(f"correction is {correction!r}, expected a positive finite number")
    return size, -math.log(c) if estimator == "cdol" else 0.0


def _checked_sigmas(sigmas: Tensor | Sequence[float]) -> list[float]:
    values = torch.as_tensor(sigmas, dtype=torch.float64)
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(f"sigmas has shape {tuple(values.shape)}, expected (T,): one or more noise levels")
    if not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError("sigmas has a value that is not positive and finite, expected noise levels > 0")
    return values.tolist()


def _require_count(name: str, value: int, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {lowest}")


def _stream(seed: int, batch: int) -> int:
    """A seed for each batch, so that what is drawn does not depend on the batches before."""
    return int(np.random.SeedSequence((seed, batch)).generate_state(1, np.uint64)[0] >> np.uint64(1))
