"""Random numbers of a run: separate seeded streams, each a function of seed and step.

Two runs that differ in one stream share all the others, sample by sample. As no stream carries a state from step to
step, a resumed run draws the same numbers as an uninterrupted one. Every rank draws the numbers of the global batch and
takes its slice, so that they do not depend on the number of ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_ORDER = "order"
DEVICE_STREAMS = ("levels", "noise", "flips", "labels")
REFERENCES = "references"  # a stream on the device too, of posterior-mean targets
LATENTS = "latents"  # and of latents that are drawn from their mean and variance
AUGMENTATION = "augmentation"
_WINDOW = 16  # groups of images, as shards, that are shuffled together


class Streams:
    """The streams of one run.

    Args:
        seed: of the initial weights and of dropout.
        data_seed: of image order, noise levels, noise, flips and label dropout.
        device: on which the numbers of a step are drawn.

    Attributes:
        generators: of each stream on the device, by name: "levels", "noise", "flips", "labels", "references",
            "latents", "augmentation".
        epoch_levels: seed of noise levels that are stratified over an epoch, which the host draws.
    """

    def __init__(self, seed: int, data_seed: int, device: torch.device) -> None:
        self.initialisation = _derived(seed, 0)
        self._dropout = _derived(seed, 1)
        self._data = {name: _derived(data_seed, 2 + index) for index, name in enumerate((_ORDER, *DEVICE_STREAMS))}
        self.epoch_levels = _derived(data_seed, 2 + len(self._data))
        for name in (REFERENCES, LATENTS, AUGMENTATION):
            self._data[name] = _derived(data_seed, 3 + len(self._data))
        self._order = torch.Generator()
        # One for each stream, as a CUDA graph draws from all of them and cannot seed a generator.
        self.generators = {
            name: torch.Generator(device) for name in (*DEVICE_STREAMS, REFERENCES, LATENTS, AUGMENTATION)
        }

    def seed(self, step: int) -> None:
        """Set the generators of all streams on the device to a step."""
        for name, generator in self.generators.items():
            generator.manual_seed(self._data[name] + step)

    def order(self, epoch: int, size: int) -> Tensor:
        """A shuffled pass over `size` images. int64 [size], on the CPU."""
        return torch.randperm(size, generator=self._order.manual_seed(self._data[_ORDER] + epoch))

    def order_by_groups(self, groups: Tensor) -> Callable[[int, int], Tensor]:
        """A function like `order`, for images in groups that are best read together, as shards.

        The groups are shuffled, and the images of 16 groups at a time among each other: a pass then reads from few
        shards at a time, which the operating system keeps in memory.

        Args:
            groups: of each image, int64 [N], 0 and up.
        """

        def order(epoch: int, size: int) -> Tensor:
            rows = self.order(epoch, size)
            places = torch.randperm(int(groups.max()) + 1, generator=self._order)  # goes on after `rows`
            return rows[(places[groups[rows]] // _WINDOW).argsort(stable=True)]

        return order

    def seed_dropout(self, step: int, part: int) -> None:
        """Seed torch's global generators, from which dropout draws."""
        torch.manual_seed(_derived(self._dropout, step, part))


class ShuffledIndices:
    """Image indices of each step: one shuffled pass after another, every batch full.

    Args:
        order: (epoch, size) → a permutation of the indices, [size].
        size: number of images.
        batch_size: of the global batch.
        device: to which the indices of each pass are moved once.
    """

    def __init__(self, order: Callable[[int, int], Tensor], size: int, batch_size: int, device: torch.device) -> None:
        self.batch_size = batch_size
        self._order = order
        self._size = size
        self._device = device
        self._passes: dict[int, Tensor] = {}

    def at(self, step: int) -> Tensor:
        """The indices of step 0, 1, ... int64 [batch_size]."""
        start = step * self.batch_size
        end = start + self.batch_size
        epochs = range(start // self._size, (end - 1) // self._size + 1)
        self._passes = {epoch: self._passes[epoch] if epoch in self._passes else self._moved(epoch) for epoch in epochs}
        parts = [self._passes[e][max(start - e * self._size, 0) : end - e * self._size] for e in epochs]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _moved(self, epoch: int) -> Tensor:
        order = self._order(epoch, self._size)
        if self._device.type == "cuda":
            order = order.pin_memory()  # from other memory the host would wait for the copy
        return order.to(self._device, non_blocking=True)


@contextmanager
def own_global_state(device: torch.device, *, deterministic: bool, tf32: bool) -> Iterator[None]:
    """Restore torch's global generators and choice of algorithms on exit.

    Args:
        device: of the run.
        deterministic: deterministic algorithms only; otherwise cuDNN's benchmark mode chooses the fastest.
        tf32: on a CUDA device, let convolutions and matrix products of float32 numbers round their factors to TF32.
    """
    was_deterministic, was_trying = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    was_tf32, was_precision = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if deterministic:  # only then: the call imports the compiler, which takes a second
            torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = not (was_deterministic or deterministic)
        if device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = tf32
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            yield
        finally:
            if deterministic:
                torch.use_deterministic_algorithms(was_deterministic)
            torch.backends.cudnn.benchmark = was_trying
            if device.type == "cuda":
                torch.backends.cudnn.allow_tf32 = was_tf32
                torch.set_float32_matmul_precision(was_precision)


def _derived(*key: int) -> int:
    """A seed that depends on all of `key`, with room to add the step."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 2)
