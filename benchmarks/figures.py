"""The figures that the design asks for (DESIGN §6), judged from the results of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import past_cache
import training_step
from measurements import Measurement, Results


class Figure(NamedTuple):
    """One figure: what it is about, what was asked for, what was found."""

    title: str
    required: str
    found: str  # or why there is nothing
    passed: bool | None  # None: not measured, or reported only


def judge(results: Results) -> list[Figure]:
    """All figures for the device of a run, in the design's order."""
    return [*(_gpu(results) if "compute_capability" in results.machine else _cpu(results))]


def _figure(
    results: Results,
    title: str,
    required: str,
    key: tuple[str, str, str, str],
    read: Callable[[Measurement], float | None],
    good: Callable[[float], bool] | None,
    show: Callable[[float], str],
) -> Figure:
    """A figure read from one measurement. `good` None: reported only."""
    measurement = results.find(*key)
    if measurement is None:
        reasons = [
            f"{entry.kind}: {entry.reason}"
            for entry in results.not_measured
            if (entry.case, entry.dtype, entry.mode, entry.provider) == key
        ]
        return Figure(title, required, f"not measured: {'; '.join(reasons) or 'was not selected'}", None)
    value = read(measurement)
    if value is None:
        return Figure(title, required, "not measured: what it is compared with has no figure", None)
    return Figure(title, required, show(value), None if good is None else good(value))


def _faster(results: Results, title: str, key: tuple[str, str, str, str], other: str, least: float | None) -> Figure:
    def read(measurement: Measurement) -> float | None:
        found = measurement.times_as_fast_as.get(other)
        return None if found is None else found.value

    required = "reported" if least is None else f"≥ {least:g} ×"
    good = None if least is None else lambda value: value >= least
    return _figure(results, f"{title}, against {other}", required, key, read, good, lambda value: f"{value:.2f} ×")


def _copy_share(results: Results, title: str, key: tuple[str, str, str, str], least: float | None) -> Figure:
    required = "reported" if least is None else f"≥ {least:.0%} of copy"
    good = None if least is None else lambda value: value >= least
    return _figure(results, title, required, key, lambda m: m.share_of_copy, good, lambda value: f"{value:.1%}")


def _step_cost(results: Results, name: str) -> Figure:
    """Cost of adaptive weighting in a training step, with the standard error of what was found."""
    key = (*training_step.CONTEST, name)
    measurement = results.find(*key)
    mse = None if measurement is None else measurement.times_as_fast_as.get("mse_loss")
    step = "" if measurement is None else f" of {1e3 * measurement.wall.median:.1f} ms"
    return _figure(
        results, f"training step{step}, {name}: cost over mse_loss", "< 1 %", key,
        lambda m: None if mse is None else 1 / mse.value - 1, lambda value: value < 0.01,
        lambda value: f"{value:+.2%} (± {mse.error if mse else 0:.2%})",
    )  # fmt: skip


def _cpu(results: Results) -> Iterator[Figure]:
    key = ("cifar-128", "fp32", "fused", "native")
    for other, least in (("hand_written", 5.0), ("hand_written_compiled", 2.0), ("mse_loss", 1.2)):
        yield _faster(results, "CIFAR batch 128 fp32, native", key, other, least)
    for call, least_share in ((past_cache.KERNEL, 0.95), (past_cache.CALL, None)):
        title = f"past the last-level cache, native, {call}"
        yield _copy_share(results, title, (*past_cache.CONTEST, f"native, {call}"), least_share)
    yield _step_cost(results, "native")


def _gpu(results: Results) -> Iterator[Figure]:
    for name, host_limit, forward_limit in (("native", 65e-6, 1), ("triton", 90e-6, 2)):
        for dtype in ("fp32", "bf16"):
            title = f"2 GiB tensors {dtype}, {name}"
            yield _copy_share(results, f"{title}, 3 moves", ("huge", dtype, "fused", name), 0.9)
            yield _copy_share(results, f"{title}, 5 moves", ("huge", dtype, "deferred", name), None)
        yield from _gpu_small(results, name, host_limit, forward_limit)
        yield _figure(
            results, f"2 GiB tensors fp32, {name}: peak memory", "≤ 1.02 gradients", ("huge", "fp32", "fused", name),
            lambda m: None if m.peak_bytes is None else 3 * m.peak_bytes / m.bytes, lambda value: value <= 1.02,
            lambda value: f"{value:.3f} gradients",
        )  # fmt: skip
        yield _step_cost(results, name)


def _gpu_small(results: Results, name: str, host_limit: float, forward_limit: int) -> Iterator[Figure]:
    title, fused = f"CIFAR batch 512 fp32, {name}", ("cifar-512", "fp32", "fused", name)
    yield _figure(
        results, f"{title}: host time", f"≤ {host_limit * 1e6:.0f} µs", fused, lambda m: m.host.median,
        lambda value: value <= host_limit, lambda value: f"{value * 1e6:.1f} µs",
    )  # fmt: skip
    for other, least in (
        ("hand_written", 5.0), ("hand_written_compiled", 1.3), ("hand_written_reduce_overhead", None)
    ):  # fmt: skip
        yield _faster(results, title, fused, other, least)
    replay = ("cifar-512", "fp32", "graph", name)
    yield _figure(
        results, f"{title}: graph replay", "≤ 20 µs", replay, lambda m: m.wall.median,
        lambda value: value <= 20e-6, lambda value: f"{value * 1e6:.1f} µs",
    )  # fmt: skip
    yield _faster(results, f"{title}: graph replay", replay, "hand_written", 10.0)
    forward = results.find("cifar-512", "fp32", "forward", name)
    both = results.find("cifar-512", "fp32", "fused", name)
    yield _figure(
        results, f"{title}: launches forward", f"≤ {forward_limit}", ("cifar-512", "fp32", "forward", name),
        lambda m: m.launches, lambda value: value <= forward_limit, lambda value: f"{value:.0f}",
    )  # fmt: skip
    launched = None if forward is None or both is None else (both.launches or 0) - (forward.launches or 0)
    yield _figure(
        results, f"{title}: launches backward", "≤ 1", fused,
        lambda m: launched, lambda value: value <= 1, lambda value: f"{value:.0f}",
    )  # fmt: skip
