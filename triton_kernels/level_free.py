"""The level-free loss and the counts outside the range: what of a state belongs to no bin."""

import triton
import triton.language as tl

YOUNG = tl.constexpr(32.0)  # as in ops/level_free.py
SHORT = tl.constexpr(8.0)
DECAY = tl.constexpr(0.9)
SPIKE = tl.constexpr(10.0)
CREDIBLE = tl.constexpr(3.0)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def move_totals(
    totals_ptr,  # [12 + 2*bins] float64, in and out: `StateTotals`; then shares and mean v of a level sampler
    n, mean, mass,  # [K] float64: of the state before the batch
    n_b, mass_b,  # [K] float64: of the batch
    entered,  # scalar: the sum of n_b
    skipped, loss, samples_b, below, above,  # scalars: totals of the batch
    rho, half_life, k, m_k, bins,
):  # fmt: skip
    """`ops/level_free.py`, and the forgetting of the counts outside the range."""
    share = tl.load(totals_ptr + 12 + k, mask=m_k, other=0.0)
    weight = tl.load(totals_ptr + 12 + bins + k, mask=m_k, other=0.0)
    below += tl.load(totals_ptr) * rho
    above += tl.load(totals_ptr + 1) * rho
    level_free = tl.load(totals_ptr + 2)
    samples_b += tl.load(totals_ptr + 3)
    covariance = tl.load(totals_ptr + 4)
    variance = tl.load(totals_ptr + 5)
    size = tl.load(totals_ptr + 6)
    recorded = tl.load(totals_ptr + 7)
    old_mass = tl.load(totals_ptr + 8)
    old_sampled = tl.load(totals_ptr + 9)
    since_shares = tl.load(totals_ptr + 10)

    count = tl.sum(n)
    mass_sum = tl.sum(mass)
    loss_sum = tl.sum(mass * mean)
    filled = tl.where(n > 0.0, mean, tl.where(mass_sum > 0.0, loss_sum / mass_sum, 0.0))
    drawn = tl.sum(mass_b * filled)
    given = tl.sum(share) > 0.0
    factor = tl.where((old_mass > 0.0) & (old_sampled > 0.0), old_mass / old_sampled, 1.0)
    followed = given & (since_shares < half_life * bins)
    expected = tl.where(followed, factor * tl.sum(share * weight * filled), loss_sum / count)
    scale = tl.where(variance > 0.0, covariance / variance, 1.0)
    scale = tl.minimum(tl.maximum(scale, 0.0), 2.0)
    known = (half_life >= SHORT) & (count > tl.minimum(half_life, YOUNG) * bins)
    known = known & (recorded * scale * tl.abs(expected) <= size * CREDIBLE)
    level_free += loss + tl.where(known, scale * (entered * expected - drawn), 0.0)
    spike = tl.abs(loss) > tl.abs(drawn) * SPIKE  # the constant last: the interpreter multiplies wrongly otherwise
    scales = (skipped == 0.0) & is_finite(loss) & (spike == 0) & (count > 0.0)
    covariance = tl.where(scales, covariance * DECAY + loss * drawn, covariance)
    variance = tl.where(scales, variance * DECAY + drawn * drawn, variance)
    size = tl.where(scales, size * DECAY + tl.abs(loss), size)
    recorded = tl.where(scales, recorded * DECAY + entered, recorded)
    tl.debug_barrier()  # all warps have to have loaded
    tl.store(totals_ptr, below)
    tl.store(totals_ptr + 1, above)
    tl.store(totals_ptr + 2, level_free)
    tl.store(totals_ptr + 3, samples_b)
    tl.store(totals_ptr + 4, covariance)
    tl.store(totals_ptr + 5, variance)
    tl.store(totals_ptr + 6, size)
    tl.store(totals_ptr + 7, recorded)
    tl.store(totals_ptr + 8, tl.where(given, old_mass * DECAY + tl.sum(mass_b), 0.0))
    tl.store(totals_ptr + 9, tl.where(given, old_sampled * DECAY + tl.sum(n_b * weight), 0.0))
    tl.store(totals_ptr + 10, since_shares + entered)
