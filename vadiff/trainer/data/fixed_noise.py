"""Noise of a seed for many images, the same for each of them however many there are."""

import torch
from torch import Tensor


def fixed_noise(shape: torch.Size, seed: int) -> Tensor:
    """N(0, 1) [n, ...] float32 on the CPU, whose first images do not depend on n."""
    size = shape.numel()
    rounded = -(-size // 16) * 16  # torch draws 16 numbers at a time, and an incomplete 16 differently
    return torch.randn(rounded, generator=torch.Generator().manual_seed(seed))[:size].view(shape)
