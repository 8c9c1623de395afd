"""Suggested noise levels, and how sure they are: of short trainings, of a run, or of a file of errors."""

import csv
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...information import Profile
from ...levels import Suggestion, suggest
from ...validation import LevelLosses
from .held_out import HeldOutLoss, held_out_loss_of_run
from .run import Run
from .short import SEEDS, short_trainings, sigma_data_of

HALVES, APART, LENGTH = "halves", "seeds", "half the steps"  # what independent ways to get a suggestion differ by
NUMBERS = ("p_mean", "p_std", "logit_mean", "logit_std", "alpha")
_LEVELS = 20  # at which a run's held-out images are measured


@dataclass(frozen=True, eq=False)
class Evidence:
    """A suggestion, and how much its numbers differ between independent ways to get them.

    Attributes:
        suggestion: of the geometric mean of `profiles`.
        source: what it is from, in words.
        profiles: the x0 errors of each network, or of each half of the images.
        differences: `HALVES`, `APART` (seeds) or `LENGTH` → name in `NUMBERS` → difference of that number.
    """

    suggestion: Suggestion
    source: str
    profiles: Sequence[Profile]
    differences: dict[str, dict[str, float]] = field(default_factory=dict)

    def uncertainty(self, number: str) -> float | None:
        """The largest of a number's differences, without sign; None where there are none."""
        return max((abs(found[number]) for found in self.differences.values()), default=None)


def of_short_trainings(
    pixels: Tensor, steps: int, device: str = "auto", on_step: Callable[[], object] | None = None
) -> Evidence:
    """Evidence of `short_trainings`, which has these arguments."""
    runs = short_trainings(pixels, steps, device, on_step)
    sigma_data = sigma_data_of(pixels)
    profiles = [run.profile for run in runs]
    halves = [[run.profile for run in runs if run.half == half] for half in (0, 1)]
    seeds = [[run.profile for run in runs if run.seed == seed] for seed in SEEDS]
    shape = " x ".join(map(str, pixels.shape[1:]))
    return Evidence(
        _suggest(profiles, sigma_data),
        f"{len(runs)} trainings of {steps:,} steps, {len(SEEDS)} seeds on each half of {len(pixels):,} images of "
        f"{shape}, measured on the other half",
        profiles,
        {
            HALVES: _difference(halves[0], halves[1], sigma_data),
            APART: _difference(seeds[0], seeds[1], sigma_data),
            LENGTH: _difference([run.halfway for run in runs], profiles, sigma_data),
        },
    )


def of_statistics(run: Run, step: int | None = None, sigma_data: float | None = None) -> Evidence:
    """Evidence of what a run's criterion recorded in training.

    Args:
        run: any run of the trainer.
        step: of the checkpoint; None is the latest.
        sigma_data: standard deviation of the data; None measures the run's training images.

    Raises:
        CheckpointError: there is no such checkpoint, or it is corrupt.
        DataError: the data set is missing or corrupt.
        ValueError: too few samples, or levels that do not reach the data's scale at both ends.
    """
    profile = run.profile(step)
    scale = sigma_data_of(run.images().train) if sigma_data is None else sigma_data
    return Evidence(_suggest([profile], scale), f"training statistics of {run.path}, raw weights", [profile])


def of_held_out(
    run: Run, step: int | None = None, sigma_data: float | None = None, device: str = "cpu", progress: bool = False
) -> Evidence:
    """Evidence of a run's averaged network on its held-out images; arguments and errors as for `of_statistics`.

    Args:
        run, step, sigma_data: as there.
        device: where to measure.
        progress: show a progress bar.
    """
    images = run.images()
    config = dataclasses.replace(run.config, held_out_levels=_LEVELS)
    found = held_out_loss_of_run(config, images, run.denoiser("ema", step, device), progress=progress)
    scale = sigma_data_of(images.train) if sigma_data is None else sigma_data
    halves = [_profile_of(found._replace(per_image=found.per_image[:, half::2])) for half in (0, 1)]
    return Evidence(
        _suggest([_profile_of(found)], scale),
        f"averaged weights of {run.path} on {found.per_image.shape[1]:,} held-out images",
        halves,
        {HALVES: _difference(halves[:1], halves[1:], scale)},
    )


def of_file(path: Path, prediction_type: str | None = None, sigma_data: float | None = None) -> Evidence:
    """Evidence of a CSV file.

    Args:
        path: with the columns log_snr and x0_error; or of `LevelLosses.save`, whose form then has to be named.
        prediction_type: form of the losses, one of `vadiff.process.PREDICTION_TYPES`.
        sigma_data: standard deviation of the data, which the form "edm" needs; None takes what the errors say.

    Raises:
        OSError: there is no such file.
        ValueError: another file, a form that is missing or not needed, or levels that do not reach far enough.
    """
    with path.open(newline="") as file:
        columns = csv.DictReader(file).fieldnames or []
    if "x0_error" in columns:
        if prediction_type is not None:
            raise ValueError(f"prediction_type is {prediction_type!r}, expected none: {path} has x0 errors already")
        profile = Profile.load(path)
    else:
        losses = LevelLosses.load(path)
        if prediction_type is None:
            raise ValueError(f"prediction_type is None, expected the form of the losses in {path}, see --help")
        if prediction_type == "edm" and sigma_data is None:
            raise ValueError("sigma_data is None, expected that of the losses: EDM's loss is in units of it")
        profile = Profile.of_losses(losses, prediction_type, sigma_data=sigma_data or 1.0)
    return Evidence(_suggest([profile], sigma_data), str(path), [profile])


def _suggest(profiles: Sequence[Profile], sigma_data: float | None) -> Suggestion:
    """Of the geometric mean of errors at the same levels."""
    error = torch.stack([profile.x0_error.log() for profile in profiles]).mean(0).exp()
    return suggest(profiles[0].log_snr, error, sigma_data=sigma_data)


def _difference(first: Sequence[Profile], second: Sequence[Profile], sigma_data: float | None) -> dict[str, float]:
    before, after = _suggest(first, sigma_data), _suggest(second, sigma_data)
    return {name: getattr(after, name) - getattr(before, name) for name in NUMBERS}


def _profile_of(held_out: HeldOutLoss) -> Profile:
    return Profile.of_losses(held_out.by_level, "edm", sigma_data=held_out.sigma_data)
