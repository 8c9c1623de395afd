"""Drawing samples from a trained denoiser: EDM's deterministic second-order sampler."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["heun", "noise_levels"]


def noise_levels(steps: int = 18, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Noise levels from sigma_max down to sigma_min, then 0.

    sigma_i = (sigma_max^(1/ρ) + i/(N-1)·(sigma_min^(1/ρ) - sigma_max^(1/ρ)))^ρ for i < N, and sigma_N = 0.
    Source: EDM (arXiv 2206.00364), eq. 5.

    Args:
        steps: N, at least 2.
        sigma_min: lowest level before 0, > 0.
        sigma_max: highest level.
        rho: how much the steps shorten towards low noise.

    Returns:
        [N + 1] float64, falling.

    Raises:
        ValueError: fewer than 2 steps, or not 0 < sigma_min < sigma_max.
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}, expected at least 2.")
    if not 0.0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min is {sigma_min} and sigma_max {sigma_max}, expected 0 < sigma_min < sigma_max.")
    roots = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps, dtype=torch.float64)
    return torch.cat([roots**rho, roots.new_zeros(1)])


@torch.no_grad()
def heun(
    denoise: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
    seeds: Sequence[int],
    *,
    levels: Tensor | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw one sample per seed by Heun's method on dx/dσ = (x - D(x; σ)) / σ, from pure noise to σ = 0.

    Each image starts from a noise of its own seed, drawn on the CPU: which image a seed gives does not depend
    on the batch size, on the other seeds or on the device (to rounding). The state is kept in float64.
    Source: EDM (arXiv 2206.00364), algorithm 1.

    Args:
        denoise: D(x, sigma) → estimate of x0; x [B, *shape] float32, sigma [B] float32. A module is used in
            the mode it is in; call `.eval()` first if it has dropout.
        shape: shape of one sample, as (1, 8, 8).
        seeds: one per sample.
        levels: [N + 1] falling noise levels that end in 0; `noise_levels()` by default, 2·18 - 1 evaluations.
        batch_size: samples at a time.
        device: where `denoise` runs.

    Returns:
        [len(seeds), *shape] float32, on the CPU, not clipped.
    """
    levels = noise_levels() if levels is None else levels.double()
    batches = [
        _heun_batch(denoise, shape, seeds[start : start + batch_size], levels.tolist(), torch.device(device))
        for start in range(0, len(seeds), batch_size)
    ]
    return torch.cat(batches) if batches else torch.empty(0, *shape)


def _heun_batch(
    denoise: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
    seeds: Sequence[int],
    levels: list[float],
    device: torch.device,
) -> Tensor:
    def slope(x: Tensor, sigma: float) -> Tensor:
        sigmas = torch.full((len(x),), sigma, dtype=torch.float32, device=device)
        return (x - denoise(x.float(), sigmas).double()) / sigma

    noise = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    x = torch.stack(noise).to(device).double() * levels[0]
    for now, following in pairwise(levels):
        here = slope(x, now)
        x = x + (following - now) * here  # Euler's step
        if following > 0.0:  # at σ = 0 the slope is 0/0, and Euler's step has gone straight to D
            x = x + (following - now) * 0.5 * (slope(x, following) - here)
    return x.float().cpu()
