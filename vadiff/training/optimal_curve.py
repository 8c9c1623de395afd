"""The optimal loss a run is trained with: given as a file, or estimated from the training images; kept in the run."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ..data import Images, normalised
from ..errors import RunError
from ..extras import import_extra
from ..optimal_loss import Estimate, OptimalLoss, estimate_until
from .config import CURVE_WEIGHTINGS, GAP, TrainConfig

CURVE_FILE = "optimal_loss.csv"  # in a run directory: the curve of the run, so that it stands on its own

# From far below where any image is told from the next to far above the data.
_LEVELS, _LOWEST, _HIGHEST = 36, 0.02, 80.0
_RELATIVE, _ABSOLUTE, _LIMIT = 0.02, 2e-4, 4096


def needs_curve(config: TrainConfig) -> bool:
    """Whether the weighting or the levels of a config are made of an optimal loss."""
    return config.weighting in CURVE_WEIGHTINGS or config.levels == GAP


def read_curve(config: TrainConfig, run: Path | None) -> OptimalLoss | None:
    """The curve of a run: the copy in its own folder, or else the file that the config names; None without either.

    Raises:
        RunError: there is no such file, or it is no optimal-loss curve.
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
            "none, and it is estimated"
        ) from error
    except ValueError as error:
        raise RunError(str(error)) from error


def check_curve(optimal: OptimalLoss, config: TrainConfig, images: Images) -> None:
    """Whether a curve can be that of the images that are trained on.

    Raises:
        RunError: it is of images of another size or number.
    """
    expected = (len(images.train) * (2 if config.flips else 1), images.train[0].numel())
    if (optimal.samples, optimal.elements) != expected:
        flips = " (each mirrored too: --flips)" if config.flips else ""
        raise RunError(
            f"optimal_loss is of {optimal.samples:,} images of {optimal.elements:,} numbers, the training images are "
            f"{expected[0]:,} of {expected[1]:,}{flips}: give the curve of this data set, or none, and it is estimated"
        )


def estimate_curve(config: TrainConfig, images: Images, device: torch.device, *, progress: bool = False) -> OptimalLoss:
    """J* of the training images, mirrored ones included where the run has `flips`.

    36 levels from sigma 0.02 to 80, each until its standard error is 2 % of J* or 2e-4 of the total variance, or it
    had 4,096 draws: a second on digits; on CIFAR-10 seconds on a GPU, minutes on a CPU.

    Args:
        config: the run's.
        images: its data set.
        device: where to compute.
        progress: show a progress bar where stderr is a terminal.
    """
    data = normalised(images.train)
    data = torch.cat([data, data.flip(-1)]) if config.flips else data
    sigmas = torch.linspace(math.log(_LOWEST), math.log(_HIGHEST), _LEVELS, dtype=torch.float64).exp()
    bar_type = import_extra("tqdm", "train").tqdm
    with bar_type(total=_LIMIT, unit="draw", desc="optimal loss", disable=None if progress else True) as bar:

        def show(so_far: Estimate) -> None:
            bar.update(int(so_far.optimal.draws.max()) - bar.n)

        return estimate_until(data, sigmas, _LIMIT, _RELATIVE, _ABSOLUTE, device=device, progress=show)
