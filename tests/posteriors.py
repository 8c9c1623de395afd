"""Draws, and their posterior mean by brute force."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(data: Tensor, size: int, seed: int, sigma: float | Tensor, alpha: float = 1.0):
    """(rows, x0, x_t) of `size` draws."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(data), (size,), generator=generator)
    x0 = data[rows]
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    return rows, x0, alpha * x0 + sigma * noise


def brute_force(data: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The posterior mean over all of the data, in float64."""
    flat, x = data.flatten(1).double(), noisy.flatten(1).double()
    distances = (x[:, None] - alpha.double()[:, None, None] * flat).square().sum(2)
    return torch.softmax(-distances / (2 * sigma.double().square()[:, None]), 1) @ flat
