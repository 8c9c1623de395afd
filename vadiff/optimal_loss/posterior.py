"""Posterior variance of the data given noisy samples, by exact softmax over the data.

Draw a source x_s of the data and noise eps; the posterior over the data given x_s + sigma·eps has the logits

    a_n = -|x_n - x_s|²/(2 sigma²) + eps·(x_n - x_s)/sigma        (a_s = 0)

and J* is the mean over draws of its variance, sum_n p_n |x_n|² - |sum_n p_n x_n|². The products x_s·x_n and eps·x_n are
two GEMMs that serve all noise levels, sum_n p_n x_n is one more per level. Over chunks of the data the softmax is kept
online: running maximum, sum, and sums weighted by it.

"full" uses all the data; "snis" a random subset; "dol" the source and a random subset; "cdol" the same with ln C
subtracted from the logit of the source, which divides its weight by C. Source: arXiv 2506.13763, eqs. 7, 9 to 11.
"cdol_paper" is cDOL to the letter of the paper, J* = A - B: A is the mean of |x_n|² over all the data, B the mean over
draws of |sum_n p_n x_n|², C is 4N/L, and the data are not centred.

With all the data the variance is the posterior mean of |x_n|² minus the square of the posterior mean. Over a random
subset that is biased low, as the mean adapts to the subset; there the variance is estimated as half the squared
distance between two posterior draws, one of which is the source: sum_n p_n |x_n - x_s|²/2, which is linear in p and
needs no third GEMM. The remaining bias is E[1/sum] > 1/E[sum] of a random sum: the source gets too much weight and J*
is too low at C = N/L, where the other L - 1 samples represent all the data; a larger C counteracts this.

Bias against the full estimate of the same draws, in % of the total variance: the worst of 3 to 7 noise levels, on draws
(and for mixture and Gaussian, data) not used to choose C; errors 0.3 to 1.3, in the last column up to 2.4:

                                 digits    digits    mixture   mixture   Gaussian  CIFAR-10   CIFAR-10
    N / L                        1797/180  1797/45   6000/600  6000/150  4000/200  10k/1000   25k/1000
    variance, C = 4N/L (paper)   -3.5      -7.5      -4.7      -9.8      -4.9      -4.4       -5.8
    half distance, C = N/L       -2.5      -5.4      -3.8      -6.0      -3.7      -2.4       -2.6
    half distance, C = 2N/L      +2.9      +4.6      +2.5      -3.2      -2.4      +1.8       -1.1
    half distance, C = 4N/L      +4.4      +6.9      +4.9      +4.4      +3.7      +3.0       +2.0
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._validation import require_count, require_known, require_number

PAPER = "cdol_paper"
ESTIMATORS = ("full", "snis", "dol", "cdol", PAPER)
_DEFAULT_CORRECTION = {"cdol": 2.0, PAPER: 4.0}  # in N/L

_LOWEST = -1e30  # below every logit; with -inf, -inf - -inf would be NaN
_FAR = -60.0  # bound of logit - top: far lower, weights are denormal and a CPU's products 6 times slower

Devices = torch.device | str | Sequence[torch.device | str] | None


class _Sums(NamedTuple):
    """Online softmax of some draws over part of the data, at each of T levels. Weights are e**(logit - top)."""

    top: Tensor  # [T, m] largest logit
    total: Tensor  # [T, m] float64, sum of weights
    spread: Tensor  # [T, m] float64, weighted sum of |x_n|²; over a subset of |x_n - x_s|²/2
    mean: Tensor  # [T, m, D] weighted sum of x_n; [T, m, 0] where it is not needed


@dataclass
class _Shard:
    """Rows of the data that a softmax runs over, on one device."""

    rows: Tensor  # [n] int64 on the CPU: indices into the data set
    values: Tensor  # [n, D]
    norms: Tensor  # [n] |x_n|²


@dataclass
class Batch:
    """Draws whose softmax runs over the same rows of the data."""

    sources: Tensor  # [m] int64, rows of the data set
    noise: Tensor  # [m, D]
    shards: list[_Shard]
    left_out: Tensor | None  # [m] int64: row that each draw excludes, if the source is a term of its own


class Problem:
    """The data on its devices, and the generation of draws."""

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
        require_count("chunk", chunk, 1)
        places = (data.device,) if device is None else (device,) if isinstance(device, (str, torch.device)) else device
        self.devices = [torch.device(place) for place in places]
        if not self.devices:
            raise ValueError("device is empty, expected at least one")
        # Centring does not change J* and makes the products smaller.
        self._centre = _mean(flat)  # [D]
        self.data = flat - self._centre  # [N, D]
        parts = self.data.split(64)  # torch copies each to float64: small enough for the cache
        norms = torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts])
        if not bool(norms.isfinite().all()):
            raise ValueError("data has NaN or infinite values, expected finite numbers")
        self.norms = norms.square().to(flat.dtype)  # [N]
        self.total_variance = float(self.norms.mean(dtype=torch.float64))
        self.estimator = estimator
        self.apart = estimator in ("dol", "cdol", PAPER)
        self.has_means = estimator in ("full", PAPER)  # one more product per level
        self.subset = None if estimator == "full" else size
        self.chunk = chunk
        self.seed = seed
        self.whole = self._split(torch.arange(self.samples)) if self.subset is None else []

    def batches(self, draws: int, at_once: int) -> Iterator[Batch]:
        """Batches of `at_once` draws, the last one truncated so that the total is `draws`."""
        for number, start in enumerate(range(0, draws, at_once)):
            generator = torch.Generator().manual_seed(_stream(self.seed, number))
            sources = torch.randint(self.samples, (at_once,), generator=generator)
            noise = torch.randn(at_once, self.elements, dtype=self.data.dtype, generator=generator)
            sources, noise = sources[: draws - start], noise[: draws - start]
            if self.subset is None:
                yield Batch(sources, noise, self.whole, None)
                continue
            rows = torch.randperm(self.samples, generator=generator)[: self.subset]
            left_out = None
            if self.apart:  # the source, or if not in the subset its first row: L - 1 others remain
                left_out = torch.where(torch.isin(sources, rows), sources, rows[0])
            yield Batch(sources, noise, self._split(rows), left_out)

    def _split(self, rows: Tensor) -> list[_Shard]:
        everything = len(rows) == self.samples
        rows = rows.sort().values
        shards = []
        for device, part in zip(self.devices, rows.tensor_split(len(self.devices)), strict=True):
            taken = slice(int(part[0]), int(part[-1]) + 1) if everything and len(part) else part  # slices copy nothing
            shards.append(_Shard(part, self.data[taken].to(device), self.norms[taken].to(device)))
        return shards

    def posterior_variance(self, sigmas: list[float], batch: Batch) -> Tensor:
        """Variance of the posterior of each draw at each level, [T, m] float64; its mean over draws is J*."""
        clean, norms = self.data[batch.sources], self.norms[batch.sources]
        parts = [self._shard_sums(shard, sigmas, batch, clean, norms) for shard in batch.shards]
        if self.apart:  # the source itself, at distance 0
            shape = (len(sigmas), len(clean))
            none = torch.zeros(shape, dtype=torch.float64)
            top = torch.full(shape, self.self_logit, dtype=clean.dtype)
            mean = clean.expand(*shape, -1) if self.has_means else clean.new_zeros(*shape, 0)
            parts.append(_Sums(top, none + 1.0, none, mean))
        sums = _Sums(*(value.to(self.devices[0]) for value in parts[0]))
        for part in parts[1:]:
            sums = _merge(sums, _Sums(*(value.to(self.devices[0]) for value in part)))
        if not self.has_means:
            return (sums.spread / sums.total).cpu()
        mean = sums.mean / sums.total.to(sums.mean.dtype)[..., None]
        square = torch.linalg.vector_norm(mean, dim=2, dtype=torch.float64).square()
        if self.subset is not None:  # A - B: both have the square of the centre
            return (self.total_variance - square - 2.0 * (mean @ self._centre.to(mean.device))).cpu()
        return (sums.spread / sums.total - square).clamp(min=0.0).cpu()

    def _shard_sums(self, shard: _Shard, sigmas: list[float], batch: Batch, clean: Tensor, norms: Tensor) -> _Sums:
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
            torch.zeros(*shape, self.elements if self.has_means else 0, dtype=clean.dtype, device=device),
        )
        for start in range(0, len(shard.values), self.chunk):
            values, value_norms = (x[start : start + self.chunk] for x in (shard.values, shard.norms))
            near = (clean @ values.T).sub_(0.5 * value_norms).sub_(half_norms).clamp_(max=0.0)  # -|x_n - x_s|²/2
            along = (noise @ values.T).sub_(own)  # eps·(x_n - x_s)
            here = (row >= start) & (row < start + self.chunk)
            place = (draw[here].to(device), row[here].to(device) - start)
            near[place] = along[place] = 0.0  # exact for the source; a GEMM's rounding is some 1e-4/sigma²
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
                if self.has_means:
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


def _mean(data: Tensor) -> Tensor:
    """Mean over the samples, [D], in blocks: torch.mean over all rows takes longer than a thousand draws."""
    total = data.new_zeros(data.shape[1], dtype=torch.float64)
    for part in data.split(512):
        total += part.sum(0)
    return (total / len(data)).to(data.dtype)


def _checked_data(data: Tensor) -> Tensor:
    """Check the data; return it as [N, D] on the CPU, float64 or float32."""
    if not isinstance(data, Tensor) or not data.is_floating_point():
        got = f"dtype {data.dtype}" if isinstance(data, Tensor) else f"type {type(data).__name__}"
        raise TypeError(f"data has {got}, expected floating-point samples as a network sees them (images in [-1, 1])")
    if data.dim() < 2 or len(data) < 2 or data[0].numel() == 0:
        raise ValueError(f"data has shape {tuple(data.shape)}, expected (N, ...) with at least two samples")
    return data.detach().to("cpu", torch.float64 if data.dtype == torch.float64 else torch.float32).flatten(1)


def _checked_options(estimator: str, subset: int | None, correction: float | None, samples: int) -> tuple[int, float]:
    """L, and -ln C, the logit of the source."""
    require_known("estimator", estimator, ESTIMATORS)
    if estimator == "full" and subset is not None:
        raise ValueError(f"subset is {subset!r} with estimator 'full', expected None: it uses all the data")
    if estimator not in _DEFAULT_CORRECTION and correction is not None:
        raise ValueError(
            f"correction is {correction!r} with estimator {estimator!r}, expected None: only "
            f"{' and '.join(_DEFAULT_CORRECTION)} have it"
        )
    size = max(2, samples // 10) if subset is None else subset
    if isinstance(size, bool) or not isinstance(size, int) or not 2 <= size <= samples:
        raise ValueError(f"subset is {subset!r}, expected an integer from 2 to {samples}, the size of the data set")
    c = _DEFAULT_CORRECTION.get(estimator, 1.0) * samples / size if correction is None else correction
    return size, -math.log(require_number("correction", c, above=0.0)) if estimator in _DEFAULT_CORRECTION else 0.0


def _stream(seed: int, batch: int) -> int:
    """Seed of a batch, so that its draws do not depend on earlier batches."""
    return int(np.random.SeedSequence((seed, batch)).generate_state(1, np.uint64)[0] >> np.uint64(1))
