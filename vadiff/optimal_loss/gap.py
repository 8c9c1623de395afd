"""A model's gap: its loss minus the optimal loss (arXiv 2506.13763, section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._validation import require_count
from .curve import OptimalLoss, checked_sigmas

Denoise = Callable[..., Tensor]
"""D(noisy [B, ...], sigma [B]) → estimate of x0 [B, ...]; called with labels [B] as third argument if given."""


class ModelGap(NamedTuple):
    """A model's x0 loss, the optimal loss and their difference, as a mean over elements; each [T] float64."""

    sigma: Tensor
    loss: Tensor
    optimal: Tensor  # J*/D
    gap: Tensor  # loss - J*/D, the reducible part; below 0 only by chance, or if the model was trained on other data
    stderr: Tensor  # of the gap, from images, noise and J*; NaN with a single image
    per_image: Tensor | None = None  # [T, N], of `direct_gap` only: the gap of each image


class Measured(NamedTuple):
    """What a model is measured on."""

    images: Tensor  # [N, ...]
    labels: Tensor | None  # [N], passed to the model
    levels: Tensor  # [T] float64
    draws: int  # of noise per image
    batch_size: int
    seed: int  # of the noise
    device: torch.device | str  # where the model runs


class Batch(NamedTuple):
    """Some images at one noise level, and the model's estimates of them."""

    rows: slice  # of the images
    clean: Tensor  # [B, ...]
    noisy: Tensor  # [B, ...]
    sigma: float
    denoised: Tensor  # [B, ...]


@torch.no_grad()
def model_gap(
    denoise: Denoise,
    images: Tensor,
    optimal: OptimalLoss,
    *,
    labels: Tensor | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    draws: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ModelGap:
    """A model's loss, the optimal loss and the gap at each noise level.

    The images must be of the split and augmentation from which `optimal` was estimated: J* bounds the loss on the
    training set. It does not bound the loss on held-out images; report that loss without a gap. Use the averaged
    weights with which samples are drawn; a module is put in eval mode during the call.

    Args:
        denoise: D(noisy, sigma) or D(noisy, sigma, labels) → estimate of x0.
        images: [N, ...] floating, as the network sees them.
        optimal: J* of their data set, from `estimate`, or with labels from `estimate_given_class`.
        labels: [N], passed to `denoise`.
        sigmas: noise levels; those of `optimal` by default.
        draws: noise draws per image, the same for every model and level.
        batch_size: images at a time.
        seed: of the noise.
        device: where `denoise` runs.

    Raises:
        TypeError: images is not a floating-point tensor.
        ValueError: images of another size than those of J*; labels of another length; labels with an unconditional J*,
            or no labels with a class-conditional J*; `denoise` returned another shape; a number out of bounds.
    """
    levels = optimal.sigma if sigmas is None else torch.as_tensor(sigmas, dtype=torch.float64)
    measured = Measured(images, labels, levels, draws, batch_size, seed, device)
    check_measured(measured)
    elements = images[0].numel()
    if elements != optimal.elements:
        raise ValueError(
            f"images have {elements} elements, expected {optimal.elements}: the optimal loss is of another data set"
        )
    if (labels is None) == (optimal.classes > 0):
        kind = "a class-conditional" if optimal.classes else "an unconditional"
        raise ValueError(
            f"labels is {'None' if labels is None else 'given'}, but the optimal loss is of {kind} denoiser: "
            f"take it from {'estimate_given_class' if labels is not None else 'estimate'}"
        )

    def error(batch: Batch) -> Tensor:
        return (batch.denoised - batch.clean).square().flatten(1).mean(1)[None]

    loss, variance = mean_and_its_variance(scores(denoise, measured, error)[0])
    best = optimal.log_loss_at(-2.0 * levels.log()).exp() if sigmas is not None else optimal.loss / elements
    # Between levels of the curve, use the standard error of the nearest.
    nearest = (levels.log()[:, None] - optimal.sigma.log()).abs().argmin(1)
    stderr = (variance + (optimal.stderr[nearest] / elements).square()).sqrt()
    return ModelGap(levels, loss, best, loss - best, stderr)


def check_measured(measured: Measured) -> None:
    """Raise as `model_gap` unless images, labels, noise levels and numbers fit each other."""
    images, labels, levels, draws, batch_size, *_ = measured
    if not images.is_floating_point():
        raise TypeError(f"images has dtype {images.dtype}, expected floating point: images as the network sees them")
    if images.dim() < 2 or len(images) == 0:
        raise ValueError(f"images has shape {tuple(images.shape)}, expected (N, ...) with at least one image")
    for name, number in (("draws", draws), ("batch_size", batch_size)):
        require_count(name, number, 1)
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"labels has length {len(labels)}, expected {len(images)}: one for each image")
    checked_sigmas(levels)


def scores(denoise: Denoise, measured: Measured, score: Callable[[Batch], Tensor]) -> Tensor:
    """The scores [k, B] of every batch and level, as a mean over the draws of noise. [k, T, N] float64 on the CPU."""
    images, labels, levels, draws, batch_size, seed, device = measured
    generator = torch.Generator().manual_seed(seed)
    of_batches = []
    with _evaluating(denoise):
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            clean = images[rows].to(device)
            given = () if labels is None else (labels[rows].to(device),)
            of_draws = []
            for _ in range(draws):
                noise = torch.randn(clean.shape, generator=generator).to(device)
                of_levels = []
                for sigma in levels.tolist():
                    noisy = clean + sigma * noise
                    denoised = denoise(noisy, torch.full((len(clean),), sigma, device=device), *given)
                    if denoised.shape != clean.shape:
                        raise ValueError(
                            f"denoise returned shape {tuple(denoised.shape)}, expected {tuple(clean.shape)}: an "
                            "estimate of each image"
                        )
                    of_levels.append(score(Batch(rows, clean, noisy, sigma, denoised)).double().cpu())
                of_draws.append(torch.stack(of_levels, 1))
            of_batches.append(torch.stack(of_draws).mean(0))
    return torch.cat(of_batches, 2)


def mean_and_its_variance(per_image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the images, and the variance of that mean; NaN with a single image. [T, N] → [T], [T]."""
    size = per_image.shape[1]
    return per_image.mean(1), per_image.var(1) / size if size > 1 else torch.full_like(per_image[:, 0], math.nan)


@contextmanager
def _evaluating(denoise: Denoise) -> Iterator[None]:
    """Put a module in eval mode, and afterwards back in its previous mode."""
    training = isinstance(denoise, nn.Module) and denoise.training
    if isinstance(denoise, nn.Module):
        denoise.eval()
    try:
        yield
    finally:
        if isinstance(denoise, nn.Module):
            denoise.train(training)
