"""Batches of a run: images from memory or files, noise levels and noise from separate random streams."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...augmentation import EDMAugmentation, labels_of, transformed
from ...levels import EpochUniforms, LevelSampler, uniforms
from ...models.parameterisation import VPForm
from ...process import DiscreteVP
from ..config import TrainConfig
from ..data import Images
from .caching import stays_on_device
from .distributed import Ranks
from .image_source import OnDevice, ReadAhead, Shares, Source, default_workers
from .streams import AUGMENTATION, LATENTS, ShuffledIndices, Streams


class Batch(NamedTuple):
    """One part of this rank's share of a batch."""

    x0: Tensor  # [B, C, H, W] float32 in [-1, 1]
    eps: Tensor  # [B, C, H, W] float32
    sigma: Tensor  # [B] float32, of the variance-exploding process; infinite at zero terminal SNR
    labels: Tensor | None  # [B] int64, `classes` where withheld; None for a network without classes
    sample_weight: Tensor | None  # [B] float32
    rows: Tensor  # [B] int64, of the training images
    augmentation: Tensor | None  # [B, 9] float32, what the network is told of it; None where images stay as they are


def memory_format_of(output: Tensor) -> torch.memory_format:
    """channels_last if a network's output [B, C, H, W] is dense in that format and not contiguous."""
    last = torch.channels_last
    return last if not output.is_contiguous() and output.is_contiguous(memory_format=last) else torch.contiguous_format


def flipped(images: Tensor, which: Tensor) -> Tensor:
    """The images [B, C, H, W], those of `which` (bool [B]) mirrored."""
    return torch.where(which.view(-1, 1, 1, 1), images.flip(-1), images)


class Batches:
    """The batches of a run.

    Attributes:
        device, streams: as given.
        source: of the stored images.
        encoding, number: of these.
        labels: their classes, int64 [N] on the device; None for a network without classes.
        memory_format: of images and noise; does not change their values. The loop sets it to that of the network's
            output, as the criterion would copy any other format at every step.

    Args:
        config: sizes, flips, label dropout, strata and pairs of noise levels, where images are kept.
        images: the data set.
        levels: maps uniform numbers to noise levels, with its state at the time of the step.
        streams: of random numbers.
        device: where batches are made. If the images are kept there, a step copies from the host only at a new pass
            over the data.
        ranks: of this process.

    Raises:
        ValueError: the batch cannot be divided evenly.
    """

    def __init__(
        self,
        config: TrainConfig,
        images: Images,
        levels: LevelSampler,
        streams: Streams,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        # Tensor cores read channels_last.
        self.memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.device, self.streams = device, streams
        self._config = config
        self._levels = levels
        self.encoding, self.number = images.encoding, len(images.train)
        self._shape = images.shape
        form = config.form()
        process = form.process if isinstance(form, VPForm) else None
        self._timesteps = process if isinstance(process, DiscreteVP) else None
        # The flips are then part of it, as the network is told of them too.
        self._augmentation = EDMAugmentation(config.augment, xflip=config.flips) if config.augment else None
        self._shares = Shares(config, ranks)
        self.source = _source(config, images, streams, device, self._shares)
        self.labels = None
        if config.class_conditional and images.train_labels is not None:
            self.labels = images.train_labels.to(device)
        self._classes = images.classes
        self._uniforms: EpochUniforms | None = None
        if config.stratified_epoch:
            batches = max(1, self.number // config.batch_size)
            self._uniforms = EpochUniforms(config.batch_size, batches, streams.epoch_levels)
        self._u = torch.empty(config.batch_size, dtype=torch.float64, device=device)  # of that batch

    def at(self, step: int) -> list[Batch]:
        """This rank's share of the batch of step 0, 1, ..., in `accumulate` parts."""
        self.prepare(step)
        return self.draw()

    def prepare(self, step: int) -> None:
        """What the host does for a batch: seed the streams, choose or read the images, and the strata of an epoch."""
        self.streams.seed(step)
        self.source.prepare(step)
        if self._uniforms is not None:
            u = self._uniforms(step)
            if self.device.type == "cuda":
                u = u.pin_memory()  # from other memory the host would wait for the copy
            self._u.copy_(u, non_blocking=True)

    def draw(self) -> list[Batch]:
        """The batch prepared before: work of the device alone.

        The random numbers of the whole batch are drawn, then sliced: they do not depend on ranks and parts.
        """
        config, size, generators = self._config, self._config.batch_size, self.streams.generators
        u = self._u
        if self._uniforms is None:
            u = uniforms(size, generators["levels"], stratified=config.stratified, antithetic=config.antithetic)
        eps = self._normal("noise")
        mirrored = self._coins("flips", 0.5) if config.mirrored_data else None
        augmented = self._augmented()
        withheld = self._coins("labels", config.label_dropout) if self.labels is not None else None
        spread = self._normal(LATENTS) if self.encoding.random else None
        batches = []
        for part in range(config.accumulate):
            mine = self._shares.of(part)
            stored, rows = self.source.part(part)
            x0 = self._inputs(stored, spread, mirrored, mine)
            told = None
            if augmented is not None:
                x0, told = transformed(x0, augmented[mine]), labels_of(augmented[mine])
                x0 = x0.contiguous(memory_format=self.memory_format)
            labels = None
            if self.labels is not None and withheld is not None:
                labels = self.labels[rows].masked_fill(withheld[mine], self._classes)
            levels = self._levels(u[mine])
            if self._timesteps is not None:  # the noise levels of a discrete process
                log_snr = self._timesteps.log_snr(self._timesteps.timestep(levels.log_snr)).float()
                levels = levels._replace(log_snr=log_snr)
            # Drawn in the order of a contiguous tensor, so that a seed gives the same noise in any format.
            noise = eps[mine].contiguous(memory_format=self.memory_format)
            batches.append(Batch(x0, noise, levels.sigma, labels, levels.sample_weight, rows, told))
        return batches

    def _inputs(self, stored: Tensor, spread: Tensor | None, mirrored: Tensor | None, mine: slice) -> Tensor:
        """x0 of a part's stored images: `spread` and `mirrored` are of the whole batch, of which the part is `mine`."""
        stored = stored.contiguous(memory_format=self.memory_format)  # cheaper as bytes than as floats
        x0 = self.encoding.inputs(stored, None if spread is None else spread[mine])
        return x0 if mirrored is None else flipped(x0, mirrored[mine])

    def _augmented(self) -> Tensor | None:
        """The random numbers of the augmentation for the whole batch. [batch_size, 8]."""
        if self._augmentation is None:
            return None
        generator = self.streams.generators[AUGMENTATION]
        return self._augmentation.draw(self._config.batch_size, device=generator.device, generator=generator)

    def _normal(self, stream: str) -> Tensor:
        """N(0, 1) for the whole batch. [batch_size, C, H, W]."""
        generator = self.streams.generators[stream]
        return torch.randn(self._config.batch_size, *self._shape, generator=generator, device=generator.device)

    def _coins(self, stream: str, probability: float) -> Tensor:
        """True with the given probability, for each image of the whole batch. bool [batch_size]."""
        generator = self.streams.generators[stream]
        return torch.rand(self._config.batch_size, generator=generator, device=generator.device) < probability


def _source(config: TrainConfig, images: Images, streams: Streams, device: torch.device, shares: Shares) -> Source:
    """Where a run's images come from: memory of the device, or processes that read them ahead."""
    order = streams.order if images.groups is None else streams.order_by_groups(images.groups)
    number = len(images.train)
    if isinstance(images.train, Tensor) and stays_on_device(config, images.train, device):
        return OnDevice(images.train.to(device), ShuffledIndices(order, number, config.batch_size, device), shares)
    indices = ShuffledIndices(order, number, config.batch_size, torch.device("cpu"))
    workers = default_workers() if config.workers is None else config.workers
    return ReadAhead(images.train, indices, shares, device, workers)
