"""The gap of a run's loss to the optimal loss, by subtraction or directly."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...optimal_loss import ModelGap, OptimalLoss, direct_gap, model_gap
from ..data import Images, inputs_of_rows
from .optimal_curve import check_curve, training_set
from .run import Run


def gap_of_run(
    run: Run,
    optimal: OptimalLoss,
    *,
    images: Images | None = None,
    number: int = 1000,
    weights: str = "ema",
    step: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ModelGap:
    """Loss, J* and gap of a run's denoiser on images it was trained on, at the noise levels of `optimal`.

    A class-conditional network gets the classes, and needs a class-conditional `optimal`. Images and noise are the same
    for every run.

    Args:
        run: the run.
        optimal: J* of its training images, see `optimal_curve.estimate_curve`.
        images: its data set, if already loaded.
        number: of training images, including mirrored ones if the run flips and its network is not told.
        weights, step: of the denoiser, see `Run.denoiser`.
        seed: of the choice of images, and of the noise.
        device: where to compute.

    Raises:
        UserError: the checkpoint or the data set is missing or corrupt, or `optimal` belongs to other images.
    """
    images = run.images() if images is None else images
    check_curve(optimal, run.config, images)
    size = len(images.train)
    chosen = _chosen(size * (2 if run.config.mirrored_data else 1), number, seed)
    mirrored, rows = chosen >= size, chosen % size
    clean = inputs_of_rows(images.encoding, images.train, rows)
    clean[mirrored] = clean[mirrored].flip(-1)
    labels = images.train_labels if run.config.class_conditional else None
    return model_gap(
        run.denoiser(weights, step, device),
        clean,
        optimal,
        labels=None if labels is None else labels[rows],
        seed=seed,
        device=device,
    )


def direct_gap_of_run(
    run: Run,
    sigmas: Tensor | Sequence[float],
    *,
    images: Images | None = None,
    number: int = 1000,
    weights: str = "ema",
    step: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ModelGap:
    """`gap_of_run` without a curve: the distance to the posterior mean of all training images.

    On the images and noise of `gap_of_run`. The data set has to fit the device, as float32.

    Args:
        sigmas: [T] noise levels.
        run, images, number, weights, step, seed, device: as for `gap_of_run`.

    Raises:
        UserError: the checkpoint or the data set is missing or corrupt.
    """
    images = run.images() if images is None else images
    config = run.config
    data, labels = training_set(images, flips=config.mirrored_data, class_conditional=config.class_conditional)
    return direct_gap(
        run.denoiser(weights, step, device),
        data,
        sigmas,
        rows=_chosen(len(data), number, seed),
        labels=labels,
        seed=seed,
        device=device,
    )


def _chosen(images: int, number: int, seed: int) -> Tensor:
    """The images that a gap is measured on. [number] int64"""
    return torch.randperm(images, generator=torch.Generator().manual_seed(seed))[:number]
