"""Everything that depends on the number of processes.

Under `torchrun` every process trains the same network on its slice of the same batch.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Ranks:
    """This process's rank, and collectives over all ranks."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress; exactly one does."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over ranks; every rank must call it."""
        if self.size == 1:
            return values
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total / self.size

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over ranks."""
        for parameter in parameters if self.size > 1 else ():
            if parameter.grad is not None:
                parameter.grad = self.mean(parameter.grad)

    def gather(self, text: str) -> list[str]:
        """The text of every rank, in rank order; every rank must call it."""
        if self.size == 1:
            return [text]
        found = [""] * self.size
        torch.distributed.all_gather_object(found, text)
        return found

    def from_main(self, make: Callable[[], _Made]) -> _Made:
        """Call `make` in the main process and return its result on every rank; every rank must call it.

        An exception in `make` is raised on every rank.
        """
        if self.size == 1:
            return make()
        shared: list[Any] = [None]
        if self.is_main:
            try:
                shared = [make()]
            except Exception as error:  # the other ranks wait for the broadcast
                shared = [error]
        torch.distributed.broadcast_object_list(shared, src=0)
        if isinstance(shared[0], Exception):
            raise shared[0]
        made: _Made = shared[0]
        return made

    def wait(self) -> None:
        """Barrier: wait until every rank has called it."""
        if self.size > 1:
            torch.distributed.barrier()


@contextmanager
def ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started: gloo on CPUs, NCCL on GPUs; a single process without torchrun.

    An existing process group is used, and not destroyed.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        yield _current()
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield _current()
    finally:
        torch.distributed.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process, if several processes share a run on "cuda"."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def _current() -> Ranks:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), local_rank)
