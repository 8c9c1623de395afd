"""The optimal loss of a class-conditional network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .curve import OptimalLoss
from .estimators import Estimate, Progress, estimate_until
from .posterior import Devices


def estimate_given_class(
    data: Tensor,
    labels: Tensor,
    sigmas: Tensor | Sequence[float],
    limit: int = 16384,
    relative: float = 0.05,
    absolute: float = 1e-3,
    seed: int = 0,
    *,
    chunk: int = 4096,
    device: Devices = None,
    progress: Progress | None = None,
) -> OptimalLoss:
    """J* of a denoiser D(noisy, sigma, label): the mean over samples of the J* of their own class.

    It is below the J* of the whole data set, which bounds an unconditional network, because the class is information
    about x0. At high noise it rises to the variance within classes, given as `total_variance`. Each class is estimated
    from all its samples with the precision of `estimate_until`; the standard error of the mean over classes is smaller.
    A class of one sample contributes 0.

    Args:
        data: [N, ...] floating.
        labels: [N] int64, the class of each sample.
        progress: called for each class in turn.
        sigmas, limit, relative, absolute, seed, chunk, device: as in `estimate_until`, for each class.

    Returns:
        A curve with the number of classes in `classes`; `draws` is the sum over classes.

    Raises:
        TypeError: data is not a floating-point tensor.
        ValueError: labels are not [N], no class has two samples, or another argument is out of bounds.
    """
    if labels.shape != (len(data),):
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected ({len(data)},): one for each sample")
    kinds, sizes = labels.cpu().unique(return_counts=True)
    if not bool((sizes > 1).any()):
        raise ValueError("labels has no class of two samples, expected at least one: J* of a single sample is 0")
    flops = 0.0  # of the classes so far
    curves: list[tuple[float, OptimalLoss]] = []
    for kind, size in zip(kinds.tolist(), sizes.tolist(), strict=True):
        if size == 1:
            continue
        latest: list[Estimate] = []

        def of_all(so_far: Estimate, latest: list[Estimate] = latest, before: float = flops) -> None:
            latest[:] = [so_far._replace(flops=before + so_far.flops)]
            if progress is not None:
                progress(latest[0])

        part = data[(labels == kind).to(data.device)]
        curve = estimate_until(
            part, sigmas, limit, relative, absolute, seed=seed + kind, chunk=chunk, device=device, progress=of_all
        )
        flops = latest[0].flops
        curves.append((size / len(data), curve))
    shares = torch.tensor([share for share, _ in curves], dtype=torch.float64)[:, None]
    of_classes = [curve for _, curve in curves]
    return dataclasses.replace(
        of_classes[0],
        loss=(shares * torch.stack([curve.loss for curve in of_classes])).sum(0),
        stderr=(shares * torch.stack([curve.stderr for curve in of_classes])).square().sum(0).sqrt(),
        draws=torch.stack([curve.draws for curve in of_classes]).sum(0),
        total_variance=sum(share * curve.total_variance for share, curve in curves),
        samples=len(data),
        classes=len(kinds),
    )
