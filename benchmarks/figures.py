"""The figures that the design requires (DESIGN §6), judged from the results of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import past_cache
import training_step
from cases import Contest
from measurements import Measurement, Results


class Figure(NamedTuple):
    """One figure: title, required value, measured value."""

    title: str
    required: str
    found: str  # or why it was not measured
    passed: bool | None  # None: not measured, or reported only

    @property
    def measured(self) -> bool:
        return self.passed is not None or _NOT_MEASURED not in self.found


_NOT_MEASURED = "not measured: "

_SMALL = Contest("small", "fp32", "fused")
_CIFAR = Contest("cifar-512", "fp32", "fused")
# Contests with the design's figures, most important first: if time runs out, the last are missing. (No figure of a GPU
# needs cifar-128, but it is a common case.)
CONTESTS = {
    "cpu": [Contest("cifar-128", "fp32", "fused"), _SMALL, *training_step.SIZES["cpu"], past_cache.CONTEST],
    "cuda": [
        Contest("huge", "fp32", "fused"),
        _CIFAR,
        _CIFAR._replace(mode="graph"),
        _CIFAR._replace(mode="forward"),
        *training_step.SIZES["cuda"],
        Contest("cifar-128", "fp32", "fused"),
        Contest("huge", "bf16", "fused"),
        Contest("huge", "fp32", "deferred"),
        Contest("huge", "bf16", "deferred"),
    ],
}


# Allowed extra time of a training step over `F.mse_loss`, by its size.
_STEP_COSTS = {
    "cpu": {Contest("unet-8", "fp32", training_step.MODE): 0.02, Contest("unet-64", "fp32", training_step.MODE): 0.01},
    "cuda": {Contest("unet-512", "fp32", training_step.MODE): 0.01},
}


def judge(results: Results) -> list[Figure]:
    """All figures for the device of a run, in the design's order."""
    return [*(_gpu(results) if "compute_capability" in results.machine else _cpu(results))]


def judge_training_loop(title: str, modes: Mapping[str, Mapping[str, float]]) -> list[Figure]:
    """The figures of vadiff's own training step on a GPU, of the fastest modes that `training_loop.py` has measured."""

    def of_fastest(quantity: str, required: str, key: str, show: str, good: Callable[[float], bool]) -> Figure:
        fast = {mode: found for mode, found in modes.items() if mode != "eager" and key in found}
        if not fast:
            return Figure(
                f"{title}: {quantity}", required, f"{_NOT_MEASURED}no captured or compiled mode beside eager", None
            )
        mode = max(fast, key=lambda name: fast[name]["images_per_second"])
        value = fast[mode][key]
        return Figure(f"{title}: {quantity}", required, f"{mode} {value:{show}}", good(value))

    return [
        of_fastest("images/s over eager", "≥ 1.5 ×", "times_eager", ".2f", lambda value: value >= 1.5),
        of_fastest("criterion's share", "< 1 %", "criterion_percent", "+.2f", lambda value: value < 1.0),
    ]


def verdict(found: list[Figure]) -> str:
    """How many figures hold, in one line that also says what is not known."""
    held, missed = ([figure.passed for figure in found].count(passed) for passed in (True, False))
    missing = [figure.title for figure in found if not figure.measured]
    names = f" ({'; '.join([*missing[:2], *('…' for _ in missing[2:3])])})" if missing else ""
    return f"figures: {held} held, {missed} missed, {len(missing)} not measured{names}"


def _figure(
    results: Results,
    title: str,
    required: str,
    key: tuple[str, str, str, str],
    read: Callable[[Measurement], float | None],
    good: Callable[[float], bool] | None,
    show: Callable[[float], str],
    without: str = "the provider to compare with was not measured",
) -> Figure:
    """A figure from one measurement. `good` None: reported only; `without`: the reason if `read` returns None."""
    measurement = results.find(*key)
    if measurement is None:
        reasons = [
            f"{entry.kind}: {entry.reason}"
            for entry in results.not_measured
            if (entry.case, entry.dtype, entry.mode, entry.provider) == key
        ]
        return Figure(title, required, f"{_NOT_MEASURED}{'; '.join(reasons) or 'was not selected'}", None)
    value = read(measurement)
    if value is None:
        return Figure(title, required, f"{_NOT_MEASURED}{without}", None)
    return Figure(title, required, show(value), None if good is None else good(value))


def _faster(results: Results, title: str, key: tuple[str, str, str, str], other: str, least: float | None) -> Figure:
    def read(measurement: Measurement) -> float | None:
        found = measurement.times_as_fast_as.get(other)
        return None if found is None else found.value

    required = "reported" if least is None else f"≥ {least:g} ×"
    good = None if least is None else lambda value: value >= least
    return _figure(results, f"{title}, against {other}", required, key, read, good, lambda value: f"{value:.2f} ×")


def _times(
    results: Results, title: str, key: tuple[str, str, str, str], time: Callable[[Measurement], Any], most: float
) -> Figure:
    """Figure of the time relative to `F.mse_loss`."""
    mse = results.find(*key[:3], "mse_loss")
    return _figure(
        results, title, f"≤ {most:g} × mse_loss", key,
        lambda m: None if mse is None else time(m).median / time(mse).median, lambda value: value <= most,
        lambda value: f"{value:.2f} ×",
    )  # fmt: skip


def _copy_share(results: Results, title: str, key: tuple[str, str, str, str], least: float | None) -> Figure:
    required = "reported" if least is None else f"≥ {least:.0%} of copy"
    good = None if least is None else lambda value: value >= least
    return _figure(results, title, required, key, lambda m: m.share_of_copy, good, lambda value: f"{value:.1%}")


def _step_costs(results: Results, name: str, device_type: str) -> Figure:
    """Costs of adaptive weighting in a training step of each size, with their standard errors."""
    limits = _STEP_COSTS[device_type]
    shares = [_step_cost(results, contest, name, limit) for contest, limit in limits.items()]
    verdicts = {share.passed for share in shares}
    passed = False if False in verdicts else None if None in verdicts else True
    found = "; ".join(f"{share.title}: {share.found}" for share in shares)
    required = ", ".join(
        f"{contest.case.replace('unet-', 'batch ')} < {limit:.0%}" for contest, limit in limits.items()
    )
    return Figure(f"training step, {name}: cost over mse_loss", required, found, passed)


def _step_cost(results: Results, contest: Contest, name: str, limit: float) -> Figure:
    measurement = results.find(*contest, name)
    mse = None if measurement is None else measurement.times_as_fast_as.get("mse_loss")
    step = "" if measurement is None else f", {1e3 * measurement.wall.median:.1f} ms"
    return _figure(
        results, f"{contest.case.replace('unet-', 'batch ')}{step}", f"< {limit:.0%}", (*contest, name),
        lambda m: None if mse is None else 1 / mse.value - 1, lambda value: value < limit,
        lambda value: f"{value:+.2%} (± {mse.error if mse else 0:.2%})",
    )  # fmt: skip


def _cpu(results: Results) -> Iterator[Figure]:
    key = ("cifar-128", "fp32", "fused", "native")
    for other, least in (("hand_written", 5.0), ("hand_written_compiled", 2.0), ("mse_loss", 1.2)):
        yield _faster(results, "CIFAR batch 128 fp32, native", key, other, least)
    yield _times(results, "small call, 16 × 4 × 8 × 8 fp32, native: time", (*_SMALL, "native"), lambda m: m.wall, 1.5)
    for call, least_share in ((past_cache.KERNEL, 0.95), (past_cache.CALL, None)):
        title = f"past the last-level cache, native, {call}"
        yield _copy_share(results, title, (*past_cache.CONTEST, f"native, {call}"), least_share)
    yield _step_costs(results, "native", "cpu")


def _gpu(results: Results) -> Iterator[Figure]:
    for name, host_limit, forward_limit in (("native", 1.5, 1), ("triton", 3.0, 2)):
        for dtype in ("fp32", "bf16"):
            title = f"2 GiB tensors {dtype}, {name}"
            yield _copy_share(results, f"{title}, 3 moves", ("huge", dtype, "fused", name), 0.9)
            yield _copy_share(results, f"{title}, 5 moves", ("huge", dtype, "deferred", name), None)
        yield from _gpu_small(results, name, host_limit, forward_limit)
        yield _figure(
            results, f"2 GiB tensors fp32, {name}: peak memory", "≤ 1.02 gradients", ("huge", "fp32", "fused", name),
            lambda m: 3 * m.peak_bytes / m.bytes if m.peak_bytes else None, lambda value: value <= 1.02,
            lambda value: f"{value:.3f} gradients", without="the allocator counted nothing",
        )  # fmt: skip
        yield _step_costs(results, name, "cuda")


def _gpu_small(results: Results, name: str, host_limit: float, forward_limit: int) -> Iterator[Figure]:
    title, fused = f"CIFAR batch 512 fp32, {name}", (*_CIFAR, name)
    yield _times(results, f"{title}: host time", fused, lambda m: m.host, host_limit)
    for other, least in (
        ("hand_written", 3.0), ("hand_written_compiled", None), ("hand_written_reduce_overhead", None)
    ):  # fmt: skip
        yield _faster(results, title, fused, other, least)
    replay = ("cifar-512", "fp32", "graph", name)
    yield _figure(
        results, f"{title}: graph replay", "≤ 20 µs", replay, lambda m: m.wall.median,
        lambda value: value <= 20e-6, lambda value: f"{value * 1e6:.1f} µs",
    )  # fmt: skip
    yield _faster(results, f"{title}: graph replay", replay, "hand_written", 10.0)
    forward = ("cifar-512", "fp32", "forward", name)
    yield _launches(results, f"{title}: launches forward", forward_limit, forward, 0)
    before = results.find(*forward)
    yield _launches(results, f"{title}: launches backward", 1, fused, (before and before.launches) or None)


def _launches(results: Results, title: str, limit: int, key: tuple[str, str, str, str], before: int | None) -> Figure:
    """Launches beyond `before`, which another figure counts. None is a failed count, not a good one."""

    def read(measurement: Measurement) -> float | None:
        if before is None or not measurement.launches:
            return None
        return measurement.launches - before if measurement.launches > before else None

    return _figure(
        results, title, f"≤ {limit}", key, read, lambda value: value <= limit, lambda value: f"{value:.0f}",
        without="the profiler counted none (is it allowed to? see RmProfilingAdminOnly of the NVIDIA driver)",
    )  # fmt: skip
