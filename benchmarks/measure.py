"""Times of several functions that run in turns, so that variations of the machine's speed affect all of them alike.

One round calls each function a few times, in a new random order. Ratios are medians over rounds of quotients within a
round: a slowdown of the machine for longer than a round cancels.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch

Run = Callable[[], object]

_MANY_LAUNCHES = 128  # more than any function here: assumed if they cannot be counted
_QUEUE = 512  # launches that fit in a CUDA queue with room to spare; a fuller one would make the host wait
_CYCLES_PER_SECOND = 2e9  # of a GPU: only sets how long it is blocked while the host fills the queue


class Effort(NamedTuple):
    """How long to measure."""

    seconds: float  # for all functions of one race together
    min_rounds: int
    max_rounds: int
    sample_seconds: float  # calls within a round are repeated until they take this long

    @classmethod
    def of(cls, device: torch.device, quick: bool) -> Effort:
        if quick:
            return cls(0.2, 3, 5, 0.0)
        # A round on a GPU takes a few ms: a second holds hundreds, and gpu.sh needs time for its other tasks. On a CPU
        # the first call of a round has the caches of another function: five milliseconds suffice for a second call at
        # CIFAR's batch of 128.
        return cls(1.0, 15, 500, 2e-4) if device.type == "cuda" else cls(10.0, 7, 500, 5e-3)


class Times(NamedTuple):
    """Seconds per call of one function, one value per round."""

    wall: list[float]  # from the first call until the results are complete
    host: list[float]  # until the last call has returned; the same as `wall` on a CPU
    device: list[float] | None  # on the GPU, without gaps by the host; None on a CPU
    calls: int  # per round
    launches: int | None = None  # of one call on the GPU; None on a CPU or if they cannot be counted


class Spread(NamedTuple):
    """Median, 20th and 80th percentile over rounds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        p20, median, p80 = np.percentile(values, (20, 50, 80)).tolist()
        return cls(median, p20, p80)


class Ratio(NamedTuple):
    """A quotient of times, and its standard error."""

    value: float
    error: float


def ratio(numerator: list[float], denominator: list[float]) -> Ratio:
    """Median over rounds of numerator / denominator.

    The error is that of the median of normally distributed quotients, 1.253 sigma / sqrt(n), with sigma from the
    20th and 80th percentiles (1.683 sigma apart), which a few disturbed rounds do not move."""
    quotients = [a / b for a, b in zip(numerator, denominator, strict=True)]
    spread = Spread.of(quotients)
    return Ratio(spread.median, 1.253 * (spread.p80 - spread.p20) / 1.683 / math.sqrt(len(quotients)))


def race(runs: Mapping[str, Run], device: torch.device, effort: Effort) -> dict[str, Times]:
    """Time functions in turns, all of which have run before (compiled, checked)."""
    launches = {name: launches_of(run) for name, run in runs.items()} if device.type == "cuda" else {}
    lengths = {name: _warm_up(run, device, effort) for name, run in runs.items()}
    calls = {name: max(math.ceil(effort.sample_seconds / length), 1) for name, length in lengths.items()}
    for name, count in launches.items():
        calls[name] = min(calls[name], max(_QUEUE // (count or _MANY_LAUNCHES), 1))
    round_seconds = sum(length * calls[name] for name, length in lengths.items()) * (2 if launches else 1)
    rounds = min(max(int(effort.seconds / round_seconds), effort.min_rounds), effort.max_rounds)
    times = {name: Times([], [], [] if launches else None, calls[name], launches.get(name)) for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    deadline = time.perf_counter() + 1.2 * effort.seconds
    collects = gc.isenabled()
    gc.disable()
    try:
        for done in range(rounds):
            if done >= effort.min_rounds and time.perf_counter() > deadline:
                break  # the machine is slower than at warm-up
            shuffle(order)
            for name in order:
                _sample(runs[name], device, times[name])
    finally:
        if collects:
            gc.enable()
    return times


def _warm_up(run: Run, device: torch.device, effort: Effort) -> float:
    """Seconds of the fastest of some calls."""
    shortest, deadline = math.inf, time.perf_counter() + effort.seconds / 20
    for attempt in range(100):
        begin = time.perf_counter()
        run()
        _synchronize(device)
        now = time.perf_counter()
        shortest = min(shortest, now - begin)
        if attempt >= 2 and now > deadline:
            break
    return shortest


def _sample(run: Run, device: torch.device, times: Times) -> None:
    """One round's calls of one function."""
    _synchronize(device)
    begin = time.perf_counter()
    for _ in range(times.calls):
        run()
    returned = time.perf_counter()
    _synchronize(device)
    times.wall.append((time.perf_counter() - begin) / times.calls)
    times.host.append((returned - begin) / times.calls)
    if times.device is not None:
        times.device.append(_device_seconds(run, times.calls, returned - begin))


def _device_seconds(run: Run, calls: int, host_seconds: float) -> float:
    """Seconds per call between CUDA events. The GPU is blocked first, so that it never waits for the host."""
    hold = 2 * host_seconds + 2e-5
    while True:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(hold * _CYCLES_PER_SECOND))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        late = start.query()  # the GPU started before all was queued: waits would count
        end.synchronize()
        if not late or hold > 1.0:
            return start.elapsed_time(end) / 1e3 / calls
        hold *= 2


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def launches_of(run: Run) -> int | None:
    """Kernels, copies and fills that one call starts on the GPU.

    None if the profiler saw none, for example if the driver lets only administrators count: every call starts some."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()) or None


def peak_bytes_of(run: Run) -> int:
    """Peak GPU memory of one call, on top of what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before
