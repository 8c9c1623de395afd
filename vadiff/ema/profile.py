"""Power-function profiles of averages, and the combination of stored averages that gives another profile.

An average at time t gives the weights of time τ the weight p(τ) = (γ+1)·τ^γ / t^(γ+1) on (0, t], whose width grows
with training instead of being fixed. σ_rel is the standard deviation of p relative to t.
Source: EDM2 (arXiv 2312.02696); equation numbers refer to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_HIGHEST_SIGMA_REL = 12**-0.5  # of γ = 0: all weights since the start count alike


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The exponent γ of a relative width: the largest root of γ³ + 7γ² + (16 - σ⁻²)γ + (12 - σ⁻²) = 0 (eq. 126).

    0.05 gives 16.97, 0.10 gives 6.94, 0.25 gives 0.72.

    Raises:
        ValueError: not 0 < sigma_rel < 12^-1/2 = 0.2887.
    """
    if not 0.0 < sigma_rel < _HIGHEST_SIGMA_REL:
        raise ValueError(
            f"sigma_rel is {sigma_rel}, expected above 0 and below 12^-1/2 = {_HIGHEST_SIGMA_REL:.4f}, "
            "where all weights since the start count alike"
        )
    inverse = sigma_rel**-2
    # All roots are real: the cubic is positive at -1 and negative at 0.
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def sigma_rel_from_gamma(gamma: float) -> float:
    """The relative width of an exponent, √((γ+1) / ((γ+2)²(γ+3))) (eq. 123).

    Raises:
        ValueError: gamma is negative or not finite.
    """
    _check_gammas(gamma)
    return math.sqrt((gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0)))


def decay(gamma: float, time: float, delta: float) -> float:
    """β = (1 - Δ/t)^(γ+1) of average ← β·average + (1 - β)·weights (eq. 127).

    The weight of each update in the average is then the integral of the power function since the previous update, for
    any intervals. The first update, delta = time, has β = 0, so the initial value of the average has no effect.

    Args:
        gamma: exponent, at least 0.
        time: at the update, in images or steps since the start of training.
        delta: time since the previous update, or since the start.

    Raises:
        ValueError: a negative gamma, or not 0 < delta <= time.
    """
    _check_gammas(gamma)
    if not 0.0 < delta <= time < math.inf:
        raise ValueError(f"delta is {delta} and time {time}, expected 0 < delta <= time: both count from the start")
    return float((1.0 - delta / time) ** (gamma + 1.0))


def reconstruction_coefficients(
    times: Sequence[float], gammas: Sequence[float], target_time: float, target_gamma: float
) -> Tensor:
    """Coefficients x_i with which Σ x_i·average_i has the profile closest to a power function.

    Minimises ∫(Σ x_i p_i - p)² over the x that sum to 1. (The paper divides by the sum afterwards, which is
    slightly off the minimum.) A stored average with exactly the target time and gamma is returned unchanged.

    Args:
        times: when each average was stored, [n].
        gammas: exponent of each, [n].
        target_time: end of the target profile. None of `times` may be later, and one should be equal: weights after
            the last of `times` are in no average.
        target_gamma: exponent of the target profile.

    Returns:
        x, [n] float64 on the CPU, summing to 1.

    Raises:
        ValueError: different lengths, no average, a time after the target time, or a repeated average.
    """
    if len(times) != len(gammas) or not len(times):
        raise ValueError(f"times has {len(times)} values and gammas {len(gammas)}, expected equally many, at least one")
    _check_gammas(*gammas, target_gamma)
    if not all(0.0 < time <= target_time < math.inf for time in times):
        raise ValueError(
            f"times are {min(times)} to {max(times)}, expected above 0 and up to target_time = {target_time}: "
            "leave out what was stored later"
        )
    if len(set(zip(times, gammas, strict=True))) < len(times):
        raise ValueError("the same time and gamma occur twice, expected each stored average once")
    # In units of the target time and of each profile's norm, which conditions the solution best.
    t, g = torch.tensor([*times, target_time], dtype=torch.float64), torch.tensor([*gammas, target_gamma]).double()
    t = t / t[-1]
    products = _inner_products(t, g)  # [n + 1, n + 1]
    norms = products.diagonal().sqrt()
    products = products / torch.outer(norms, norms)
    matrix, target, ones = products[:-1, :-1], products[:-1, -1], 1.0 / norms[:-1]
    # x = A⁻¹(b + μ·1) with the μ that makes the x sum to 1; all in scaled unknowns y = x·norm.
    free, shift = torch.linalg.solve(matrix, torch.stack([target * norms[-1], ones], 1)).unbind(1)
    scaled = free + shift * (1.0 - ones @ free) / (ones @ shift)
    return scaled / norms[:-1]


def _inner_products(times: Tensor, gammas: Tensor) -> Tensor:
    """⟨p_a, p_b⟩ = (γ_a+1)(γ_b+1)·(t_a/t_b)^γ_b / ((γ_a+γ_b+1)·t_b) for t_a <= t_b (eq. 151), [n, n]."""
    early = torch.minimum(times[:, None], times)
    late = torch.maximum(times[:, None], times)
    late_gamma = torch.where(times[:, None] >= times, gammas[:, None], gammas)
    ones = gammas + 1.0
    return torch.outer(ones, ones) * (early / late) ** late_gamma / ((gammas[:, None] + ones) * late)


def _check_gammas(*gammas: float) -> None:
    for gamma in gammas:
        if not 0.0 <= gamma < math.inf:
            raise ValueError(f"gamma is {gamma}, expected at least 0 and finite; see gamma_from_sigma_rel")
