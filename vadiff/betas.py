"""The noise schedules of common trainers: beta of each timestep, from which ᾱ = cumprod(1 - beta)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LARGEST_BETA = 0.999  # of the cosine schedule, as its paper caps it


def linear(timesteps: int, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """Evenly spaced betas, [T] float64: DDPM (arXiv 2006.11239, section 4)."""
    return torch.linspace(first, last, timesteps, dtype=torch.float64, device="cpu")


def scaled_linear(timesteps: int, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """Betas with evenly spaced square roots, [T] float64: latent diffusion (arXiv 2112.10752), Stable Diffusion."""
    return linear(timesteps, math.sqrt(first), math.sqrt(last)).square()


def cosine(timesteps: int, s: float = 0.008) -> Tensor:
    """Betas of at most 0.999 of the cosine schedule, [T] float64: Improved DDPM (arXiv 2102.09672, eq. 17)."""
    at = torch.arange(timesteps + 1, dtype=torch.float64, device="cpu") / timesteps
    alphas_cumprod = cosine_alpha(at, s).square()
    return (1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=_LARGEST_BETA)


def cosine_alpha(t: Tensor, s: float) -> Tensor:
    """√ᾱ of the cosine schedule at times in [0, 1]: cos(θ)/cos(θ₀), θ = (t+s)/(1+s)·π/2, by sin(π/2 - θ).

    Any shape; float64.
    """
    remaining = (1.0 - t.double()) / (1.0 + s) * (math.pi / 2)  # π/2 - θ
    return remaining.sin() / math.cos(s / (1.0 + s) * (math.pi / 2))


def with_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """ᾱ [T] shifted and scaled so that its last entry is 0: Lin et al. (arXiv 2305.08891, algorithm 1)."""
    roots = alphas_cumprod.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()
