"""Stopping on SIGTERM and SIGINT: the run ends after the current step, with a checkpoint."""

import signal
import threading
from types import FrameType, TracebackType

import torch
from torch import Tensor

from .distributed import Ranks

EXIT_BY_SIGNAL = 128  # + the signal's number, as in shells and schedulers: SIGTERM 143, SIGINT 130


class Stopped(Exception):
    """A run was stopped by a signal, after writing a checkpoint.

    Attributes:
        signal: its number.
        exit_code: what the process should return.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number
        self.exit_code = EXIT_BY_SIGNAL + number


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
            raise KeyboardInterrupt
        self._received = number
