"""Reference implementation of one step in plain PyTorch: it defines what every backend computes.

Oracle of every test, fallback on any device, baseline of every benchmark. The fused backends offer the same four
functions, at the end of this file; their types are those of `vadiff.ops.problem`.

Notation, per sample i and bin k:

    r = a*F + b*x0 + c*eps     residual (F: the prediction, what the network returned)
    ell_i                      mean over the sample's elements of r**2, or of Huber's function of r
    u_i, v_i                   base weight (part of the objective), sample weight (importance correction, mask share)
    g_i = u_i * ell_i          base loss: what enters the bins
    w(lambda_i)                weight: from the table, given, or 1; NaN where lambda_i is NaN
    loss = mean_i w u v ell    every sample's weight comes from the statistics before this batch

Masked: u = 0 or v = 0. A masked sample has no loss, no gradient and enters no bin, whatever its other values are.
Skipped: a sample that is not masked, with a NaN lambda or a non-finite ell, u, v or g. It enters no bin and is counted.
Non-finite values propagate to its loss and gradient as in `F.mse_loss`; other samples are unaffected.

State of K bins: `state` int64 [6K + 14], see `vadiff.ops.problem.State`; `log_weights` int32 [K], the bits of float32
ln w at the bin centres. Integers, because `module.half()` casts every float buffer. The statistics of a batch are one
float64 vector [4K + 5]: n, mean, M2, mass, then the totals of `vadiff.ops.problem.BATCH_TOTALS`.

Sources: running moments, Welford (1962) and Chan, Golub & LeVeque (1983); Huber's function as in
`torch.nn.functional.huber_loss`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .level_free import level_free
from .problem import (
    BATCH_TOTALS,
    FACTOR,
    MASKED,
    Bins,
    Gather,
    Inputs,
    Problem,
    State,
    StateTotals,
    Step,
    TableRule,
    compute_dtype,
)

BLOCK = 4096  # elements summed in float32; blocks are summed in float64
TILE = 2048  # samples per two-pass tile of the batch statistics
EMPTY = 2.0**-20  # a bin whose count falls below is emptied


# rows: one value per sample


def residual(inputs: Inputs) -> Tensor:
    """r = a*F + b*x0 + c*eps in float32 (float64 for a float64 F), [B, ...]. A tensor given as None is not read."""
    dtype = compute_dtype(inputs.prediction)
    r = None
    for coefficient, tensor in (
        (inputs.a, inputs.prediction), (inputs.b, inputs.target), (inputs.c, inputs.noise)
    ):  # fmt: skip
        if tensor is not None:
            term = tensor.to(dtype) * (_column(coefficient, tensor) if isinstance(coefficient, Tensor) else coefficient)
            r = term if r is None else r + term
    assert r is not None  # the prediction is always read
    return r


def _column(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...], to broadcast with `like` [B, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))


def per_sample_loss(r: Tensor, huber_delta: float) -> Tensor:
    """ell [B]: mean of r**2, or of Huber's function where huber_delta > 0. float32 inside blocks, float64 across."""
    if huber_delta > 0:
        size = r.abs()
        e = torch.where(size <= huber_delta, 0.5 * r * r, huber_delta * (size - 0.5 * huber_delta))
    else:
        e = r * r
    e = e.reshape(len(e), -1)  # [B, D]
    whole = e.shape[1] // BLOCK * BLOCK
    total = e[:, whole:].sum(1).double()  # [B]
    if whole:
        total = total + e[:, :whole].unflatten(1, (-1, BLOCK)).sum(2).sum(1, dtype=torch.float64)
    return (total / e.shape[1]).to(r.dtype)


def residual_slope(r: Tensor, huber_delta: float) -> Tensor:
    """Derivative of the element's loss by r: 2r, or r clamped to +-delta."""
    return r.clamp(-huber_delta, huber_delta) if huber_delta > 0 else 2.0 * r


def bin_index(log_snr: Tensor, bins: Bins) -> Tensor:
    """floor((lambda - low) * inv_width) in float32, clamped to [0, K-1] before the cast; NaN goes to 0. int64 [B]."""
    return _position(log_snr, bins).clamp(0, bins.size - 1).nan_to_num(nan=0.0).long()


def _position(log_snr: Tensor, bins: Bins) -> Tensor:
    """Number of the interval of that width, negative or above K - 1 outside the range. [B] float32."""
    return ((log_snr - bins.low) * bins.inv_width).floor()


def log_weight_at(log_weights: Tensor, log_snr: Tensor, bins: Bins) -> Tensor:
    """ln w at each log-SNR [B] float32: linear between bin centres, flat beyond the outer two, NaN for NaN."""
    position = ((log_snr - bins.low) * bins.inv_width - 0.5).clamp(0, bins.size - 1)  # in bins, from the first centre
    left = position.nan_to_num(nan=0.0).floor().clamp(max=bins.size - 2).long()
    table = log_weights.view(torch.float32)
    return table[left] + (position - left) * (table[left + 1] - table[left])


class Samples(NamedTuple):
    """Per-sample losses, weights and flags; all [B]."""

    base_loss: Tensor  # g = u*ell
    masked: Tensor  # bool: no loss, no gradient, enters no bin
    skipped: Tensor  # bool: non-finite, enters no bin and is counted
    factor: Tensor  # w*u*v; 0 if masked
    slope: Tensor  # w*v*ell, the derivative by u; 0 if masked
    weighted: Tensor  # w*u*v*ell; 0 if masked


def classify(ell: Tensor, inputs: Inputs, log_weights: Tensor | None, bins: Bins) -> Samples:
    """Compute each sample's weight; flag masked and skipped samples.

    ell: [B]. log_weights: the table [K], read where no weight is given; both None: w = 1."""
    one = torch.ones_like(ell)
    u = one if inputs.base_weight is None else inputs.base_weight.to(ell.dtype)
    v = one if inputs.sample_weight is None else inputs.sample_weight.to(ell.dtype)
    if inputs.weight is not None:
        w = inputs.weight.to(ell.dtype)
    elif log_weights is not None:
        w = log_weight_at(log_weights, inputs.log_snr, bins).exp().to(ell.dtype)
    else:
        w = one
    w = w.masked_fill(inputs.log_snr.isnan(), math.nan)
    g = u * ell
    masked = (u == 0) | (v == 0)
    finite = ell.isfinite() & u.isfinite() & v.isfinite() & g.isfinite() & ~inputs.log_snr.isnan()
    factor = w * u * v
    return Samples(
        base_loss=g,
        masked=masked,
        skipped=~finite & ~masked,
        factor=factor.masked_fill(masked, 0.0),
        slope=(w * v * ell).masked_fill(masked, 0.0),
        weighted=(factor * ell).masked_fill(masked, 0.0),
    )


# statistics: one value per log-SNR bin


def batch_statistics(samples: Samples, inputs: Inputs, bins: Bins) -> Tensor:
    """Statistics of one batch, float64 [4K + 5]: two passes within tiles of samples, Chan's merge across them."""
    g = samples.base_loss.double()
    v = torch.ones_like(g) if inputs.sample_weight is None else inputs.sample_weight.double()
    entered = ~(samples.masked | samples.skipped)
    bin_of = torch.where(entered, bin_index(inputs.log_snr, bins), -1)
    position = _position(inputs.log_snr, bins)
    totals = torch.stack(  # [5, B]
        [
            samples.skipped.double(), (v * g).masked_fill(samples.masked, 0.0), torch.ones_like(g),
            (entered & (position < 0)).double(), (entered & (position >= bins.size)).double(),
        ]
    )  # fmt: skip
    ks = torch.arange(bins.size, device=g.device)
    tiles = []
    for start in range(0, len(g), TILE):
        tile = slice(start, start + TILE)
        member = bin_of[tile, None] == ks  # [tile, K]
        n = member.sum(0).double()
        mean = torch.where(member, g[tile, None], 0.0).sum(0) / n.clamp(min=1.0)
        m2 = torch.where(member, (g[tile, None] - mean) ** 2, 0.0).sum(0)
        mass = torch.where(member, v[tile, None], 0.0).sum(0)
        tiles.append(torch.cat([n, mean, m2, mass, totals[:, tile].sum(1)]))
    return merge(torch.stack(tiles), bins)


def merge(parts: Tensor, bins: Bins) -> Tensor:
    """Chan's merge of batch statistics [P, 4K + 5] in the order of their rows."""
    total, *rest = parts.unbind(0)
    moments = 4 * bins.size
    for part in rest:
        merged = _chan(total[:moments].view(4, bins.size), part[:moments].view(4, bins.size))
        total = torch.cat([*merged, total[moments:] + part[moments:]])
    return total


def _chan(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge two sets of moments, each [4, K]: n, mean, M2, mass. Merging with an empty side keeps the other's bits."""
    n = old[0] + new[0]
    share = torch.where(n > 0, new[0] / n, 0.0)
    delta = torch.where(new[0] > 0, new[1] - old[1], 0.0)
    return n, old[1] + delta * share, old[2] + new[2] + delta * delta * old[0] * share, old[3] + new[3]


def moments_of(state: Tensor, bins: Bins) -> Tensor:
    """n, mean, M2 and mass: a view of `state` as float64 [4, K]."""
    return state[: 4 * bins.size].view(torch.float64).view(4, bins.size)


def totals_of(state: Tensor, bins: Bins) -> Tensor:
    """`vadiff.ops.problem.StateTotals`: a view of `state` as float64 [12]."""
    return state[4 * bins.size + 2 : 4 * bins.size + 14].view(torch.float64)


def levels_of(state: Tensor, bins: Bins) -> Tensor:
    """Shares and mean v of a level sampler's draws in each bin: a view of `state` as float64 [2, K]."""
    return state[4 * bins.size + 14 :].view(torch.float64).view(2, bins.size)


def fold(state: Tensor, batch: Tensor, half_life: float, bins: Bins) -> None:
    """Forget, then merge one batch into `state`, in place.

    rho = 2**(-N / (half_life * K)) for the N recorded samples of the batch, the same in all bins."""
    moments, totals = moments_of(state, bins), totals_of(state, bins)
    new = batch[: 4 * bins.size].view(4, bins.size)
    of_batch = dict(zip(BATCH_TOTALS, batch[4 * bins.size :], strict=True))
    rho = torch.exp2(-new[0].sum() / (half_life * bins.size))
    old_totals = StateTotals(*totals.unbind())
    moved = level_free(moments, new, of_batch, old_totals, levels_of(state, bins), half_life)
    below, above = (old * rho + of_batch[name] for old, name in zip(old_totals, ("below", "above"), strict=False))
    totals.copy_(torch.stack(moved._replace(below=below, above=above)))
    old = torch.stack([moments[0] * rho, moments[1], moments[2] * rho, moments[3] * rho])
    folded = torch.stack(_chan(old, new))
    moments.copy_(torch.where(folded[0] < EMPTY, 0.0, folded))
    state[4 * bins.size] += of_batch["skipped"].long()


def variance(n: Tensor, m2: Tensor) -> Tensor:
    """M2 / max(n - 1, n/2): unbiased for n >= 2, and finite for effective counts below."""
    return m2 / torch.maximum(n - 1, n / 2)


# weights: from statistics to ln w


def weight_table(moments: Tensor, bins: Bins, rule: TableRule) -> Tensor:
    """ln w at the bin centres, float32 [K], from moments float64 [4, K].

    1. a_k = -strength * ln s_k, s_k the bin's std, mean or rms.
    2. Local linear smoothing over bins with a value within three widths h, ridge 32 h**2/Q on the slope, clamped to
       the range of those values: bins without a value take their neighbours'. Smoothed count: n~_k = Q.
    3. Centre on the mean by mass, clamp to +-ln clip, shrink by n~ / (n~ + prior).
    4. w = c * e**a with c = sum(m mu) / sum(m e**a mu), which preserves the expected loss."""
    n, mean, m2, mass = moments
    occupied = n >= EMPTY
    if rule.statistic == "std":
        s = variance(n, m2).sqrt()
    elif rule.statistic == "rms":
        s = (mean * mean + m2 / n).sqrt()
    else:
        s = mean
    has_value = occupied & (s > 1e-6 * mean.abs())
    a = torch.where(has_value, -rule.strength * s.log(), 0.0)
    n = torch.where(has_value, n, 0.0)
    m = torch.where(has_value, mass, 0.0)
    share = torch.where(m.sum() > 0, m / m.sum(), 0.0)
    if rule.smoothing > 0:
        a, n = smooth(a, n, bins, rule)
    reached = n > 0
    a = torch.where(reached, a - (share * a).sum(), 0.0)
    limit = math.log(rule.clip)
    a = torch.where(reached, a.clamp(-limit, limit) * (n / (n + rule.prior)), 0.0)
    total = (mass * mean).sum()
    c = total / (mass * a.exp() * mean).sum()
    c = torch.where((c > 0) & c.isfinite(), c, 1.0)
    return (a + c.log()).float()


def smooth(a: Tensor, n: Tensor, bins: Bins, rule: TableRule) -> tuple[Tensor, Tensor]:
    """Step 2 of `weight_table`: a and n [K], n = 0 where a bin has no value. Returns smoothed a and n~ = Q."""
    h = rule.smoothing
    k = torch.arange(bins.size, device=a.device)
    offset = k - k[:, None]  # [K, K]: row = target bin, column = bin j within the radius
    d = offset.double() * bins.width
    q = torch.where(offset.abs() <= rule.radius(bins), n * torch.exp(-(d * d) / (2 * h * h)), 0.0)
    total = q.sum(1)
    safe = torch.where(total > 0, total, 1.0)
    d_mean = (q * d).sum(1) / safe
    a_mean = (q * a).sum(1) / safe
    deviation = d - d_mean[:, None]
    v = (q * deviation**2).sum(1) / safe
    cov = (q * deviation * (a - a_mean[:, None])).sum(1) / safe
    fit = a_mean - d_mean * cov / (v + 32 * h * h / safe)
    lowest = torch.where(q > 0, a, math.inf).amin(1)
    highest = torch.where(q > 0, a, -math.inf).amax(1)
    return torch.where(total > 0, torch.minimum(torch.maximum(fit, lowest), highest), 0.0), total


# the four functions of a backend


@torch.no_grad()
def step(
    problem: Problem, inputs: Inputs, state: State, *, gradient: bool, update: bool, gather: Gather | None
) -> Step:
    """One step: loss, per-sample results for a backward, and with `gradient` the gradient of the mean loss.

    With `update`, `state` is updated in place, after the weights of this batch were read. `gather` collects the
    batch statistics of all ranks; None: one rank."""
    r = residual(inputs)
    ell = per_sample_loss(r, problem.huber_delta)
    samples = classify(ell, inputs, state.log_weights if problem.rule.statistic else None, problem.bins)
    loss = samples.weighted
    if inputs.mean:
        loss = loss.mean(dtype=torch.float64).to(ell.dtype)
    by_prediction = inputs.prediction.new_empty(0)
    if gradient:
        scale = 1.0 / inputs.prediction.numel()
        by_prediction = _gradient(r, samples.factor, samples.masked, inputs, problem.huber_delta, scale)
    if update:
        _update(problem, samples, inputs, state, gather)
    return Step(loss, torch.stack([ell, samples.factor, samples.slope, samples.masked.to(ell.dtype)]), by_prediction)


def backward(problem: Problem, inputs: Inputs, per_sample: Tensor, upstream: Tensor) -> Tensor:
    """Gradient by the prediction from the inputs of a step; `upstream` is a scalar (reduction "mean") or [B]."""
    r = residual(inputs)
    samples = 1 if upstream.dim() == 0 else len(r)
    factor = per_sample[FACTOR] * upstream.to(r.dtype)
    return _gradient(r, factor, per_sample[MASKED] != 0, inputs, problem.huber_delta, samples / r.numel())


def scale(gradient: Tensor, upstream: Tensor) -> None:
    """gradient *= upstream, a scalar, in the compute dtype."""
    gradient.copy_(gradient.to(compute_dtype(gradient)) * upstream)


def reweight(problem: Problem, inputs: Inputs, state: State, *, update: bool, gather: Gather | None) -> Tensor:
    """Record per-sample base losses [B]; return their factors w*v [B], 0 if masked, NaN where the loss is not finite.

    With `update`, `state` is updated in place, after the weights of this batch were read."""
    loss = inputs.prediction
    samples = classify(loss, inputs, state.log_weights if problem.rule.statistic else None, problem.bins)
    if update:
        _update(problem, samples, inputs, state, gather)
    return samples.factor.masked_fill(~loss.isfinite() & ~samples.masked, math.nan)


def _update(problem: Problem, samples: Samples, inputs: Inputs, state: State, gather: Gather | None) -> None:
    batch = batch_statistics(samples, inputs, problem.bins)
    if gather is not None:
        batch = merge(gather(batch), problem.bins)
    fold(state.state, batch, problem.half_life, problem.bins)
    if problem.rule.statistic:
        table = weight_table(moments_of(state.state, problem.bins), problem.bins, problem.rule)
        state.log_weights.view(torch.float32).copy_(table)


def _gradient(r: Tensor, factor: Tensor, masked: Tensor, inputs: Inputs, huber_delta: float, scale: float) -> Tensor:
    """factor_i * a_i * scale * slope(r) in the prediction's dtype and layout; exactly 0 for masked samples."""
    each = _column((factor * inputs.a * scale).to(r.dtype), r)
    g = (each * residual_slope(r, huber_delta)).masked_fill(_column(masked, r), 0.0)
    return torch.empty_like(inputs.prediction).copy_(g)
