"""A CPU backend on tensors larger than any cache, timed in the same rounds as copies.

Two calls: the backend's kernel alone, which writes its gradient into existing memory, and the whole call of a user with
gradient, which has to get new memory from the system for each gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from unittest import mock

import copy_bandwidth
import measure
import torch
from cases import MODES, Contest
from contest import make_batches, make_losses, refuse_wrong, speed_ratios
from measure import Effort, Run
from measurements import Measurement, NotMeasured
from providers import Batch, Loss, inputs_of, problem_of, state_of

from vadiff.ops import backends
from vadiff.statistics import LogSNRStatistics

CONTEST = Contest("huge", "fp32", "past-cache")
KERNEL, CALL = "kernel alone", "whole call"


class NoBufferTakenError(RuntimeError):
    """The backend did not write its gradient into the given buffer."""


def kernel_alone(backend: str, batches: list[Batch], gradient: torch.Tensor) -> Run:
    """The backend's function on the next batch, without operators and autograd.

    A backend has no argument for the gradient and allocates it by `torch.empty_like`, which is replaced during the call
    and returns `gradient` for tensors of that shape.

    Raises:
        NoBufferTakenError: raised by the call if the backend allocates in another way.
    """
    module = backends.select(backend, batches[0].prediction)
    statistics = LogSNRStatistics()
    problem, state = problem_of(statistics), state_of(statistics)
    rotation, empty_like = itertools.cycle(batches), torch.empty_like

    def allocate(like: torch.Tensor, **options: Any) -> torch.Tensor:
        return gradient if like.shape == gradient.shape else empty_like(like, **options)

    def run() -> None:
        batch = next(rotation)
        inputs = inputs_of(batch, batch.prediction)
        with mock.patch.object(torch, "empty_like", allocate), torch.no_grad():
            written = module.step(problem, inputs, state, gradient=True, update=True, gather=None).gradient
        if written.data_ptr() != gradient.data_ptr():
            raise NoBufferTakenError("the backend does not allocate its gradient by torch.empty_like")

    return run


def whole_call(loss: Loss, batches: list[Batch]) -> Run:
    """Forward and backward on the next batch; the gradient is dropped at once."""
    rotation, upstream = itertools.cycle(batches), torch.ones(())

    def run() -> None:
        batch = next(rotation)
        torch.autograd.grad(loss(batch, False), batch.prediction, upstream)

    return run


def hold(names: Iterable[str], *, quick: bool) -> list[Measurement | NotMeasured]:
    """As `contest.hold`, on the CPU, for backends of vadiff.

    Each backend gives two providers, "<backend>, kernel alone" and "<backend>, whole call"; each kind of copy is a
    provider too, with the bytes of the two tensors that it moves."""
    device = torch.device("cpu")
    batches = make_batches(Contest("cifar-512" if quick else CONTEST.case, CONTEST.dtype, "fused"), device, 2)
    gradient = torch.zeros_like(batches[0].target)
    copies, without = copy_bandwidth.copies(batches[0].target, gradient)
    outcomes: list[Measurement | NotMeasured] = [
        NotMeasured(*CONTEST, kind, "not usable", reason) for kind, reason in without.items()
    ]
    runs = dict(copies)
    losses, unusable = make_losses(CONTEST, names, device)
    for refusal in unusable + refuse_wrong(CONTEST, MODES["fused"], losses, batches):
        outcomes += [replace(refusal, provider=f"{refusal.provider}, {what}") for what in (KERNEL, CALL)]
    for name, loss in losses.items():
        runs[f"{name}, {CALL}"] = whole_call(loss, batches)
        alone = kernel_alone(name, batches, gradient)
        try:
            alone()
        except NoBufferTakenError as error:
            outcomes.append(NotMeasured(*CONTEST, f"{name}, {KERNEL}", "not usable", str(error)))
        else:
            runs[f"{name}, {KERNEL}"] = alone
    return outcomes + _timed(runs, list(copies), gradient, quick=quick)


def _timed(runs: dict[str, Run], kinds: list[str], gradient: torch.Tensor, *, quick: bool) -> list[Measurement]:
    times = measure.race(runs, gradient.device, Effort.of(gradient.device, quick))
    ratios = speed_ratios(times)
    found = []
    for name, measured in times.items():
        moves = 2 if name in kinds else 3
        # Relative to the faster copy in paired rounds: ratio of speeds times ratio of bytes.
        share = min(moves / 2 * (1.0 if kind == name else ratios[name][kind].value) for kind in kinds)
        measurement = Measurement.of(
            CONTEST, name, tuple(gradient.shape), measured,
            bytes=moves * gradient.nbytes, sets=2, times_as_fast_as=ratios[name],
        )  # fmt: skip
        measurement.share_of_copy = share
        found.append(measurement)
    return found
