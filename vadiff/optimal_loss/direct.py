"""A model's gap as its distance to the ideal denoiser, which on a finite data set can be computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._validation import require_count
from ..targets.posterior import Draws, References, posterior
from .gap import Batch, Denoise, Measured, ModelGap, check_measured, mean_and_its_variance, scores


@torch.no_grad()
def direct_gap(
    denoise: Denoise,
    data: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    rows: Tensor | None = None,
    labels: Tensor | None = None,
    draws: int = 1,
    batch_size: int = 256,
    chunk: int = 4096,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ModelGap:
    """A model's gap at each noise level, of each image: mean((D(x_t) - E[x0 | x_t])²), without an estimate of J*.

    The posterior mean over the whole data set is the ideal denoiser, and the error of D splits into what D can still
    learn and the posterior variance:

        E|D(x_t) - x0|² = E|D(x_t) - E[x0 | x_t]|² + E tr Cov[x0 | x_t]        (gap + J*; arXiv 2506.13763, theorem 1)

    `model_gap` subtracts two estimates, with the noise of x0 in one and of J* in the other. Here neither is left, and
    the gap cannot be negative. A level costs two matrix products of the noisy images and the data set,
    4·draws·n·N·D operations, beside the model's forward. For data sets that fit the device.

    Args:
        denoise: D(noisy, sigma) or D(noisy, sigma, labels) → estimate of x0. A module is put in eval mode.
        data: [N, ...] floating, all the training samples, as the network sees them; with flips, the mirrored ones too.
        sigmas: [T] noise levels.
        rows: [n] int64, the samples to measure on; None: all.
        labels: [N] int64 classes of the data, for a class-conditional `denoise`: the posterior is that of the class.
        draws: noise draws per sample, the same for every model and level.
        batch_size: samples at a time.
        chunk: data rows per matrix product, which bounds the memory.
        seed: of the noise.
        device: where `denoise` runs and the data is put.

    Returns:
        The gap, and each image's in `per_image`; `optimal` is the mean posterior variance of the draws, an estimate of
        J*/D, and `loss` their sum: the expectation of the model's loss on these noisy samples.

    Raises:
        TypeError: data is not a floating-point tensor.
        ValueError: fewer than two samples; rows or labels of another kind; `denoise` returned another shape; a number
            out of bounds.

    Example:
        >>> images = torch.randn(500, 1, 4, 4)
        >>> gap = vadiff.optimal_loss.direct_gap(lambda noisy, sigma: 0.5 * noisy, images, [0.5, 1.0, 2.0])
        >>> gap.gap, gap.per_image  # [T], [T, N]
        (...)
    """
    require_count("chunk", chunk, 1)
    _check_data(data, rows, labels)
    rows = torch.arange(len(data)) if rows is None else rows.cpu()
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    classes = None if labels is None else labels[rows.to(labels.device)]
    measured = Measured(data[rows.to(data.device)], classes, levels, draws, batch_size, seed, device)
    check_measured(measured)
    keys = torch.arange(len(data), device=device)
    everything = torch.ones(len(data), dtype=torch.bool, device=device)
    references = References(data.to(device), keys, None if labels is None else labels.to(device), everything)
    dtype = torch.float64 if data.dtype is torch.float64 else torch.float32

    def gap_and_variance(batch: Batch) -> Tensor:
        clean, noisy = batch.clean.flatten(1).to(dtype), batch.noisy.flatten(1).to(dtype)
        sigma = torch.full((len(clean),), batch.sigma, dtype=dtype, device=clean.device)
        own = None if classes is None else classes[batch.rows].to(device)
        where = rows[batch.rows].to(device)
        found = posterior(Draws(clean, noisy, torch.ones_like(sigma), sigma, where, own, None), [references], chunk)
        gap = (batch.denoised.flatten(1).to(dtype) - found.mean).square().mean(1)
        return torch.stack([gap, found.variance])

    per_image, optimal = scores(denoise, measured, gap_and_variance)
    gap, variance = mean_and_its_variance(per_image)
    best = optimal.mean(1)
    return ModelGap(levels, gap + best, best, gap, variance.sqrt(), per_image)


def _check_data(data: Tensor, rows: Tensor | None, labels: Tensor | None) -> None:
    if not data.is_floating_point():
        raise TypeError(f"data has dtype {data.dtype}, expected floating point: samples as the network sees them")
    if data.dim() < 2 or len(data) < 2:
        raise ValueError(f"data has shape {tuple(data.shape)}, expected (N, ...) with at least two samples")
    if rows is not None:
        if rows.dim() != 1 or rows.dtype is not torch.int64 or len(rows) == 0:
            raise ValueError(f"rows is {tuple(rows.shape)} {rows.dtype}, expected int64 (n,): numbers of samples")
        if int(rows.min()) < 0 or int(rows.max()) >= len(data):
            raise ValueError(
                f"rows has numbers from {int(rows.min())} to {int(rows.max())}, expected 0 to {len(data) - 1}"
            )
    if labels is not None and (labels.shape != (len(data),) or labels.dtype is not torch.int64):
        raise ValueError(f"labels is {tuple(labels.shape)} {labels.dtype}, expected int64 ({len(data)},): classes")
