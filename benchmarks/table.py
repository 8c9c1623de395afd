"""Results as text: the table of a run, grouped by contest, and the design's figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import past_cache
import training_step
from cases import MODES, Contest, moves_of
from figures import Figure
from measure import Ratio, Spread
from measurements import Measurement, NotMeasured, Results
from providers import PROVIDERS

_OTHER_TITLES = {
    training_step.MODE: "whole training step of a small U-Net, batch of {shape}",
    past_cache.CONTEST.mode: "past the last-level cache, 3 moves of {shape}; a copy: 2",
}


def grid(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows of cells as aligned lines: the first `left` columns left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def seconds(value: float) -> str:
    """Three digits and a unit: "12.3 µs"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{_three(value / size)} {unit}"
    return f"{_three(value / 1e-6)} µs"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def size(value: int) -> str:
    """A number of bytes with a unit: "4.5 MiB"."""
    for unit, of in (("GiB", 2**30), ("MiB", 2**20)):
        if value >= of:
            return f"{_three(value / of)} {unit}"
    return f"{_three(value / 2**10)} KiB"


def render(results: Results) -> str:
    """The whole table of a run."""
    return "\n".join(_lines(results))


def _lines(results: Results) -> Iterator[str]:
    machine, copy = results.machine, results.copy
    yield f"{machine['device']} · torch {machine['torch']}, vadiff {machine['vadiff']} · {results.date}"
    yield f"commit {results.commit[:12]}{', with changes' if results.dirty else ''}"
    kinds = ", ".join(f"{kind} {speed / 1e9:.1f} GB/s" for kind, speed in copy.by_kind.items())
    yield f"copy, read + written, best of the run: {kinds}; shares are of the faster one just before each contest"
    for kind, reason in copy.without.items():
        yield f"  no {kind} copy: {reason}"
    if results.quick:
        yield "--quick: too few rounds, and buffers that fit in a cache. These figures are unreliable"
    for name, reason in sorted({(o.provider, o.reason) for o in results.not_measured if o.kind == "not usable"}):
        yield f"not usable: {name}: {reason}"
    entries: list[Measurement | NotMeasured] = [*results.measurements, *results.not_measured]
    for contest in dict.fromkeys(Contest(entry.case, entry.dtype, entry.mode) for entry in entries):
        yield ""
        yield from _contest(results, contest)


def _contest(results: Results, contest: Contest) -> Iterator[str]:
    found = [m for m in results.measurements if (m.case, m.dtype, m.mode) == contest]
    missing = [n for n in results.not_measured if (n.case, n.dtype, n.mode) == contest]
    if found:
        yield _title(contest, found[0])
        yield from grid([_head(found), *(_row(m, letter, found) for letter, m in zip(_LETTERS, found, strict=False))])
    else:
        yield f"{contest.case} {contest.dtype}, {contest.mode}"
    yield from (_excuse(entry) for entry in missing if entry.kind != "not usable")


def _title(contest: Contest, first: Measurement) -> str:
    shape = " × ".join(map(str, first.shape))
    if contest.mode not in MODES:
        return f"{contest.case} {contest.dtype}: " + _OTHER_TITLES[contest.mode].format(shape=shape)
    return (
        f"{contest.case} {contest.dtype}, {shape}: {MODES[contest.mode].title}; {moves_of(contest)} moves, "
        f"{size(first.bytes)}, {first.sets} sets of buffers{_cached(first)}, {first.rounds} rounds"
    )


def _cached(measurement: Measurement) -> str:
    return " (cached: their inputs fit in the last-level cache)" if measurement.cached else ""


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _head(found: list[Measurement]) -> list[str]:
    letters = _LETTERS[: len(found)]
    head = ["", "median", "p20", "p80"]
    if found[0].device is not None:
        head += ["host", "device", "launches", "peak"]
    if found[0].bandwidth is not None:
        head += ["GB/s", "of copy"]
    return [*head, *(f"× as fast as {letter}" if index == 0 else letter for index, letter in enumerate(letters))]


def _row(measurement: Measurement, letter: str, found: list[Measurement]) -> list[str]:
    provider = PROVIDERS.get(measurement.provider)
    row = [f"{letter} {provider.title if provider else measurement.provider}", *map(seconds, measurement.wall)]
    if found[0].device is not None:
        row += [
            seconds(measurement.host.median),
            seconds((measurement.device or Spread(math.nan, math.nan, math.nan)).median),
            "" if measurement.launches is None else str(measurement.launches),
            "" if measurement.peak_bytes is None else size(measurement.peak_bytes),
        ]
    if found[0].bandwidth is not None:
        row += [
            "" if measurement.bandwidth is None else f"{measurement.bandwidth / 1e9:.1f}",
            "" if measurement.share_of_copy is None else f"{measurement.share_of_copy:.1%}",
        ]
    return [*row, *(_ratio(measurement.times_as_fast_as.get(other.provider)) for other in found)]


def _ratio(value: Ratio | None) -> str:
    return "·" if value is None else _three(value.value)


def _excuse(entry: NotMeasured) -> str:
    verb = "REFUSED, its results are wrong" if entry.kind == "wrong" else "FAILED"
    return f"  {entry.provider}: {verb}: {entry.reason}"


def render_figures(found: list[Figure]) -> str:
    """The design's figures, one per line."""
    marks = {True: "pass", False: "MISSED", None: ""}
    rows = [[figure.title, figure.required, marks[figure.passed], figure.found] for figure in found]
    return "\n".join(["the design's figures", *grid([["", "asked for", "", "found"], *rows], left=4)])
