"""EDM's loss on images never trained on, one noise level at a time, with the same noise for every run."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..models import Denoiser
from ..process import loss_ratio

LOG_SNR_LEVELS = (-4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0, 10.0)


class HeldOutLoss(NamedTuple):
    """EDM's loss λ(σ)·mean((D - x0)²) per noise level and image, averaged over draws of noise."""

    log_snr: Tensor  # [L] float32
    per_image: Tensor  # [L, N] float32, on the CPU

    @property
    def mean(self) -> Tensor:
        """Over images, [L]."""
        return self.per_image.mean(1)

    def ratio_to(self, other: "HeldOutLoss") -> tuple[Tensor, Tensor]:
        """How many times `other`'s mean loss this one has, and the standard error of that, each [L].

        The images and the noise are the same, so the error is that of the paired difference.
        """
        ratio = self.mean / other.mean
        difference = self.per_image - ratio[:, None] * other.per_image
        return ratio, difference.std(1) / math.sqrt(difference.shape[1]) / other.mean


@torch.no_grad()
def held_out_loss(
    denoiser: Denoiser,
    images: Tensor,
    *,
    log_snr_levels: tuple[float, ...] = LOG_SNR_LEVELS,
    draws: int = 2,
    seed: int = 0,
) -> HeldOutLoss:
    """EDM's loss of a denoiser on images, [N, C, H, W], with `draws` fixed noises per image and level."""
    device = next(denoiser.parameters()).device
    noise = torch.randn(draws, *images.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    clean = images.to(device)
    levels = torch.tensor(log_snr_levels)
    weights = loss_ratio("edm", levels, sigma_data=denoiser.sigma_data)
    rows = []
    for level, weight in zip(log_snr_levels, weights.tolist(), strict=True):
        sigma = torch.full((len(images),), math.exp(-0.5 * level), device=device)
        errors = [denoiser(clean + sigma[0] * eps, sigma) - clean for eps in noise]
        rows.append(weight * torch.stack(errors).square().flatten(2).mean((0, 2)))
    return HeldOutLoss(levels, torch.stack(rows).float().cpu())
