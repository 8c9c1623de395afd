"""When a criterion is checked for wrong noise levels and an untrained head, without making the host wait for a GPU."""

from __future__ import annotations

import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, distributed, nn

from ._ranks import number_of_ranks
from .errors import DiffusionLossWarning
from .level_checks import problem_with_levels
from .ops.problem import Bins
from .statistics import LogSNRStatistics

LOOKS = (200, 400, 1000, 2000, 4000, 8000, 16_000)
"""Recording calls after which a criterion is judged."""

_STRIDE = 8  # calls from one batch whose log-SNR is kept to the next; later a fiftieth of those to the next look
_RETRY = 16  # calls until a copy from the GPU is looked for again, or a capture may be over
_PATIENT = 1000  # calls in which a head with a gradient is not judged, because gradients may be accumulated so long
_READS = 10  # reads of the statistics likewise, where calls are not counted
_INTERNAL = tuple(str(Path(file).parent) + os.sep for file in (__file__, torch.__file__))

_HEAD_DOES_NOT_LEARN = (
    "the learned weighting has not changed in {period}: no optimizer trains it. Give it the parameters of the "
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
    seen: Tensor | None  # log-SNR of some batches
    unmoved: Tensor | None  # bool scalar: the learned head is what it was when it was first seen

    def on_host(self, non_blocking: bool) -> _Evidence:
        """Copies on the CPU; `non_blocking` from a GPU into pinned memory, complete when the stream has come there."""

        def copied(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to("cpu", non_blocking=non_blocking)

        return _Evidence(
            self.counts.to("cpu", non_blocking=non_blocking), self.outside.to("cpu", non_blocking=non_blocking),
            copied(self.seen), copied(self.unmoved),
        )  # fmt: skip


class Watch:
    """When a criterion is judged, and what was said already: each warning is given once, by rank 0.

    `DiffusionLoss` counts `left` down at every recording call outside of compiled code, and calls `look` when it is 0.
    Between two looks it keeps references to the log-SNR of some batches. On a CUDA device a look copies the evidence
    without waiting, and a later call judges the copy once it is complete; on other accelerators the few looks wait.
    Nothing is copied while a graph is captured. What a compiled or captured step records is judged by `read`, at the
    criterion's reads.
    """

    __slots__ = (
        "_batches", "_calls", "_ends", "_head", "_head_from", "_head_said", "_levels_said", "_looks", "_pending",
        "_reads", "_stride", "left",
    )  # fmt: skip

    def __init__(self, levels_said: bool = False, head_said: bool = False) -> None:
        self.left = self._stride = 1  # recording calls until `look`, and from one to the next
        self._calls = 0  # recording calls up to the last `look`
        self._looks = 0  # of `LOOKS`
        self._batches: list[Tensor] = []  # log-SNR [B] since the last of them
        self._ends = torch.empty(0)  # [2] lowest and highest log-SNR before, while all lie in [0, 1] like times
        self._head: Tensor | None = None  # the parameters of a learned weighting as they were first seen
        self._head_from = self._reads = 0  # calls until then, and reads since
        self._pending: tuple[torch.cuda.Event, _Evidence] | None = None
        self._levels_said, self._head_said = levels_said, head_said

    def __reduce__(self) -> tuple[type[Watch], tuple[bool, bool]]:
        """A copy of a criterion counts its own calls, and does not say again what was said."""
        return Watch, (self._levels_said, self._head_said)

    def look(self, criterion: Watched) -> None:
        """Keep a batch or, after as many calls as `LOOKS` says, judge the criterion; then set `left`."""
        self._calls += self._stride
        device = criterion.statistics.state.device
        if device.type == "meta" or not _is_first_rank():
            return  # and never again
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._wait(_RETRY)
            return
        self._keep_head(criterion)
        due = LOOKS[self._looks]
        if self._pending is not None:
            event, evidence = self._pending
            if not event.query():
                self._wait(_RETRY)
                return
            self._pending = None
        elif self._calls < due:
            if criterion._last_log_snr is not None:  # a copy: the caller may write into its memory
                self._batches.append(criterion._last_log_snr.detach().clone())
            self._wait(min(max(due // 50, _STRIDE), due - self._calls))
            return
        else:
            patient = self._calls - self._head_from < _PATIENT and _holds_gradient(criterion)
            evidence = self._evidence(criterion, None if patient else self._head)
            evidence = evidence.on_host(non_blocking=device.type == "cuda")
            self._batches.clear()
            if device.type == "cuda":
                self._pending = torch.cuda.current_stream(device).record_event(), evidence
                self._wait(_RETRY)
                return
        self._judge(criterion, evidence, f"{due - self._head_from:,} calls")
        self._looks += 1
        if self._looks < len(LOOKS) and not (self._levels_said and (self._head is None or self._head_said)):
            self._wait(_STRIDE)

    def read(self, criterion: Watched) -> None:
        """Judge the criterion now, waiting for the GPU: for reads of the statistics, which do so anyway."""
        if criterion.statistics.state.device.type == "meta" or not _is_first_rank():
            return
        self._keep_head(criterion)
        self._reads += 1
        head = self._head if self._reads > _READS and _calls_at_least(criterion, _PATIENT) else None
        evidence = self._evidence(criterion, head).on_host(non_blocking=False)
        self._judge(criterion, evidence, f"{_READS} reads of the statistics")

    def problem(self, criterion: Watched) -> str | None:
        """What is wrong with the noise levels now, said before or not; None if nothing is. Waits for the GPU."""
        return self._problem(criterion.statistics.bins, self._evidence(criterion, None).on_host(non_blocking=False))

    def _wait(self, calls: int) -> None:
        self.left = self._stride = calls

    def _keep_head(self, criterion: Watched) -> None:
        if self._head is None:
            self._head, self._head_from, self._reads = _head_of(criterion), max(self._calls - 1, 0), 0

    def _evidence(self, criterion: Watched, first_head: Tensor | None) -> _Evidence:
        counts, last = criterion.statistics.count, criterion._last_log_snr
        batches = [*self._batches, *([] if last is None else [last.detach()])]
        batches = [batch for batch in batches if batch.device == counts.device]
        seen = torch.cat(batches) if batches else None
        return _Evidence(counts, criterion.statistics.outside, seen, _unmoved(criterion, first_head))

    def _problem(self, bins: Bins, evidence: _Evidence) -> str | None:
        seen = self._ends if evidence.seen is None else torch.cat([self._ends, evidence.seen])
        times = len(seen) > 0 and bool(((seen >= 0) & (seen <= 1)).all())
        self._ends = torch.stack([seen.min(), seen.max()]) if times else torch.empty(0)
        return problem_with_levels(evidence.counts, bins, evidence.outside, seen if len(seen) else None)

    def _judge(self, criterion: Watched, evidence: _Evidence, period: str) -> None:
        problem = None if self._levels_said else self._problem(criterion.statistics.bins, evidence)
        if problem:
            self._levels_said = True
            warn_of(problem)
        if evidence.unmoved is not None and bool(evidence.unmoved) and not self._head_said:
            self._head_said = True
            warn_of(_HEAD_DOES_NOT_LEARN.format(period=period))


def judge_at_read(criterion: Any) -> None:
    """Warn of wrong noise levels and an untrained head where statistics are read, once for each criterion."""
    watch = getattr(criterion, "_watch", None)
    if watch is not None:
        watch.read(criterion)


def problem_of(criterion: Any) -> str | None:
    """What is wrong with the noise levels that a criterion was given, see `level_checks`; None if nothing is."""
    watch: Watch = getattr(criterion, "_watch", None) or Watch()
    return watch.problem(criterion)


def _is_first_rank() -> bool:
    """Whether this process warns. The statistics that it judges are merged over ranks."""
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _calls_at_least(criterion: Watched, calls: int) -> bool:
    """Whether the statistics hold the samples of so many calls, to 1 %. Waits for the GPU."""
    statistics, last = criterion.statistics, criterion._last_log_snr
    if last is None:
        return False
    samples = float(calls * len(last) * number_of_ranks())
    most = statistics.half_life * statistics.bins.size / math.log(2.0)  # effective number, with forgetting
    if math.isfinite(most):
        samples = -most * math.expm1(-samples / most)
    return statistics.count.sum().item() >= 0.99 * samples


def _unmoved(criterion: Watched, first_head: Tensor | None) -> Tensor | None:
    """Whether the learned head is bit for bit what it was, a bool on its device; None where that cannot be told."""
    head = _head_of(criterion) if first_head is not None else None
    if head is None or first_head is None or (head.shape, head.device, head.dtype) != (
        first_head.shape, first_head.device, first_head.dtype,
    ):  # fmt: skip
        return None
    return torch.eq(head, first_head).all()


def _parameters_of(criterion: Watched) -> list[nn.Parameter]:
    """The trainable parameters of a learned weighting; none for another one."""
    weighting = criterion.weighting
    return [p for p in weighting.parameters() if p.requires_grad] if isinstance(weighting, nn.Module) else []


def _head_of(criterion: Watched) -> Tensor | None:
    """A copy of the trainable parameters of a learned weighting, as one vector."""
    parameters = [p.detach().flatten() for p in _parameters_of(criterion)]
    return torch.cat(parameters) if parameters else None


def _holds_gradient(criterion: Watched) -> bool:
    """Whether the head has a gradient that an optimizer may still use, as while gradients are accumulated."""
    return any(p.grad is not None for p in _parameters_of(criterion))


def warn_of(message: str) -> None:
    """Warn at the line of the user's code that led here: the innermost outside of vadiff and torch."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, DiffusionLossWarning, stacklevel=level)
