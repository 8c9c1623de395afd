"""The whole contract of one step in plain PyTorch, readable top to bottom.

Oracle of every test, fallback on any device, baseline of every benchmark. It imports nothing of vadiff, and the
fused backends offer the same four functions (`diffusion_loss`, `diffusion_loss_backward`, `scale_gradient`,
`reweight`) with the same arguments in the same order.

Notation, per sample i and bin k:

    r = a*F + b*x0 + c*eps     residual (F: what the network returned)
    ell_i                      mean over the sample's elements of r**2, or of Huber's function of r
    u_i, v_i                   base weight (part of the objective), sample weight (importance correction, mask share)
    g_i = u_i * ell_i          base loss: what enters the bins
    w(lambda_i)                adaptive or fixed weight
    loss = mean_i w u v ell    every sample's weight comes from the statistics before this batch

State of K bins: `state` int64 [4K + 2], whose first 4K entries are the bits of float64 count n, mean, M2 (sum of
squared deviations) and mass (sum of v), then the count of skipped samples, then a ticket by which a CUDA kernel counts
its finished blocks, 0 between calls; `log_weights` int32 [K], the bits of float32 ln w at the bin centres. Integers,
because `module.half()` casts every float buffer. A batch's statistics travel as one float64 vector [4K + 1]: n, mean,
M2, mass, skipped.

Sources: running moments, Welford (1962) and Chan, Golub & LeVeque (1983); Huber's function as in
`torch.nn.functional.huber_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 4096  # elements summed in float32 before float64 takes over
TILE = 2048  # samples per two-pass tile of the batch statistics
EMPTY = 2.0**-20  # a bin whose count falls below is emptied

Coefficient = float | Tensor  # a number, or one per sample [B]
Gather = Callable[[Tensor], Tensor]  # batch statistics [4K + 1] of this rank -> [ranks, 4K + 1]


class Bins(NamedTuple):
    """K equal-width intervals of log-SNR; values outside fall in the end bins."""

    size: int  # K
    low: float
    high: float

    @property
    def width(self) -> float:
        return (self.high - self.low) / self.size

    @property
    def inv_width(self) -> float:
        return self.size / (self.high - self.low)


class TableRule(NamedTuple):
    """How statistics become an adaptive weight table. `statistic` "" means: no table (fixed weighting)."""

    statistic: str = ""  # "std", "mean" or "rms" of the base loss
    strength: float = 1.0
    smoothing: float = 0.5  # h, in log-SNR units
    clip: float = 10.0
    prior: float = 32.0

    def radius(self, bins: Bins) -> int:
        """Bins within three smoothing widths, to each side (the slack keeps exact multiples inside)."""
        return int(min(3.0 * self.smoothing / bins.width + 1e-6, bins.size - 1))


# rows: one value per sample


def residual(
    output: Tensor,
    target: Tensor | None,
    noise: Tensor | None,
    a: Coefficient,
    b: Coefficient,
    c: Coefficient,
) -> Tensor:
    """r = a*F + b*x0 + c*eps in float32 (float64 for float64 outputs), [B, ...]. A tensor given as None is not read."""
    dtype = compute_dtype(output)

    def term(coefficient: Coefficient, tensor: Tensor) -> Tensor:
        if isinstance(coefficient, Tensor):
            coefficient = coefficient.to(dtype).view(-1, *[1] * (tensor.dim() - 1))
        return tensor.to(dtype) * coefficient

    r = term(a, output)
    if target is not None:
        r = r + term(b, target)
    if noise is not None:
        r = r + term(c, noise)
    return r


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
    position = ((log_snr - bins.low) * bins.inv_width).floor().clamp(0, bins.size - 1)
    return position.nan_to_num(nan=0.0).long()


def log_weight_at(log_weights: Tensor, log_snr: Tensor, bins: Bins) -> Tensor:
    """ln w at each log-SNR [B] float32: linear between bin centres, flat beyond the outer two, NaN for NaN."""
    position = ((log_snr - bins.low) * bins.inv_width - 0.5).clamp(0, bins.size - 1)  # in bins, from the first centre
    left = position.nan_to_num(nan=0.0).floor().clamp(max=bins.size - 2).long()
    table = log_weights.view(torch.float32)
    return table[left] + (position - left) * (table[left + 1] - table[left])


class Samples(NamedTuple):
    """What each sample of a batch is worth; all [B]."""

    base_loss: Tensor  # g = u*ell
    entered: Tensor  # bool: goes into the bins
    poisoned: Tensor  # bool: counted in `skipped`, loss and gradient are NaN
    factor: Tensor  # w*u*v; NaN if poisoned, 0 if left out
    slope: Tensor  # w*v*ell, the derivative by u; NaN if poisoned, 0 if left out
    weighted: Tensor  # w*u*v*ell; NaN if poisoned, 0 if left out


def classify(
    ell: Tensor,
    log_snr: Tensor,
    base_weight: Tensor | None,
    sample_weight: Tensor | None,
    weight: Tensor | None,
    log_weights: Tensor | None,
    bins: Bins,
) -> Samples:
    """Weigh each sample and sort out the poisoned and the left out. `weight` None: from the table; both None: 1.

    Poisoned: NaN log-SNR, or non-finite ell, u, v or g. Left out: u*v = 0; its ell may be anything."""
    one = torch.ones_like(ell)
    u = one if base_weight is None else base_weight.to(ell.dtype)
    v = one if sample_weight is None else sample_weight.to(ell.dtype)
    if weight is not None:
        w = weight.to(ell.dtype)
    elif log_weights is not None:
        w = log_weight_at(log_weights, log_snr, bins).exp().to(ell.dtype)
    else:
        w = one
    g = u * ell
    left_out = u * v == 0
    poisoned = log_snr.isnan() | ~u.isfinite() | ~v.isfinite() | (~g.isfinite() | ~ell.isfinite()) & ~left_out

    def settled(value: Tensor) -> Tensor:
        return value.masked_fill(left_out, 0.0).masked_fill(poisoned, math.nan)

    factor = settled(w * u * v)
    return Samples(g, ~(poisoned | left_out), poisoned, factor, settled(w * v * ell), settled(factor * ell))


# statistics: one value per log-SNR bin


def batch_statistics(samples: Samples, log_snr: Tensor, sample_weight: Tensor | None, bins: Bins) -> Tensor:
    """Statistics of one batch, float64 [4K + 1]: two passes within tiles of samples, Chan's merge across them."""
    g = samples.base_loss.double()
    v = torch.ones_like(g) if sample_weight is None else sample_weight.double()
    bin_of = torch.where(samples.entered, bin_index(log_snr, bins), -1)
    ks = torch.arange(bins.size, device=g.device)
    tiles = []
    for start in range(0, len(g), TILE):
        tile = slice(start, start + TILE)
        member = bin_of[tile, None] == ks  # [tile, K]
        n = member.sum(0).double()
        mean = torch.where(member, g[tile, None], 0.0).sum(0) / n.clamp(min=1.0)
        m2 = torch.where(member, (g[tile, None] - mean) ** 2, 0.0).sum(0)
        mass = torch.where(member, v[tile, None], 0.0).sum(0)
        tiles.append(torch.cat([n, mean, m2, mass, samples.poisoned[tile].sum().double()[None]]))
    return merge(torch.stack(tiles), bins)


def merge(parts: Tensor, bins: Bins) -> Tensor:
    """Chan's merge of batch statistics [P, 4K + 1] in the order of their rows."""
    total, *rest = parts.unbind(0)
    for part in rest:
        n, mean, m2, mass = _chan(total[:-1].view(4, bins.size), part[:-1].view(4, bins.size))
        total = torch.cat([n, mean, m2, mass, (total[-1] + part[-1])[None]])
    return total


def _chan(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge two sets of moments, each [4, K]: n, mean, M2, mass. An empty side leaves the other's bits alone."""
    n = old[0] + new[0]
    share = torch.where(n > 0, new[0] / n, 0.0)
    delta = torch.where(new[0] > 0, new[1] - old[1], 0.0)
    return n, old[1] + delta * share, old[2] + new[2] + delta * delta * old[0] * share, old[3] + new[3]


def moments_of(state: Tensor, bins: Bins) -> Tensor:
    """n, mean, M2 and mass: a view of `state` as float64 [4, K]."""
    return state[: 4 * bins.size].view(torch.float64).view(4, bins.size)


def fold(state: Tensor, batch: Tensor, half_life: float, bins: Bins) -> None:
    """Forget, then merge one batch into `state`, in place.

    rho = 2**(-N / (half_life * K)) for the N samples that entered: one clock for all bins, counted in samples."""
    moments = moments_of(state, bins)
    new = batch[:-1].view(4, bins.size)
    rho = torch.exp2(-new[0].sum() / (half_life * bins.size))
    old = torch.stack([moments[0] * rho, moments[1], moments[2] * rho, moments[3] * rho])
    folded = torch.stack(_chan(old, new))
    moments.copy_(torch.where(folded[0] < EMPTY, 0.0, folded))
    state[4 * bins.size] += batch[-1].long()


def variance(n: Tensor, m2: Tensor) -> Tensor:
    """M2 / max(n - 1, n/2): unbiased for n >= 2, and finite for effective counts below."""
    return m2 / torch.maximum(n - 1, n / 2)


# weights: from statistics to ln w


def weight_table(moments: Tensor, bins: Bins, rule: TableRule) -> Tensor:
    """ln w at the bin centres, float32 [K], from moments float64 [4, K].

    1. a_k = -strength * ln s_k, s_k the bin's std, mean or rms.
    2. Local linear smoothing over bins with a value within three widths h, ridge 32 h**2/Q on the slope, clamped to
       the values in reach: bins without a value borrow. The count follows: n~_k = Q.
    3. Centre on the mean by mass, clamp to +-ln clip, shrink by n~ / (n~ + prior).
    4. w = c * e**a with c = sum(m mu) / sum(m e**a mu), which leaves the expected loss where it was."""
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
    offset = k - k[:, None]  # [K, K]: row = bin asked for, column = bin j in reach
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


def diffusion_loss(
    output: Tensor,
    target: Tensor | None,
    noise: Tensor | None,
    a: Coefficient,
    b: Coefficient,
    c: Coefficient,
    log_snr: Tensor,
    base_weight: Tensor | None,
    sample_weight: Tensor | None,
    weight: Tensor | None,
    state: Tensor,
    log_weights: Tensor,
    bins: Bins,
    half_life: float,
    rule: TableRule,
    huber_delta: float,
    mean: bool,
    with_gradient: bool,
    update: bool,
    gather: Gather | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step. Returns the loss (scalar, or [B] if not `mean`), ell [B], what a backward needs besides the inputs
    [2B + 1] (w*u*v and w*v*ell of each sample, then the mean loss), and the gradient of the mean loss by `output` in
    its dtype and layout (empty unless `with_gradient`).

    With `update`, `state` and `log_weights` move in place, after the weights of this batch were read."""
    r = residual(output, target, noise, a, b, c)
    ell = per_sample_loss(r, huber_delta)
    table = log_weights if rule.statistic else None
    samples = classify(ell, log_snr, base_weight, sample_weight, weight, table, bins)
    mean_loss = samples.weighted.mean(dtype=torch.float64).to(ell.dtype)
    saved = torch.cat([samples.factor, samples.slope, mean_loss[None]])
    gradient = output.new_empty(0)
    if with_gradient:
        gradient = _gradient(r, samples.factor, a, output, huber_delta, 1.0 / output.numel())
    if update:
        _update(samples, log_snr, sample_weight, state, log_weights, bins, half_life, rule, gather)
    return mean_loss if mean else samples.weighted, ell, saved, gradient


def diffusion_loss_backward(
    upstream: Tensor,
    saved: Tensor,
    output: Tensor,
    target: Tensor | None,
    noise: Tensor | None,
    a: Coefficient,
    b: Coefficient,
    c: Coefficient,
    huber_delta: float,
) -> Tensor:
    """Gradient by `output` from the saved inputs; `upstream` is a scalar (loss was the mean) or [B]. NaN where the
    loss is."""
    r = residual(output, target, noise, a, b, c)
    mean = upstream.dim() == 0
    factor = saved[: len(output)] * upstream.to(r.dtype)
    if mean:
        factor = factor.masked_fill(saved[-1].isnan(), math.nan)
    return _gradient(r, factor, a, output, huber_delta, (1 if mean else len(output)) / output.numel())


def scale_gradient(gradient: Tensor, upstream: Tensor, saved: Tensor, out: Tensor) -> None:
    """out = gradient * upstream, NaN if the mean loss is; `out` may be `gradient` itself."""
    out.copy_(gradient.to(compute_dtype(gradient)) * upstream.masked_fill(saved[-1].isnan(), math.nan))


def reweight(
    loss: Tensor,
    log_snr: Tensor,
    sample_weight: Tensor | None,
    weight: Tensor | None,
    state: Tensor,
    log_weights: Tensor,
    bins: Bins,
    half_life: float,
    rule: TableRule,
    update: bool,
    gather: Gather | None,
) -> Tensor:
    """Record a per-sample base loss [B] and return its factor w*v [B]; NaN if poisoned, 0 if left out."""
    table = log_weights if rule.statistic else None
    samples = classify(loss, log_snr, None, sample_weight, weight, table, bins)
    if update:
        _update(samples, log_snr, sample_weight, state, log_weights, bins, half_life, rule, gather)
    return samples.factor


def _update(
    samples: Samples,
    log_snr: Tensor,
    sample_weight: Tensor | None,
    state: Tensor,
    log_weights: Tensor,
    bins: Bins,
    half_life: float,
    rule: TableRule,
    gather: Gather | None,
) -> None:
    batch = batch_statistics(samples, log_snr, sample_weight, bins)
    if gather is not None:
        batch = merge(gather(batch), bins)
    fold(state, batch, half_life, bins)
    if rule.statistic:
        moments = moments_of(state, bins)
        log_weights.view(torch.float32).copy_(weight_table(moments, bins, rule))


def _gradient(r: Tensor, factor: Tensor, a: Coefficient, output: Tensor, huber_delta: float, scale: float) -> Tensor:
    """factor_i * a_i * scale * slope(r) in the output's dtype and layout; exactly 0 for samples whose factor is 0."""
    per_sample = (factor * a * scale).to(r.dtype).view(-1, *[1] * (r.dim() - 1))
    g = torch.where(per_sample == 0, 0.0, per_sample * residual_slope(r, huber_delta))
    return torch.empty_like(output).copy_(g)


def compute_dtype(output: Tensor) -> torch.dtype:
    """Arithmetic of a call: float64 for float64 outputs, else float32."""
    return torch.float64 if output.dtype == torch.float64 else torch.float32
