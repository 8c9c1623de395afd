"""Generation of many images from a trained denoiser, on any number of devices."""

import dataclasses
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import RunError
from ..models import Denoiser
from ..pixels import pixels
from .solvers import euler, heun
from .steps import Churn, flow_times, noise_levels

SAMPLERS = ("heun", "euler")


class Generated(NamedTuple):
    """A batch of images, in the order of its seeds."""

    start: int  # index of the first image among all seeds
    images: Tensor  # [B, C, H, W] uint8
    labels: Tensor | None  # [B] int64


class TrainedConfig(Protocol):
    """The fields of a training configuration that generation reads."""

    @property
    def process(self) -> str: ...  # "edm" or "flow"

    @property
    def label_dropout(self) -> float: ...


class TrainedModel(Protocol):
    """A trained model to draw images from; the trainer's `Run` is one."""

    @property
    def config(self) -> TrainedConfig: ...

    def denoiser(self, weights: str, step: int | None, device: torch.device | str) -> Denoiser: ...


@dataclass(frozen=True)
class Generation:
    """Options for drawing images.

    Args:
        sampler: "heun" (EDM, 2·steps - 1 evaluations) or "euler" (straight path of flow matching, `steps`).
        steps: noise levels or times.
        sigma_min: lowest noise level before 0 ("heun").
        sigma_max: highest noise level.
        churn: EDM's stochastic sampler ("heun"); None is deterministic.
        label: the class of every image; None is class seed mod number of classes, for a conditional model.
        guidance: guidance weight of a conditional model; 1 is no guidance.
        weights: "ema", "raw" or "ema-<width>", see `Run.denoiser`.
        step: of the checkpoint; None is the last.
        batch_size: images per batch on each device; does not affect the images.
        devices: devices to draw on; each draws its own batches.

    Raises:
        ValueError: an argument out of bounds.
    """

    sampler: str = "heun"
    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    churn: Churn | None = None
    label: int | None = None
    guidance: float = 1.0
    weights: str = "ema"
    step: int | None = None
    batch_size: int = 256
    devices: tuple[torch.device, ...] = (torch.device("cpu"),)

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}, expected one of {', '.join(SAMPLERS)}")
        if self.sampler == "euler" and self.churn is not None:
            raise ValueError("churn is for the sampler heun: Euler's method on a flow is deterministic")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}, expected a number")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected at least 1")
        if not self.devices:
            raise ValueError("devices is empty, expected at least one")
        self.schedule()

    def schedule(self) -> Tensor:
        """Noise levels ("heun") or times ("euler"), [steps + 1] float64, falling to 0.

        Raises:
            ValueError: too few steps, or levels out of order.
        """
        if self.sampler == "euler":
            return flow_times(self.steps, self.sigma_max)
        return noise_levels(self.steps, self.sigma_min, self.sigma_max)

    def labels(self, seeds: Sequence[int], classes: int) -> Tensor | None:
        """The class of each seed, [len(seeds)] int64, or None for a model without classes.

        Raises:
            ValueError: a label out of range, or label or guidance for a model without classes.
        """
        if classes == 0:
            for name, unset in (("label", None), ("guidance", 1.0)):
                if getattr(self, name) != unset:
                    raise ValueError(f"{name} is {getattr(self, name)}, but this model was trained without classes")
            return None
        if self.label is None:
            return torch.tensor([seed % classes for seed in seeds], dtype=torch.int64)
        if not 0 <= self.label < classes:
            raise ValueError(f"label is {self.label}, expected 0 to {classes - 1}: the model's classes")
        return torch.full((len(seeds),), self.label, dtype=torch.int64)


def draw(
    sample: Callable[[torch.device, Sequence[int]], Tensor],
    seeds: Sequence[int],
    devices: Sequence[torch.device],
    batch_size: int = 256,
) -> Iterator[tuple[int, Tensor]]:
    """Draw images on several devices, each of which takes the next batch when it is free.

    Args:
        sample: (device, seeds of a batch) → images [B, ...], called in one thread per device.
        seeds: one per image.
        devices: at least one; a device named twice gets two threads.
        batch_size: images per batch on each device.

    Yields:
        (index of its first image among the seeds, images) of each batch, in order of completion.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1.")
    free: queue.SimpleQueue[torch.device] = queue.SimpleQueue()
    for device in devices:
        free.put(device)

    stopped = threading.Event()

    def work(start: int) -> tuple[int, Tensor] | None:
        if stopped.is_set():
            return None
        device = free.get()
        try:
            return start, sample(device, seeds[start : start + batch_size])
        except BaseException:
            stopped.set()
            raise
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as threads:
        batches = [threads.submit(work, start) for start in range(0, len(seeds), batch_size)]
        try:
            for batch in as_completed(batches):
                if (drawn := batch.result()) is not None:
                    yield drawn
        finally:  # after an error or an early stop of the caller, batches not yet begun return at once
            stopped.set()


def generate(run: TrainedModel, seeds: Sequence[int], generation: Generation) -> Iterator[Generated]:
    """Draw one image per seed from a run.

    Args:
        run: what `vadiff.training.open_run` returned.
        seeds: one per image; its image does not depend on batch_size or devices.
        generation: sampler, guidance, weights and devices.

    Yields:
        Batches in order of completion, which on several devices is not the order of seeds.

    Raises:
        ValueError: options that the model does not support.
        RunError: the denoiser returned non-finite values.
    """
    denoisers = {
        device: run.denoiser(generation.weights, generation.step, device)
        for device in dict.fromkeys(generation.devices)
    }
    classes = next(iter(denoisers.values())).labels
    generation.labels(seeds[:1], classes)  # raise for invalid options before the first image
    if generation.guidance != 1.0 and not run.config.label_dropout:
        raise ValueError(
            f"guidance is {generation.guidance}, but the run had label_dropout 0: without it the model never learned "
            "to denoise without a class. Use guidance 1, or train with label_dropout 0.1."
        )

    def sample(device: torch.device, part: Sequence[int]) -> Tensor:
        return generate_batch(denoisers[device], part, generation, device)

    for start, images in draw(sample, seeds, generation.devices, generation.batch_size):
        yield Generated(start, images, generation.labels(seeds[start : start + len(images)], classes))


def generate_batch(denoiser: Denoiser, seeds: Sequence[int], generation: Generation, device: torch.device) -> Tensor:
    """The images of a few seeds, [len(seeds), C, H, W] uint8 on the CPU.

    Raises:
        RunError: the denoiser returned non-finite values.
    """
    assert denoiser.image_shape is not None  # every run's denoiser has one
    options: dict[str, Any] = {
        "labels": generation.labels(seeds, denoiser.labels),
        "guidance": generation.guidance,
        "batch_size": generation.batch_size,
        "device": device,
    }
    if generation.sampler == "euler":
        images = euler(denoiser, denoiser.image_shape, seeds, times=generation.schedule(), **options)
    else:
        levels = generation.schedule()
        images = heun(denoiser, denoiser.image_shape, seeds, levels=levels, churn=generation.churn, **options)
    if not images.isfinite().all():
        raise RunError(
            f"the image of seed {seeds[int((~images.isfinite().flatten(1).all(1)).nonzero()[0])]} is not finite: the "
            "checkpoint's weights have diverged (try an earlier --step), or guidance or churn is too strong"
        )
    return pixels(images)


def default_generation(run: TrainedModel, sampler: str | None = None) -> Generation:
    """Default options of a sampler; without `sampler`, of the one for the process of the run."""
    sampler = sampler or ("euler" if run.config.process == "flow" else "heun")
    return Generation(sampler, steps=50, sigma_max=1000.0) if sampler == "euler" else Generation(sampler)


def with_options(generation: Generation, **options: object) -> Generation:
    """`generation` with the given options that are not None."""
    given = {name: value for name, value in options.items() if value is not None}
    return dataclasses.replace(generation, **given)  # type: ignore[arg-type]
