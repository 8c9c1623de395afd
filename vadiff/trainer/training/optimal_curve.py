"""The optimal loss that a run is trained with: read from a file or estimated, and copied into the run's folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...errors import RunError
from ...optimal_loss import Estimate, OptimalLoss, estimate_given_class, estimate_until
from ..config import TrainConfig
from ..config_schema import CURVE_WEIGHTINGS, GAP
from ..data import Images, with_labels
from ..progress import progress_bar

CURVE_FILE = "optimal_loss.csv"  # in a run directory: the optimal loss it is trained with


def needs_curve(config: TrainConfig) -> bool:
    """Whether the weighting or the levels of a config need an optimal loss."""
    return config.weighting in CURVE_WEIGHTINGS or config.levels == GAP


def read_curve(config: TrainConfig, run: Path | None) -> OptimalLoss | None:
    """The curve of a run: the copy in its folder, or else the file that the config names; None without either.

    Raises:
        RunError: the file is missing, or is not an optimal-loss curve.
    """
    copy = None if run is None else run / CURVE_FILE
    if copy is not None and copy.exists():
        path = copy
    elif config.optimal_loss is not None:
        path = Path(config.optimal_loss)
    else:
        return None
    try:
        return OptimalLoss.load(path)
    except OSError as error:
        raise RunError(
            f"optimal_loss is {path}, which cannot be read: {error}. Give a CSV that `vadiff optimal-loss` wrote, or "
            "none to have it estimated"
        ) from error
    except ValueError as error:
        raise RunError(str(error)) from error


def training_set(images: Images, *, flips: bool, class_conditional: bool) -> tuple[Tensor, Tensor | None]:
    """What a run is trained on: images, also mirrored if it flips, and classes if it is class-conditional.

    Returns:
        x0 [N, C, H, W] float32, one fixed draw of each image where its encoding is random; and int64 [N] or None.
    """
    stored, labels = with_labels(images.train, images.train_labels if class_conditional else None, slice(None))
    data = images.encoding.inputs(stored)
    if flips:
        data = torch.cat([data, data.flip(-1)])
        labels = None if labels is None else labels.repeat(2)
    return data, labels


def check_curve(optimal: OptimalLoss, config: TrainConfig, images: Images) -> None:
    """Raise unless a curve can belong to the images that are trained on; see `check_curve_of`."""
    check_curve_of(optimal, config, len(images.train), math.prod(images.shape))


def check_curve_of(optimal: OptimalLoss, config: TrainConfig, number: int, elements: int) -> None:
    """Raise unless a curve can belong to a run on this number of images, each of this number of elements.

    Raises:
        RunError: number or size of the images differ, or only one of curve and run is class-conditional.
    """
    expected = (number * (2 if config.mirrored_data else 1), elements)
    if (optimal.samples, optimal.elements) != expected:
        flips = " (each mirrored too: --flips)" if config.mirrored_data else ""
        raise RunError(
            f"optimal_loss is of {optimal.samples:,} images of {optimal.elements:,} numbers, the training images are "
            f"{expected[0]:,} of {expected[1]:,}{flips}: give the curve of this data set, or none to have it estimated"
        )
    if (optimal.classes > 0) != config.class_conditional:
        told, wanted = ("no class", "the class") if config.class_conditional else ("the class", "none")
        raise RunError(
            f"optimal_loss is of a network that is told {told}, the run's is told {wanted}: estimate it with"
            f"{'' if config.class_conditional else 'out'} --class-conditional, or give none to have it estimated"
        )


def estimate_curve(
    config: TrainConfig,
    images: Images,
    device: torch.device,
    *,
    sigmas: Sequence[float] | None = None,
    relative: float = 0.02,
    absolute: float = 2e-4,
    limit: int = 4096,
    progress: bool = False,
) -> OptimalLoss:
    """J* of what a run is trained on, given the class if it is class-conditional.

    Mirrored images are part of it if the run flips and its network is not told.

    A second on digits; on CIFAR-10 seconds on a GPU, minutes on a CPU.

    Args:
        config: of the run. With `label_dropout` its network is also trained without the class, where J* is higher: J*
            given the class is then a little below what training can reach.
        images: its data set.
        device: where to compute.
        sigmas: noise levels; 36 from 0.02 to 80 by default, from far below the distance between images to far above
            the data's standard deviation.
        relative, absolute, limit: see `vadiff.optimal_loss.estimate_until`.
        progress: show a progress bar.
    """
    data, labels = training_set(images, flips=config.mirrored_data, class_conditional=config.class_conditional)
    if sigmas is None:
        sigmas = torch.linspace(math.log(0.02), math.log(80.0), 36, dtype=torch.float64).exp().tolist()
    with progress_bar(limit, "optimal loss", "draw", shown=progress) as bar:

        def show(so_far: Estimate) -> None:
            bar.update(int(so_far.optimal.draws.max()) - bar.n)

        if labels is None:
            return estimate_until(data, sigmas, limit, relative, absolute, device=device, progress=show)
        return estimate_given_class(data, labels, sigmas, limit, relative, absolute, device=device, progress=show)
