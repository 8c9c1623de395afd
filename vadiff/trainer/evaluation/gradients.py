"""Gradients per noise level: do their directions conflict, and does the weighting balance their sizes?

The diagnosis behind Min-SNR (arXiv 2303.09556, section 3.1), measured instead of assumed.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...models import Denoiser
from ...process import loss_ratio


class LevelGradients(NamedTuple):
    """Scalar products of the gradients of the mean base loss at L noise levels; float64 on the CPU."""

    log_snr: Tensor  # [L]
    products: Tensor  # [L, L] estimates of g_i·g_j without the bias of noisy gradients
    weight: Tensor  # [L] the run's weight w at each level
    share: Tensor  # [L] the level's share p of the mass (samples times sample weights), summing to 1

    @property
    def norm(self) -> Tensor:
        """|g| per level, [L]; NaN where too few images leave a negative estimate of |g|²."""
        squared = self.products.diagonal()
        return squared.where(squared > 0, math.nan).sqrt()

    @property
    def cosine(self) -> Tensor:
        """Cosine between the gradients of two levels, [L, L]. A positive weight on either does not change it."""
        norm = self.norm
        cosine = self.products / (norm[:, None] * norm)
        return cosine.where(~torch.eye(len(norm), dtype=torch.bool), torch.where(norm.isnan(), math.nan, 1.0))

    def step_share(self, *, weighted: bool) -> Tensor:
        """Share of each level in a training step: p·w·|g| (p·|g| unweighted) ÷ its sum over levels. [L]"""
        size = self._factors(weighted) * self.norm
        return size / size.nansum()

    def cosine_to_step(self, *, weighted: bool) -> Tensor:
        """Cosine between each level's gradient and the expected training step Σ p·w·g (Σ p·g unweighted). [L]"""
        factors = self._factors(weighted)
        with_step = self.products @ factors
        squared = factors @ with_step
        return with_step / (self.norm * (squared.sqrt() if squared > 0 else math.nan))

    def _factors(self, weighted: bool) -> Tensor:
        return self.share * self.weight if weighted else self.share


def level_gradients(
    denoiser: Denoiser,
    images: Tensor,
    labels: Tensor | None,
    log_snr: Tensor,
    weight: Tensor,
    share: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 128,
) -> LevelGradients:
    """Gradient of the mean base loss with respect to all weights of a denoiser, at each noise level.

    Two halves of the images, each with its own noise, give two gradients a_i, b_i per level. The products across the
    halves, (a_i·b_j + b_i·a_j)/2, estimate g_i·g_j without the bias of a gradient's squared norm by its own noise,
    which at few images is most of the norm.

    Args:
        denoiser: in eval mode; its parameters must require gradients.
        images: x0 [N, C, H, W] float32, as the network sees images, N at least 2.
        labels: [N] int64, or None.
        log_snr: [L] noise levels.
        weight: [L] the run's weight at these levels.
        share: [L] mass at these levels: training samples times their sample weights; only the proportions count.
        seed: of the noise.
        batch_size: images at a time; changes the result by rounding only.

    Returns:
        The scalar products, with levels, weights and shares. Memory: 2·L times the denoiser's parameters.

    Raises:
        ValueError: fewer than 2 images, or no training sample at any of the levels.
    """
    if len(images) < 2:
        raise ValueError(f"images has {len(images)}, expected at least 2: two halves are compared")
    if not share.sum() > 0:
        raise ValueError("share is zero at every level: none of these noise levels was trained on")
    parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    device = parameters[0].device
    half = len(images) // 2
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))  # the same at every level

    def gradient(level: float, places: range) -> Tensor:
        """Gradient of the mean base loss of the images at `places`, [P]."""
        base_weight = loss_ratio(denoiser.prediction, torch.tensor(level), sigma_data=denoiser.sigma_data).item()
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for start in range(places.start, places.stop, batch_size):
            part = slice(start, min(start + batch_size, places.stop))
            x0 = images[part].to(device)
            classes = None if labels is None or not denoiser.labels else labels[part].to(device)
            sigma = torch.full((len(x0),), math.exp(-0.5 * level), device=device)
            error = denoiser(x0 + sigma[0] * noise[part].to(device), sigma, classes) - x0
            loss = base_weight * error.square().flatten(1).mean(1).sum() / len(places)
            for mean, found in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if found is not None:
                    mean += found
        return torch.cat([mean.flatten() for mean in total])

    halves = [
        torch.stack([gradient(level, places) for level in log_snr.tolist()])  # [L, P]
        for places in (range(half), range(half, 2 * half))
    ]
    across = _products(*halves)
    return LevelGradients(
        log_snr.double().cpu(),
        (across + across.T) / 2,
        weight.double().cpu(),
        share.double().cpu() / share.double().sum().cpu(),
    )


def _products(one: Tensor, other: Tensor) -> Tensor:
    """one @ other.T, [L, L] float64 on the CPU, summed in float64 piece by piece: [L, P] in float64 would not fit."""
    total = one.new_zeros(len(one), len(other), dtype=torch.float64)
    for left, right in zip(one.split(1 << 20, dim=1), other.split(1 << 20, dim=1), strict=True):
        total += left.double() @ right.double().T
    return total.cpu()
