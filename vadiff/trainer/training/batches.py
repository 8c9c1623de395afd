"""Batches of a run: images gathered on the device, noise levels and noise from separate random streams."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...levels import EpochUniforms, LevelSampler, uniforms
from ...models.parameterisation import VPForm
from ...pixels import normalised
from ...process import DiscreteVP
from ..config import TrainConfig
from ..data import Images
from .distributed import Ranks
from .streams import ShuffledIndices, Streams


class Batch(NamedTuple):
    """One part of this rank's share of a batch."""

    x0: Tensor  # [B, C, H, W] float32 in [-1, 1]
    eps: Tensor  # [B, C, H, W] float32
    sigma: Tensor  # [B] float32, of the variance-exploding process; infinite at zero terminal SNR
    labels: Tensor | None  # [B] int64, `classes` where withheld; None for a network without classes
    sample_weight: Tensor | None  # [B] float32
    rows: Tensor  # [B] int64, of the training images


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
        pixels: the training images, bytes [N, C, H, W] on the device.
        labels: their classes, int64 [N]; None for a network without classes.
        memory_format: of images and noise; does not change their values. The loop sets it to that of the network's
            output, as the criterion would copy any other format at every step.

    Args:
        config: sizes, flips, label dropout, strata and pairs of noise levels.
        images: the data set; its training images are kept on the device as bytes.
        levels: maps uniform numbers to noise levels, with its state at the time of the step.
        streams: of random numbers.
        device: where batches are made; a step copies from the host only at a new pass over the data.
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
        if config.batch_size % (config.accumulate * ranks.size):
            raise ValueError(
                f"batch_size is {config.batch_size}, expected a multiple of accumulate × ranks = "
                f"{config.accumulate} × {ranks.size}"
            )
        # Tensor cores read channels_last.
        self.memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.device, self.streams = device, streams
        self._config = config
        self._levels = levels
        form = config.form()
        process = form.process if isinstance(form, VPForm) else None
        self._timesteps = process if isinstance(process, DiscreteVP) else None
        self._ranks = ranks
        self.pixels = images.train[:].to(device)
        self.labels = None
        if config.class_conditional and images.train_labels is not None:
            self.labels = images.train_labels.to(device)
        self._classes = images.classes
        self._indices = ShuffledIndices(streams.order, len(images.train), config.batch_size, device)
        self._chosen = torch.empty(config.batch_size, dtype=torch.int64, device=device)  # images of the batch
        self._uniforms: EpochUniforms | None = None
        if config.stratified_epoch:
            batches = max(1, len(images.train) // config.batch_size)
            self._uniforms = EpochUniforms(config.batch_size, batches, streams.epoch_levels)
        self._u = torch.empty(config.batch_size, dtype=torch.float64, device=device)  # of that batch

    def at(self, step: int) -> list[Batch]:
        """This rank's share of the batch of step 0, 1, ..., in `accumulate` parts."""
        self.prepare(step)
        return self.draw()

    def prepare(self, step: int) -> None:
        """What the host does for a batch: seed the streams, choose the images and the strata of an epoch."""
        self.streams.seed(step)
        self._chosen.copy_(self._indices.at(step))
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
        noise = generators["noise"]
        eps = torch.randn(size, *self.pixels.shape[1:], generator=noise, device=noise.device)
        mirrored = self._coins("flips", 0.5) if config.flips else None
        withheld = self._coins("labels", config.label_dropout) if self.labels is not None else None
        share = size // config.accumulate // self._ranks.size
        batches = []
        for part in range(config.accumulate):
            start = (part * self._ranks.size + self._ranks.rank) * share
            mine = slice(start, start + share)
            batches.append(
                self._batch(
                    self._chosen[mine],
                    u[mine],
                    eps[mine],
                    None if mirrored is None else mirrored[mine],
                    None if withheld is None else withheld[mine],
                )
            )
        return batches

    def _batch(
        self,
        indices: Tensor,
        u: Tensor,
        eps: Tensor,
        mirrored: Tensor | None,
        withheld: Tensor | None,
    ) -> Batch:
        pixels = self.pixels[indices].contiguous(memory_format=self.memory_format)  # cheaper as bytes than as floats
        x0 = normalised(pixels)
        if mirrored is not None:
            x0 = flipped(x0, mirrored)
        labels = None
        if self.labels is not None and withheld is not None:
            labels = self.labels[indices].masked_fill(withheld, self._classes)
        # Drawn in the order of a contiguous tensor, so that a seed gives the same noise in any format.
        eps = eps.contiguous(memory_format=self.memory_format)
        levels = self._levels(u)
        if self._timesteps is not None:  # the noise levels of a discrete process
            levels = levels._replace(log_snr=self._timesteps.log_snr(self._timesteps.timestep(levels.log_snr)).float())
        return Batch(x0, eps, levels.sigma, labels, levels.sample_weight, indices)

    def _coins(self, stream: str, probability: float) -> Tensor:
        """True with the given probability, for each image of the whole batch. bool [batch_size]."""
        generator = self.streams.generators[stream]
        return torch.rand(self._config.batch_size, generator=generator, device=generator.device) < probability
