"""Short trainings of a small network on halves of a data set, for the x0 error per level that levels are placed by."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import DataError
from ...information import Profile
from ...loss import DiffusionLoss
from ...process import loss_ratio
from ..config import TrainConfig
from ..config_schema import LATENT_STD, STREAMED
from ..data import PIXELS, Encoding, Images, LatentEncoding, cifar, digits, open_latents, open_pictures, shuffled
from .loop import train
from .objective import edm_objective

SEEDS = (0, 1)  # of the trainings on each half
TRAININGS = 2 * len(SEEDS)
FEWEST_IMAGES = 64
FEWEST_STEPS, _MOST_STEPS = 100, 2000
_FOLDER_SIZE = 32  # height and width to which pictures in a folder are scaled by default
_CHANNELS = (32, 48, 64)
_LEARNING_RATE = 4e-3
_BATCH = 64
_AVERAGED = 0.1  # half-life of the averaged weights, as a share of the steps so far
_LEVELS = 20
_LOWEST, _HIGHEST = 0.02, 40.0  # sigma of training and measurement, in standard deviations of the data
_MEASURED = 256  # held-out images
_SEEN = 50_000  # images that the standard deviation is of
_TRIAL_STEPS = 6
# Each training measures raw and averaged weights at half its length and at its end; a forward is a third of a step.
_MEASURING = 4 * _LEVELS * _MEASURED // 3  # in images trained on


@dataclass(frozen=True)
class ShortTraining:
    """The x0 errors of one short training, on images that it did not see."""

    half: int  # of the data, 0 or 1
    seed: int
    halfway: Profile  # after half of the steps
    profile: Profile  # at the end


def load_some(dataset: str, data: str | None, size: int | None, limit: int) -> Images:
    """Images for short trainings, in memory as `train`; there are no others.

    Args:
        dataset: one of `vadiff.trainer.config.DATASETS`.
        data: path of the data set, as in a training config.
        size: height and width in pixels, to which images are averaged over squares, and pictures in a folder scaled;
            None is the images' own, 32 for a folder. Latents have their own.
        limit: maximum number of images, the first of a shuffled order.

    Raises:
        DataError: the data set is missing, corrupt or has fewer than `FEWEST_IMAGES`.
        ValueError: a size that does not divide the images' own, or is below 4; or one for latents.
        MissingExtraError: a package that reads it is not installed.
    """
    path = None if data is None else Path(data)
    if path is None and dataset in STREAMED:
        raise DataError(f"data is None, expected the path of the {dataset}: --data PATH")
    encoding: Encoding = PIXELS
    if path is not None and dataset == "images":
        pictures = open_pictures(path, _FOLDER_SIZE if size is None else _checked(size))
        found = pictures[shuffled(len(pictures))[:limit]]
    elif path is not None and dataset == "latents":
        latents = open_latents(path)
        if size not in (None, latents.shape[-1]):
            raise ValueError(f"image size is {size}, expected none: latents have their own, {latents.shape[-1]}")
        found, encoding = _shuffled(latents, limit), latents.encoding
    else:
        found = _shuffled(digits.digits() if dataset == "digits" else cifar.load(dataset, path), limit)
    if len(found) < FEWEST_IMAGES:
        raise DataError(
            f"{'--images' if limit < FEWEST_IMAGES else data} gives {len(found)} images, expected at least "
            f"{FEWEST_IMAGES}: a network memorises fewer, and its error on other images says nothing of the data"
        )
    own = found.shape[-1]
    if size is not None and size != own:
        if own % _checked(size):
            raise ValueError(f"image size is {size}, expected a divisor of {own}, the size of {dataset}")
        found = nn.functional.avg_pool2d(found.float(), own // size).round().to(torch.uint8)
    return _of_stored(found, encoding)


def sigma_data_of(images: Images) -> float:
    """Standard deviation of all numbers that a network sees of the training images: pixels scaled to [-1, 1].

    Of 50,000 images, evenly spaced, where there are more. Latents are scaled to 0.5, of all training images.

    Raises:
        DataError: the numbers do not differ.
    """
    if isinstance(images.encoding, LatentEncoding):
        return LATENT_STD
    number = len(images.train)
    rows = torch.arange(number) if number <= _SEEN else torch.linspace(0, number - 1, _SEEN).long()
    found = float(images.encoding.inputs(images.train[rows]).double().std())
    if found == 0.0:
        raise DataError("all pixels of all images are equal, expected images that a network can learn something of")
    return found


def training_speed(images: Images, device: str = "auto") -> float:
    """Images per second of a short trial of the training of `short_trainings`."""
    half = _split(images, 0)
    config = _config(half, sigma_data_of(images), _TRIAL_STEPS, device, 0)
    trial = dataclasses.replace(config, log_every=_TRIAL_STEPS // 2, held_out_every=0, held_out_images=1)
    return float(train(trial, progress=False, images=half).metrics[-1]["images_per_second"])


def seconds_of(steps: int, speed: float) -> float:
    """How long `short_trainings` takes with these steps, at this speed in images per second."""
    return TRAININGS * (_BATCH * steps + _MEASURING) / speed


def steps_within(seconds: float, speed: float) -> int:
    """The steps per training with which `short_trainings` takes about this time at this speed in images per second.

    At least `FEWEST_STEPS`, however long they take, and 2,000 at most."""
    each = speed * seconds / TRAININGS - _MEASURING
    return min(max(int(each / _BATCH), FEWEST_STEPS), _MOST_STEPS)


def short_trainings(
    images: Images, steps: int, device: str = "auto", on_step: Callable[[], object] | None = None
) -> list[ShortTraining]:
    """Train on each half of the images with each of `SEEDS`, and measure on the other half.

    EDM's objective with ln(sigma) uniform over more than the data's scale, so that the choice of levels does not shape
    the result; the trainer's small U-Net, with averaged weights.

    Args:
        images: square; those held out are not used.
        steps: of each training, of 64 images.
        device: as in a training config.
        on_step: called at every step.

    Raises:
        DataError: the pixels do not differ.
        ValueError: fewer steps than `FEWEST_STEPS`.
    """
    if steps < FEWEST_STEPS:
        raise ValueError(f"steps is {steps}, expected at least {FEWEST_STEPS}: an untrained network knows no scale")
    sigma_data = sigma_data_of(images)

    def objective(
        criterion: DiffusionLoss, output: Tensor, x0: Tensor, eps: Tensor, sigma: Tensor, scale: float,
        sample_weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if on_step is not None:
            on_step()
        return edm_objective(criterion, output, x0, eps, sigma, scale, sample_weight)

    found = []
    for half in (0, 1):
        split = _split(images, half)
        for seed in SEEDS:
            config = _config(split, sigma_data, steps, device, seed)
            trained = train(config, objective, progress=False, images=split)
            halfway, end = [_profile(line["held_out"], sigma_data) for line in trained.metrics if "held_out" in line]
            found.append(ShortTraining(half, seed, halfway, end))
    return found


def _profile(held_out: Mapping[str, Any], sigma_data: float) -> Profile:
    """The x0 errors of averaged weights in a line of metrics."""
    log_snr, loss = (torch.tensor(held_out[name], dtype=torch.float64) for name in ("log_snr", "loss_ema"))
    return Profile(log_snr, loss / loss_ratio("edm", log_snr, sigma_data=sigma_data))


def _shuffled(images: Images, limit: int) -> Tensor:
    """Stored images of a data set, trained on or not, the first of a shuffled order."""
    known = len(images.train)
    order = shuffled(known + len(images.held_out))[:limit]
    first = order < known
    train, held_out = images.train[order[first]], images.held_out[order[~first] - known]
    found = torch.empty(len(order), *train.shape[1:], dtype=train.dtype)
    found[first], found[~first] = train, held_out
    return found


def _of_stored(stored: Tensor, encoding: Encoding) -> Images:
    return Images(stored, None, stored[:0], None, held_out_is_test=False, encoding=encoding)


def _split(images: Images, half: int) -> Images:
    """Half number `half` to train on, the other one to measure on."""
    halves = images.train[:].chunk(2)
    return _of_stored(halves[half], images.encoding)._replace(held_out=halves[1 - half])


def _config(images: Images, sigma_data: float, steps: int, device: str, seed: int) -> TrainConfig:
    _, height, _ = images.shape
    depth = 1
    while depth < len(_CHANNELS) and height % 2**depth == 0 and height >> depth >= 4:
        depth += 1
    limits = {"sigma_min": _LOWEST * sigma_data, "sigma_max": _HIGHEST * sigma_data}
    return TrainConfig(
        dataset="images", image_size=height, sigma_data=sigma_data, weighting="constant", levels="log_uniform",
        levels_options=limits, stratified=True, channels=_CHANNELS[:depth], steps=steps,
        batch_size=_BATCH,
        learning_rate=_LEARNING_RATE, warmup=steps // 10, ema_rampup=_AVERAGED, seed=seed, device=device,
        held_out_levels=_LEVELS, held_out_sigma=(limits["sigma_min"], limits["sigma_max"]), held_out_images=_MEASURED,
        held_out_every=(steps + 1) // 2, log_every=steps, tensorboard=False,
    )  # fmt: skip


def _checked(size: int) -> int:
    if size < 4:
        raise ValueError(f"image size is {size}, expected at least 4")
    return size
