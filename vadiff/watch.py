"""When a criterion is checked for wrong noise levels and an untrained head, without making the host wait for a GPU."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .errors import DiffusionLossWarning
from .level_checks import problem_with_levels
from .statistics import LogSNRStatistics

FIRST_LOOK, LAST_LOOK = 200, 12_800
"""Calls after which a criterion is judged: 200, 400, 800, ... 12,800."""

_RETRY = 16  # calls until a copy from the GPU is looked for again, or a capture may be over
_INTERNAL = (str(Path(__file__).parent), str(Path(torch.__file__).parent))

_HEAD_DOES_NOT_LEARN = (
    "the learned weighting has not changed in {calls:,} calls: no optimizer trains it. Give it the parameters of the "
    "criterion too, torch.optim.AdamW([*model.parameters(), *criterion.parameters()]), or use the weighting "
    "'loss_level', to which it would converge."
)


class Watched(Protocol):
    """The attributes of a `vadiff.DiffusionLoss` that are read here."""

    weighting: Any
    statistics: LogSNRStatistics
    _last_log_snr: Tensor | None


class _Evidence(NamedTuple):
    """Tensors from which a criterion is judged, on its device or copied to the host."""

    counts: Tensor
    outside: Tensor
    last: Tensor | None
    unmoved: Tensor | None  # bool scalar: the learned head is what it was at the first look

    def on_host(self, non_blocking: bool) -> _Evidence:
        """Copies on the CPU; `non_blocking` from a GPU into pinned memory, complete when the stream has come there."""

        def copied(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to("cpu", non_blocking=non_blocking)

        return _Evidence(
            self.counts.to("cpu", non_blocking=non_blocking), self.outside.to("cpu", non_blocking=non_blocking),
            copied(self.last), copied(self.unmoved),
        )  # fmt: skip


class Watch:
    """When a criterion is judged, and what was said already: each warning is given once.

    `DiffusionLoss` counts `left` down at every call outside of compiled code, and calls `look` when it is 0. On a GPU a
    look copies the evidence without waiting, and a later call judges the copy once it is complete. Nothing is copied
    while a graph is captured. What a compiled or captured step records is judged by `read`, at the criterion's reads.
    """

    __slots__ = ("_calls", "_head", "_head_said", "_levels_said", "_pending", "left")

    def __init__(self) -> None:
        self.left = 1  # calls until the next look
        self._calls = 1  # calls at the next look; 1: only the parameters of a learned head are kept
        self._head: Tensor | None = None
        self._pending: tuple[torch.cuda.Event, _Evidence] | None = None
        self._levels_said = self._head_said = False

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        """A copy of a criterion is watched anew."""
        return Watch, ()

    def look(self, criterion: Watched) -> None:
        """Judge the criterion if it can be done without waiting, and set `left` for the next look."""
        device = criterion.statistics.state.device
        if device.type not in ("cpu", "cuda"):
            return
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.left = _RETRY
            return
        if self._pending is None and self._calls == 1:
            self._head = _head_of(criterion)
            self._schedule(FIRST_LOOK)
            return
        if self._pending is None:
            evidence = _evidence(criterion, self._head).on_host(non_blocking=True)
            if device.type == "cuda":
                self._pending = torch.cuda.current_stream(device).record_event(), evidence
        else:
            event, evidence = self._pending
            if event.query():
                self._pending = None
        if self._pending is not None:
            self.left = _RETRY
            return
        self._judge(criterion, evidence)
        if 2 * self._calls <= LAST_LOOK and not (self._levels_said and self._head_said):
            self._schedule(2 * self._calls)

    def read(self, criterion: Watched) -> None:
        """Judge the criterion now, waiting for the GPU: for reads of the statistics, which do so anyway."""
        if not self._levels_said and criterion.statistics.state.device.type != "meta":
            self._judge(criterion, _evidence(criterion, None).on_host(non_blocking=False))

    def _schedule(self, calls: int) -> None:
        self.left, self._calls = calls - self._calls, calls

    def _judge(self, criterion: Watched, evidence: _Evidence) -> None:
        counts, outside, last, unmoved = evidence
        if not self._levels_said:
            problem = problem_with_levels(counts, criterion.statistics.bins, outside, last)
            if problem:
                self._levels_said = True
                _warn(problem)
        if unmoved is not None and bool(unmoved) and not self._head_said:
            self._head_said = True
            _warn(_HEAD_DOES_NOT_LEARN.format(calls=self._calls))


def judge_at_read(criterion: Any) -> None:
    """Warn of wrong noise levels where statistics are read, once for each criterion."""
    watch = getattr(criterion, "_watch", None)
    if watch is not None:
        watch.read(criterion)


def _evidence(criterion: Watched, first_head: Tensor | None) -> _Evidence:
    statistics = criterion.statistics
    return _Evidence(statistics.count, statistics.outside, criterion._last_log_snr, _unmoved(criterion, first_head))


def _unmoved(criterion: Watched, first_head: Tensor | None) -> Tensor | None:
    """Whether the learned head is bit for bit what it was, a bool on its device; None where that cannot be told."""
    head = _head_of(criterion) if first_head is not None else None
    if head is None or first_head is None or (head.shape, head.device, head.dtype) != (
        first_head.shape, first_head.device, first_head.dtype,
    ):  # fmt: skip
        return None
    return torch.eq(head, first_head).all()


def _head_of(criterion: Watched) -> Tensor | None:
    """A copy of the trainable parameters of a learned weighting, as one vector."""
    weighting = criterion.weighting
    if not isinstance(weighting, nn.Module):
        return None
    parameters = [p.detach().flatten() for p in weighting.parameters() if p.requires_grad]
    return torch.cat(parameters) if parameters else None


def _warn(message: str) -> None:
    """Warn at the line of the user's code that led here: the innermost outside of vadiff and torch."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, DiffusionLossWarning, stacklevel=level)
