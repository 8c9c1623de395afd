"""Where the images of a step come from: memory of the device, or processes that read ahead.

The order of the images is a function of seed and step. A resumed run therefore reads the images that it would have read
without the interruption, also with another number of ranks or of reading processes, and no loader has a state to save.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ...errors import DataError, TrainingError
from ..config import TrainConfig
from ..data import Samples
from .distributed import Ranks
from .streams import ShuffledIndices

MOST_WORKERS = 8
_BATCHES_AHEAD = 2  # of each worker


class Shares:
    """Which rows of the global batch are this rank's: for each part of a batch one slice.

    Raises:
        ValueError: the batch cannot be divided evenly.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        if config.batch_size % (config.accumulate * ranks.size):
            raise ValueError(
                f"batch_size is {config.batch_size}, expected a multiple of accumulate × ranks = "
                f"{config.accumulate} × {ranks.size}"
            )
        self.parts = config.accumulate
        self.size = config.batch_size // config.accumulate // ranks.size  # rows in each part
        self._ranks = ranks

    def of(self, part: int) -> slice:
        """The rows of a part in the global batch."""
        start = (part * self._ranks.size + self._ranks.rank) * self.size
        return slice(start, start + self.size)

    def mine(self, rows: Tensor) -> Tensor:
        """This rank's rows of a global batch, part by part."""
        return torch.cat([rows[self.of(part)] for part in range(self.parts)])


class Source(Protocol):
    """Gives the stored images of each part of a batch."""

    @property
    def kind(self) -> str:
        """Which kind of source it is, for checkpoints."""

    @property
    def bad(self) -> set[int]:
        """Rows that could not be read so far, and were replaced."""

    def prepare(self, step: int) -> None:
        """What the host does for the batch of step 0, 1, ..."""

    def part(self, number: int) -> tuple[Tensor, Tensor]:
        """Stored images [n, ...] of a part, and the rows [n] int64 that they are of; work of the device alone."""

    def close(self) -> None:
        """End the processes that read. No step follows."""


class OnDevice:
    """All images are in the device's memory.

    Args:
        images: [N, ...] on the device.
        indices: rows of each step, on the device.
        shares: of this rank.
    """

    kind = "device"

    def __init__(self, images: Tensor, indices: ShuffledIndices, shares: Shares) -> None:
        self.images = images
        self.bad: set[int] = set()
        self._indices, self._shares = indices, shares
        self._chosen = torch.empty(indices.batch_size, dtype=torch.int64, device=images.device)

    def prepare(self, step: int) -> None:
        self._chosen.copy_(self._indices.at(step))

    def part(self, number: int) -> tuple[Tensor, Tensor]:
        rows = self._chosen[self._shares.of(number)]
        return self.images[rows], rows

    def close(self) -> None:
        pass


class ReadAhead:
    """Worker processes read this rank's images of the next steps; a GPU gets those of the next step during this one.

    The memory that it takes is that of two batches for each worker, and of two on a GPU.

    Args:
        samples: read from files, or kept in memory of the host.
        indices: rows of each step, on the host.
        shares: of this rank.
        device: where the images go.
        workers: number of processes; 0 reads in this one, when a batch is needed.
    """

    kind = "read ahead"

    def __init__(
        self, samples: Samples, indices: ShuffledIndices, shares: Shares, device: torch.device, workers: int
    ) -> None:
        self.bad: set[int] = set()
        self._samples, self._indices, self._shares = samples, indices, shares
        self._workers = workers
        self._to_device = _Copies(device)
        self._loader: Iterator[_Loaded | DataError] | None = None
        self._error: DataError | None = None
        self._step = self._loader_is_at = -1  # the step prepared last; the one whose images the loader gives next

    def prepare(self, step: int) -> None:
        """Wait for the images of a step. Steps that follow one another are read ahead.

        Raises:
            DataError: a file cannot be read; the message names it.
        """
        if step == self._step:
            return
        if self._loader is None or step != self._step + 1:
            self._loader, self._loader_is_at, self._error = self._from(step), step, None
        if self._loader_is_at == step:
            self._fetch()
        if self._error is not None:
            raise self._error
        self._step = step
        self._to_device.finish()
        if self._to_device.runs_ahead:
            self._fetch()

    def part(self, number: int) -> tuple[Tensor, Tensor]:
        mine = slice(number * self._shares.size, (number + 1) * self._shares.size)
        return self._to_device.stored[mine], self._to_device.rows[mine]

    def close(self) -> None:
        self._loader = None

    def _fetch(self) -> None:
        """Take the images of the next step. An error waits until that step is asked for: there may be none."""
        assert self._loader is not None
        loaded = next(self._loader)
        self._loader_is_at += 1
        if isinstance(loaded, DataError):
            self._error = loaded
            return
        self.bad.update(loaded.asked[loaded.asked != loaded.rows].tolist())
        self._to_device.start(loaded)

    def _from(self, step: int) -> Iterator["_Loaded | DataError"]:
        options: dict[str, Any] = {}
        if self._workers:
            options = {"prefetch_factor": _BATCHES_AHEAD, "worker_init_fn": _leave_group}
        return iter(
            DataLoader(
                Rows(self._samples), batch_size=None, sampler=_RowsOfSteps(self._indices, self._shares, step),
                num_workers=self._workers, pin_memory=self._to_device.runs_ahead, **options,
            )
        )  # fmt: skip


class _Loaded(NamedTuple):
    stored: Tensor  # [n, ...]
    rows: Tensor  # int64 [n], which they are
    asked: Tensor  # int64 [n], differs where a picture could not be read


class Rows(Dataset[Any]):
    """Reads the images of the rows that it is asked for. Errors are returned: a worker would add its traceback."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitem__(self, rows: Tensor) -> _Loaded | DataError:
        try:
            read = getattr(self._samples, "read", None)  # of pictures, which may replace bad ones
            stored, found = (self._samples[rows], rows) if read is None else read(rows)
            return _Loaded(stored, found, rows)
        except DataError as error:
            return error


class _RowsOfSteps(Sampler[Tensor]):
    """This rank's rows of each step from `first` on, without end."""

    def __init__(self, indices: ShuffledIndices, shares: Shares, first: int) -> None:
        self._indices, self._shares, self._first = indices, shares, first

    def __iter__(self) -> Iterator[Tensor]:
        step = self._first
        while True:
            yield self._shares.mine(self._indices.at(step))
            step += 1


class _Copies:
    """The images of a step where the network needs them: on a CPU as they were read, on a GPU always in one place.

    On a GPU the images of the next step travel on a stream of their own while this step is computed. They are then
    copied, on the device, to where a captured step expects them.
    """

    stored: Tensor
    rows: Tensor

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.runs_ahead = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.runs_ahead else None
        self._next: tuple[Tensor, Tensor] | None = None

    def start(self, loaded: _Loaded) -> None:
        if self._stream is None:
            self._next = loaded.stored, loaded.rows
            return
        with torch.cuda.stream(self._stream):
            self._next = (
                loaded.stored.to(self._device, non_blocking=True),
                loaded.rows.to(self._device, non_blocking=True),
            )

    def finish(self) -> None:
        assert self._next is not None
        stored, rows = self._next
        if self._stream is None:
            self.stored, self.rows = stored, rows
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in (stored, rows):
            tensor.record_stream(current)
        if not hasattr(self, "stored"):
            self.stored, self.rows = torch.empty_like(stored), torch.empty_like(rows)
        self.stored.copy_(stored)
        self.rows.copy_(rows)


@contextmanager
def reading_processes_named() -> Iterator[None]:
    """Say what it means that torch raises because a process of its loader has ended.

    Raises:
        TrainingError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            f"a process that reads images has ended, perhaps for want of memory: {error}. Go on from the last "
            "checkpoint with --resume and fewer --workers"
        ) from error


def default_workers() -> int:
    """One reading process per CPU of the rank, 8 at most."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cpus // ranks_here()))


def ranks_here() -> int:
    """The number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _leave_group(_: int) -> None:
    """Leave signals to a group of processes, as Ctrl-C is one, to the training process: it ends its workers."""
    os.setpgrp()
