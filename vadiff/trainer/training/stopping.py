"""Stopping on SIGTERM and SIGINT: a run ends after the current step, with a checkpoint; other work at once."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

import torch
from torch import Tensor

from ...errors import Stopped
from .distributed import Ranks


@contextlib.contextmanager
def stoppable(how_to_go_on: str | Callable[[], str]) -> Iterator[None]:
    """Make SIGTERM and SIGINT end the `with` block as `Stopped`, with a message of how to go on.

    For work of one process only: under torchrun a process that waits for another one would not see the signal.

    Args:
        how_to_go_on: what is kept, and what to do; a function is called after the signal.
    """
    received = signal.SIGINT

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = signal.Signals(number)
        raise KeyboardInterrupt

    catches = threading.current_thread() is threading.main_thread()  # the only thread that can catch signals
    previous = signal.signal(signal.SIGTERM, receive) if catches else None
    try:
        yield
    except KeyboardInterrupt:
        told = how_to_go_on if isinstance(how_to_go_on, str) else how_to_go_on()
        raise Stopped(f"stopped by {received.name}; {told}", received) from None
    finally:
        if catches:
            signal.signal(signal.SIGTERM, previous)


class StopRequest:
    """Catches SIGTERM and SIGINT inside a `with`, and makes all ranks stop after the same step.

    The ranks agree by an all-reduce of one number on the CPUs, started at one step and read at the next, so that no
    rank waits for a device. A second SIGINT ends the process at once.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._received = 0
        self._previous: dict[int, object] = {}
        self._group = torch.distributed.new_group(backend="gloo") if ranks.size > 1 else None
        self._pending: tuple[Tensor, torch.distributed.Work] | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # the only thread that can catch signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None and self._pending is not None:
            self._pending[1].wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self) -> int:
        """The signal on which all ranks stop now; 0 to go on. Must be called once per step."""
        if self._group is None:
            return self._received
        before = self._pending
        flag = torch.tensor([self._received])
        work = torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (flag, work)
        if before is None:
            return 0
        flag, work = before
        work.wait()
        return int(flag)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received == number == signal.SIGINT:
            raise KeyboardInterrupt("at once, by the second Ctrl-C: --resume goes on from the latest checkpoint")
        self._received = number
