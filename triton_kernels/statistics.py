"""Kernels over the samples and the bins: per-sample results, batch statistics, fold with forgetting, weight table.

A bin is computed by the lane that owns it, so there are no atomics and every sum has a fixed order. Up to TILE samples
on one rank everything happens in one program of `statistics_kernel`; otherwise each tile writes its statistics and
`fold_kernel` merges them. All arithmetic on statistics is float64.

The workspace is float64: partial [B, splits], base loss [B], bin [B] (-1: not entered), a [K], n [K].
"""

import triton
import triton.language as tl

from .level_free import is_finite, move_totals
from .rows import load_weights

TILE = 2048  # samples per program
NUM_WARPS = 8
EMPTY = tl.constexpr(2.0**-20)


@triton.jit
def load_moments(moments_ptr, k, m_k, bins):
    """n, mean, M2 and mass of bins k, from [4, bins] float64."""
    n = tl.load(moments_ptr + k, mask=m_k, other=0.0)
    mean = tl.load(moments_ptr + bins + k, mask=m_k, other=0.0)
    m2 = tl.load(moments_ptr + 2 * bins + k, mask=m_k, other=0.0)
    return n, mean, m2, tl.load(moments_ptr + 3 * bins + k, mask=m_k, other=0.0)


@triton.jit
def store_moments(moments_ptr, n, mean, m2, mass, k, m_k, bins):
    """The other way round."""
    tl.store(moments_ptr + k, n, mask=m_k)
    tl.store(moments_ptr + bins + k, mean, mask=m_k)
    tl.store(moments_ptr + 2 * bins + k, m2, mask=m_k)
    tl.store(moments_ptr + 3 * bins + k, mass, mask=m_k)


@triton.jit
def classify_samples(
    loss_ptr,  # [B, splits] float64 sums if `splits`, else [B] float32 per-sample losses
    log_snr_ptr, base_weight_ptr, sample_weight_ptr, weight_ptr, log_weights_ptr,
    ell_ptr,  # [B] float32 or None, out
    factor_ptr,  # [B] float32, out: w*u*v; NaN where the loss is not finite if SPLITS is 0
    slope_ptr,  # [B] float32 or None, out: w*v*ell
    masked_ptr,  # [B] float32 or None, out: 1 where masked
    out_ptr,  # [B] float32 or None, out: w*u*v*ell
    base_loss_ptr,  # [B] float64, out
    bin_ptr,  # [B] float64, out
    first, last, samples, elements, splits, low, inv_width, bins, SAMPLES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Step 1: settle each sample of [first, last). Returns the sum of w*u*v*ell; then, as in BATCH_TOTALS,
    the number of skipped samples, the sum of v*g, and the numbers of samples below and above the range."""
    total = tl.full((), 0.0, tl.float64)
    loss = tl.full((), 0.0, tl.float64)
    skipped_count = tl.full((), 0, tl.int32)
    below = tl.full((), 0, tl.int32)
    above = tl.full((), 0, tl.int32)
    for start in range(first, last, SAMPLES):
        i = start + tl.arange(0, SAMPLES)
        m = i < last
        if SPLITS > 0:
            sums = tl.zeros((SAMPLES,), tl.float64)
            for split in range(0, splits, SPLITS):
                s = split + tl.arange(0, SPLITS)
                o = i[:, None].to(tl.int64) * splits + s[None, :]
                sums += tl.sum(tl.load(loss_ptr + o, mask=m[:, None] & (s < splits)[None, :], other=0.0), axis=1)
            ell = (sums / elements).to(tl.float32)
        else:
            ell = tl.load(loss_ptr + i, mask=m, other=0.0)
        log_snr = tl.load(log_snr_ptr + i, mask=m, other=0.0)
        w, u, v = load_weights(
            log_snr, base_weight_ptr, sample_weight_ptr, weight_ptr, log_weights_ptr, i, m, low, inv_width, bins
        )  # fmt: skip
        g = u * ell
        masked = (u == 0.0) | (v == 0.0)
        finite = is_finite(g) & is_finite(ell) & is_finite(u) & is_finite(v) & (log_snr == log_snr)
        skipped = (finite == 0) & (masked == 0)
        factor = w * u * v
        weighted = tl.where(masked, 0.0, factor * ell)
        if SPLITS == 0:
            factor = tl.where(is_finite(ell), factor, float("nan"))
        if ell_ptr is not None:
            tl.store(ell_ptr + i, ell, mask=m)
        tl.store(factor_ptr + i, tl.where(masked, 0.0, factor), mask=m)
        if slope_ptr is not None:
            tl.store(slope_ptr + i, tl.where(masked, 0.0, w * v * ell), mask=m)
        if masked_ptr is not None:
            tl.store(masked_ptr + i, masked.to(tl.float32), mask=m)
        if out_ptr is not None:
            tl.store(out_ptr + i, weighted, mask=m)
        position = tl.floor((log_snr - low) * inv_width)
        entered = m & (skipped == 0) & (masked == 0)
        below += tl.sum((entered & (position < 0.0)).to(tl.int32))
        above += tl.sum((entered & (position >= bins)).to(tl.int32))
        position = tl.minimum(tl.maximum(tl.where(position == position, position, 0.0), 0.0), bins - 1.0)
        tl.store(base_loss_ptr + i, g.to(tl.float64), mask=m)
        tl.store(bin_ptr + i, tl.where(skipped | masked, -1.0, position).to(tl.float64), mask=m)
        total += tl.sum(tl.where(m, weighted, 0.0).to(tl.float64))
        loss += tl.sum(tl.where(m & (masked == 0), v.to(tl.float64) * g.to(tl.float64), 0.0))
        skipped_count += tl.sum((skipped & m).to(tl.int32))
    return total, skipped_count.to(tl.float64), loss, below.to(tl.float64), above.to(tl.float64)


@triton.jit
def batch_statistics(
    base_loss_ptr, bin_ptr, sample_weight_ptr, first, last, K: tl.constexpr, SAMPLES: tl.constexpr
):  # fmt: skip
    """Step 2: count, mean, M2 and mass of each bin over the samples [first, last), in two passes. [K] float64."""
    k = tl.arange(0, K)[:, None]
    n = tl.zeros((K,), tl.float64)
    total = tl.zeros((K,), tl.float64)
    mass = tl.zeros((K,), tl.float64)
    for start in range(first, last, SAMPLES):
        i = start + tl.arange(0, SAMPLES)
        m = i < last
        member = tl.load(bin_ptr + i, mask=m, other=-1.0).to(tl.int32)[None, :] == k
        g = tl.load(base_loss_ptr + i, mask=m, other=0.0)
        n += tl.sum(member.to(tl.int32), axis=1).to(tl.float64)
        total += tl.sum(tl.where(member, g[None, :], 0.0), axis=1)
        if sample_weight_ptr is not None:
            v = tl.load(sample_weight_ptr + i, mask=m, other=0.0).to(tl.float64)
            mass += tl.sum(tl.where(member, v[None, :], 0.0), axis=1)
    if sample_weight_ptr is None:
        mass = n
    mean = total / tl.maximum(n, 1.0)
    m2 = tl.zeros((K,), tl.float64)
    for start in range(first, last, SAMPLES):
        i = start + tl.arange(0, SAMPLES)
        m = i < last
        member = tl.load(bin_ptr + i, mask=m, other=-1.0).to(tl.int32)[None, :] == k
        deviation = tl.load(base_loss_ptr + i, mask=m, other=0.0)[None, :] - mean[:, None]
        m2 += tl.sum(tl.where(member, deviation * deviation, 0.0), axis=1)
    return n, mean, m2, mass


@triton.jit
def chan_merge(n_a, mean_a, m2_a, mass_a, n_b, mean_b, m2_b, mass_b):
    """Chan's merge of two sets of moments. An empty side leaves the other's bits alone."""
    n = n_a + n_b
    share = tl.where(n > 0.0, n_b / tl.where(n > 0.0, n, 1.0), 0.0)
    delta = tl.where(n_b > 0.0, mean_b - mean_a, 0.0)
    return n, mean_a + delta * share, m2_a + m2_b + delta * delta * n_a * share, mass_a + mass_b


@triton.jit
def fold_and_weigh(
    n_b, mean_b, m2_b,
    mass_b,  # [K] float64 each: statistics of the batch
    skipped, loss, samples_b, below, above,  # scalars: totals of the batch
    state_ptr,  # [6*bins + 14] int64, in and out
    log_weights_ptr,  # [bins] float32, out
    a_ptr,  # [bins] float64, scratch
    n_ptr,  # [bins] float64, scratch
    half_life, width, strength, smoothing, log_clip, prior, radius, bins, STATISTIC: tl.constexpr,
    SMOOTH: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Step 3: forget, merge, store; then the weight table, steps 1 to 4 of `reference.weight_table`."""
    k = tl.arange(0, K)
    m_k = k < bins
    moments_ptr = state_ptr.to(tl.pointer_type(tl.float64), bitcast=True)
    n, mean, m2, mass = load_moments(moments_ptr, k, m_k, bins)
    entered = tl.sum(n_b)
    rho = tl.exp2(-entered / half_life / bins)
    move_totals(
        moments_ptr + 4 * bins + 2, n, mean, mass, n_b, mass_b, entered, skipped, loss, samples_b, below, above, rho,
        half_life, k, m_k, bins,
    )  # fmt: skip
    n, mean, m2, mass = chan_merge(n * rho, mean, m2 * rho, mass * rho, n_b, mean_b, m2_b, mass_b)
    kept = n >= EMPTY
    n = tl.where(kept, n, 0.0)
    mean = tl.where(kept, mean, 0.0)
    m2 = tl.where(kept, m2, 0.0)
    mass = tl.where(kept, mass, 0.0)
    tl.debug_barrier()  # with few bins several warps hold copies of a lane, and all have to have loaded
    store_moments(moments_ptr, n, mean, m2, mass, k, m_k, bins)
    o_skipped = 4 * bins
    tl.store(state_ptr + o_skipped, tl.load(state_ptr + o_skipped) + skipped.to(tl.int64))
    if STATISTIC != "":
        n_safe = tl.where(kept, n, 1.0)
        if STATISTIC == "std":
            s = tl.sqrt(m2 / tl.maximum(n_safe - 1.0, n_safe * 0.5))
        elif STATISTIC == "rms":
            s = tl.sqrt(mean * mean + m2 / n_safe)
        else:
            s = mean
        has_value = kept & (s > 1e-6 * tl.abs(mean))
        a = tl.where(has_value, -strength * tl.log(tl.where(has_value, s, 1.0)), 0.0)
        n = tl.where(has_value, n, 0.0)
        m_value = tl.where(has_value, mass, 0.0)
        mass_sum = tl.sum(m_value)
        share = tl.where(mass_sum > 0.0, m_value / tl.where(mass_sum > 0.0, mass_sum, 1.0), 0.0)
        if SMOOTH:
            tl.store(a_ptr + k, a, mask=m_k)
            tl.store(n_ptr + k, n, mask=m_k)
            tl.debug_barrier()  # lanes read each other's a and n
            a, n = smooth(a_ptr, n_ptr, width, smoothing, radius, bins, K)
        reached = n > 0.0
        a = tl.where(reached, a - tl.sum(share * a), 0.0)
        a = tl.minimum(tl.maximum(a, -log_clip), log_clip) * (n / (n + prior))
        a = tl.where(reached, a, 0.0)
        c = tl.sum(mass * mean) / tl.sum(mass * tl.exp(a) * mean)
        c = tl.where((c > 0.0) & is_finite(c), c, 1.0)
        tl.store(log_weights_ptr + k, (a + tl.log(c)).to(tl.float32), mask=m_k)


@triton.jit
def smooth(a_ptr, n_ptr, width, smoothing, radius, bins, K: tl.constexpr):
    """Local linear fit over taps within `radius` bins, in the centred form: means first, then moments about them."""
    k = tl.arange(0, K)
    one = tl.full((), 1.0, tl.float64)
    h = smoothing * one
    step = width * one
    total = tl.zeros((K,), tl.float64)
    d_mean = tl.zeros((K,), tl.float64)
    a_mean = tl.zeros((K,), tl.float64)
    lowest = tl.full((K,), float("inf"), tl.float64)
    highest = tl.full((K,), float("-inf"), tl.float64)
    for tap in range(-radius, radius + 1):
        m = (k + tap >= 0) & (k + tap < bins)
        a = tl.load(a_ptr + k + tap, mask=m, other=0.0)
        d = tap * step
        q = tl.load(n_ptr + k + tap, mask=m, other=0.0) * tl.exp(-(d * d) / (2.0 * h * h))
        total += q
        d_mean += q * d
        a_mean += q * a
        lowest = tl.where(q > 0.0, tl.minimum(lowest, a), lowest)
        highest = tl.where(q > 0.0, tl.maximum(highest, a), highest)
    reached = total > 0.0
    safe = tl.where(reached, total, 1.0)
    d_mean /= safe
    a_mean /= safe
    var = tl.zeros((K,), tl.float64)
    cov = tl.zeros((K,), tl.float64)
    for tap in range(-radius, radius + 1):
        m = (k + tap >= 0) & (k + tap < bins)
        a = tl.load(a_ptr + k + tap, mask=m, other=0.0)
        d = tap * step
        q = tl.load(n_ptr + k + tap, mask=m, other=0.0) * tl.exp(-(d * d) / (2.0 * h * h))
        var += q * (d - d_mean) * (d - d_mean)
        cov += q * (d - d_mean) * (a - a_mean)
    fit = a_mean - d_mean * (cov / safe) / (var / safe + 32.0 * h * h / safe)
    fit = tl.minimum(tl.maximum(fit, lowest), highest)
    return tl.where(reached, fit, 0.0), total


@triton.jit(do_not_specialize=["radius", "bins", "samples", "elements", "splits", "tile"])  # as in rows.py
def statistics_kernel(
    loss_ptr,  # [B] float32 per-sample losses, or the workspace: [B, splits] float64 sums
    log_snr_ptr,  # [B] float32
    base_weight_ptr,  # [B] float32 or None
    sample_weight_ptr,  # [B] float32 or None
    weight_ptr,  # [B] float32 or None
    log_weights_ptr,  # [bins] float32, in and (FOLD) out
    state_ptr,  # [6*bins + 14] int64, in and out (FOLD)
    workspace_ptr,  # float64, see above
    ell_ptr,  # [B] float32 or None, out
    factor_ptr,  # [B] float32, out: w*u*v
    slope_ptr,  # [B] float32 or None, out: w*v*ell
    masked_ptr,  # [B] float32 or None, out: 1 where masked
    out_ptr,  # [B] float32 or None, out: w*u*v*ell
    mean_ptr,  # scalar float32 or None, out: its mean, with one tile
    parts_ptr,  # [tiles, 4*bins + 5] float64 or None, out: batch statistics of each tile
    loss_parts_ptr,  # [tiles] float64 or None, out: sum of the weighted losses of each tile
    low, inv_width, half_life, width, strength, smoothing, log_clip, prior, radius, bins, samples, elements,
    splits, tile, STATISTIC: tl.constexpr, SMOOTH: tl.constexpr, FOLD: tl.constexpr,
    K: tl.constexpr, SETTLE: tl.constexpr, SPLITS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Per-sample results of one tile and its batch statistics; folds them too when the tile is the whole batch."""
    first = tl.program_id(0) * tile
    last = tl.minimum(first + tile, samples)
    base_loss_ptr = workspace_ptr + samples * splits
    bin_ptr = base_loss_ptr + samples
    a_ptr = bin_ptr + samples
    total, skipped, loss, below, above = classify_samples(
        loss_ptr, log_snr_ptr, base_weight_ptr, sample_weight_ptr, weight_ptr, log_weights_ptr, ell_ptr,
        factor_ptr, slope_ptr, masked_ptr, out_ptr,
        base_loss_ptr, bin_ptr, first, last, samples, elements, splits, low, inv_width, bins, SETTLE, SPLITS,
    )  # fmt: skip
    if loss_parts_ptr is not None:
        tl.store(loss_parts_ptr + tl.program_id(0), total)
    elif mean_ptr is not None:
        tl.store(mean_ptr, (total / samples).to(tl.float32))
    if FOLD or parts_ptr is not None:
        tl.debug_barrier()  # lanes read each other's base losses and bins
        samples_b = (last - first).to(tl.float64)
        n, mean, m2, mass = batch_statistics(base_loss_ptr, bin_ptr, sample_weight_ptr, first, last, K, SAMPLES)
        if parts_ptr is not None:
            part_ptr = parts_ptr + tl.program_id(0).to(tl.int64) * (4 * bins + 5)
            store_part(part_ptr, n, mean, m2, mass, skipped, loss, samples_b, below, above, bins, K)
        if FOLD:
            fold_and_weigh(
                n, mean, m2, mass, skipped, loss, samples_b, below, above, state_ptr, log_weights_ptr, a_ptr,
                a_ptr + bins, half_life, width, strength, smoothing, log_clip, prior, radius, bins, STATISTIC,
                SMOOTH, K,
            )  # fmt: skip


@triton.jit
def store_part(part_ptr, n, mean, m2, mass, skipped, loss, samples_b, below, above, bins, K: tl.constexpr):
    """Batch statistics as one float64 vector [4*bins + 5]."""
    k = tl.arange(0, K)
    m_k = k < bins
    store_moments(part_ptr, n, mean, m2, mass, k, m_k, bins)
    totals_ptr = part_ptr + 4 * bins
    tl.store(totals_ptr, skipped)
    tl.store(totals_ptr + 1, loss)
    tl.store(totals_ptr + 2, samples_b)
    tl.store(totals_ptr + 3, below)
    tl.store(totals_ptr + 4, above)


@triton.jit(do_not_specialize=["radius", "bins", "samples", "parts"])
def fold_kernel(
    parts_ptr,  # [parts, 4*bins + 5] float64 or None: batch statistics to merge, in order
    loss_parts_ptr,  # [parts] float64 or None
    mean_ptr,  # scalar float32 or None, out
    merged_ptr,  # [4*bins + 5] float64 or None, out
    state_ptr,  # [6*bins + 14] int64, in and out (FOLD)
    log_weights_ptr,  # [bins] float32, out (FOLD)
    workspace_ptr,  # [2*bins] float64, scratch (FOLD)
    parts, samples, half_life, width, strength, smoothing, log_clip, prior, radius, bins,
    STATISTIC: tl.constexpr, SMOOTH: tl.constexpr, FOLD: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of tiles or ranks in their order, then store or fold them. One program."""
    if loss_parts_ptr is not None:
        total = tl.full((), 0.0, tl.float64)
        for part in range(0, parts):
            total += tl.load(loss_parts_ptr + part)
        tl.store(mean_ptr, (total / samples).to(tl.float32))
    if parts_ptr is not None:
        k = tl.arange(0, K)
        m_k = k < bins
        n = tl.zeros((K,), tl.float64)
        mean = tl.zeros((K,), tl.float64)
        m2 = tl.zeros((K,), tl.float64)
        mass = tl.zeros((K,), tl.float64)
        skipped = tl.full((), 0.0, tl.float64)
        loss = tl.full((), 0.0, tl.float64)
        samples_b = tl.full((), 0.0, tl.float64)
        below = tl.full((), 0.0, tl.float64)
        above = tl.full((), 0.0, tl.float64)
        part_ptr = parts_ptr
        for _ in range(0, parts):
            n_b, mean_b, m2_b, mass_b = load_moments(part_ptr, k, m_k, bins)
            n, mean, m2, mass = chan_merge(n, mean, m2, mass, n_b, mean_b, m2_b, mass_b)
            skipped += tl.load(part_ptr + 4 * bins)
            loss += tl.load(part_ptr + 4 * bins + 1)
            samples_b += tl.load(part_ptr + 4 * bins + 2)
            below += tl.load(part_ptr + 4 * bins + 3)
            above += tl.load(part_ptr + 4 * bins + 4)
            part_ptr += 4 * bins + 5
        if merged_ptr is not None:
            store_part(merged_ptr, n, mean, m2, mass, skipped, loss, samples_b, below, above, bins, K)
        if FOLD:
            fold_and_weigh(
                n, mean, m2, mass, skipped, loss, samples_b, below, above, state_ptr, log_weights_ptr, workspace_ptr,
                workspace_ptr + bins, half_life, width, strength, smoothing, log_clip, prior, radius, bins,
                STATISTIC, SMOOTH, K,
            )  # fmt: skip
