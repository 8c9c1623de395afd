"""Suggested noise levels, and how sure they are: of short trainings, of a run, or of a file of errors."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...information import Profile
from ...levels import Suggestion, suggest
from ..data import Images, encoding
from .held_out import HeldOutLoss, held_out_loss_of_run
from .level_profile import read_errors
from .run import Run
from .short import SEEDS, short_trainings, sigma_data_of

HALVES, APART, LENGTH = "halves", "seeds", "half the steps"  # what independent ways to get a suggestion differ by
NUMBERS = ("p_mean", "p_std", "logit_mean", "logit_std", "alpha")
PIXELS, LATENTS, GIVEN, INFERRED = "pixels", "latents", "given", "inferred"  # where sigma_data is from
_FAR = 4.0  # factor between the variance that the errors show and sigma_data² from which on there is a warning
_LEVELS = 20  # at which a run's held-out images are measured


@dataclass(frozen=True, eq=False)
class Evidence:
    """A suggestion, and how much its numbers differ between independent ways to get them.

    Attributes:
        suggestion: of the geometric mean of `profiles`.
        source: what it is from, in words.
        profiles: the x0 errors of each network, or of each half of the images.
        differences: `HALVES`, `APART` (seeds) or `LENGTH` → name in `NUMBERS` → difference of that number.
        sigma_data_from: `PIXELS`, their standard deviation; `LATENTS`, to which they are scaled; `GIVEN`, by a flag or
            with the losses; or `INFERRED`, from the errors at the highest noise.
        command: of `vadiff train` for the same images, to which the suggestion is added; None if not known.
    """

    suggestion: Suggestion
    source: str
    profiles: Sequence[Profile]
    differences: dict[str, dict[str, float]] = field(default_factory=dict)
    sigma_data_from: str = PIXELS
    command: str | None = None

    def uncertainty(self, number: str) -> float | None:
        """The largest of a number's differences, without sign; None where there are none."""
        return max((abs(found[number]) for found in self.differences.values()), default=None)

    @property
    def warning(self) -> str | None:
        """What speaks against a given sigma_data: errors at the highest noise that are far from its square."""
        if self.sigma_data_from != GIVEN:
            return None
        variance = self.suggestion.sigma_data**2
        share = float(torch.stack([each.x0_error[0] for each in self.profiles]).mean()) / variance
        if 1.0 / _FAR <= share <= _FAR:
            return None
        cause = ", or the network predicts eps" if share > _FAR else ""
        return (
            f"the errors at the highest noise are {share:.2g} of sigma_data² ({variance:.3g}), expected about 1: "
            f"sigma_data {self.suggestion.sigma_data:.3g} is not that of these data{cause}"
        )


def of_short_trainings(
    images: Images, steps: int, device: str = "auto", on_step: Callable[[], object] | None = None
) -> Evidence:
    """Evidence of `short_trainings`, which has these arguments."""
    runs = short_trainings(images, steps, device, on_step)
    sigma_data = sigma_data_of(images)
    profiles = [run.profile for run in runs]
    halves = [[run.profile for run in runs if run.half == half] for half in (0, 1)]
    seeds = [[run.profile for run in runs if run.seed == seed] for seed in SEEDS]
    shape = " x ".join(map(str, images.shape))
    return Evidence(
        _suggest(profiles, sigma_data),
        f"{len(runs)} trainings of {steps:,} steps, {len(SEEDS)} seeds on each half of {len(images.train):,} images of "
        f"{shape}, measured on the other half",
        profiles,
        {
            HALVES: _difference(halves[0], halves[1], sigma_data),
            APART: _difference(seeds[0], seeds[1], sigma_data),
            LENGTH: _difference([run.halfway for run in runs], profiles, sigma_data),
        },
        _seen(images),
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
    scale, scale_from = sigma_data, GIVEN
    if scale is None:
        images = run.images()
        scale, scale_from = sigma_data_of(images), _seen(images)
    return Evidence(
        _suggest([profile], scale),
        f"training statistics of {run.path}, raw weights",
        [profile],
        sigma_data_from=scale_from,
    )


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
    scale = sigma_data_of(images) if sigma_data is None else sigma_data
    halves = [_profile_of(found._replace(per_image=found.per_image[:, half::2])) for half in (0, 1)]
    return Evidence(
        _suggest([_profile_of(found)], scale),
        f"averaged weights of {run.path} on {found.per_image.shape[1]:,} held-out images",
        halves,
        {HALVES: _difference(halves[:1], halves[1:], scale)},
        sigma_data_from=_seen(images) if sigma_data is None else GIVEN,
    )


def of_file(path: Path, prediction_type: str | None = None, sigma_data: float | None = None) -> Evidence:
    """Evidence of a CSV file, see `read_errors`.

    Args:
        path: of x0 errors; of a run's losses, which say that they are EDM's and of which sigma_data; or of losses of
            another loop, whose form then has to be named.
        prediction_type: form of the losses, one of `vadiff.process.PREDICTION_TYPES`.
        sigma_data: standard deviation of the data, which the form "edm" needs; None takes that of a run's losses, or
            else what the errors say.

    Raises:
        ValueError: no such file or another one; a form that is missing, not needed or not that of the file; or levels
            that do not reach far enough.
    """
    found = read_errors(path)
    if isinstance(found, Profile):
        if prediction_type is not None:
            raise ValueError(f"prediction_type is {prediction_type!r}, expected none: {path} has x0 errors already")
        return _of_profile(found, path, sigma_data)
    if found.sigma_data is not None:
        if prediction_type not in (None, "edm"):
            raise ValueError(f"prediction_type is {prediction_type!r}, but {path} says that its losses are edm")
        if sigma_data is not None and not math.isclose(sigma_data, found.sigma_data, rel_tol=1e-4):
            raise ValueError(f"sigma_data is {sigma_data:g}, but {path} says that of its losses is {found.sigma_data}")
        return _of_profile(Profile.of_losses(found, "edm", sigma_data=found.sigma_data), path, found.sigma_data)
    if prediction_type is None:
        raise ValueError(f"prediction_type is None, expected the form of the losses in {path}, see --help")
    if prediction_type == "edm" and sigma_data is None:
        raise ValueError("sigma_data is None, expected that of the losses: EDM's loss is in units of it")
    profile = Profile.of_losses(found, prediction_type, sigma_data=sigma_data or 1.0)
    try:
        return _of_profile(profile, path, sigma_data)
    except ValueError as error:
        raise ValueError(
            f"the losses in {path} are not such as {prediction_type} has: name another --prediction-type if they are "
            f"of another form. Otherwise {error}"
        ) from error


def _of_profile(profile: Profile, path: Path, sigma_data: float | None) -> Evidence:
    suggestion = _suggest([profile], sigma_data)
    return Evidence(suggestion, str(path), [profile], sigma_data_from=INFERRED if sigma_data is None else GIVEN)


def _seen(images: Images) -> str:
    """What the network sees of images, for `Evidence.sigma_data_from`."""
    return PIXELS if images.encoding is encoding.PIXELS else LATENTS


def _suggest(profiles: Sequence[Profile], sigma_data: float | None) -> Suggestion:
    """Of the geometric mean of errors at the same levels."""
    error = torch.stack([profile.x0_error.log() for profile in profiles]).mean(0).exp()
    return suggest(profiles[0].log_snr, error, sigma_data=sigma_data)


def _difference(first: Sequence[Profile], second: Sequence[Profile], sigma_data: float | None) -> dict[str, float]:
    before, after = _suggest(first, sigma_data), _suggest(second, sigma_data)
    return {name: getattr(after, name) - getattr(before, name) for name in NUMBERS}


def _profile_of(held_out: HeldOutLoss) -> Profile:
    return Profile.of_losses(held_out.by_level, "edm", sigma_data=held_out.sigma_data)
