"""`vadiff report --from-log`: the page about a training with any loop, from what `log_to` wrote to a `MetricsFile`."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import RunError
from ...metrics_file import MetricsFile
from .overview import Table, number
from .page import Section, write_page
from .runs import Array
from .style import (
    LOG_SNR,
    ONLY,
    Chart,
    Line,
    add_band,
    add_line,
    line,
    log_axis,
    log_snr_axis,
    make_room_for_legend,
    new_figure,
    text,
)

_REMOVED = "removed_x0_error"
_PER_BAND = ("base_loss", "std", "relative_std", "weight", "share", _REMOVED)
_BANDED = re.compile(rf"(.+)/({'|'.join(_PER_BAND)})/log_snr_(\S+?)_to_(\S+)")
_STEPS = "optimiser steps"
_LEVEL_FREE = "level_free_loss"
_SCALARS, _TEXTS = ("samples", "skipped", _LEVEL_FREE), ("weighting", "target", "verdict")


@dataclass(frozen=True)
class LoggedCriterion:
    """What one criterion logged over R steps, in N bands; NaN where a step has no value."""

    prefix: str
    step: Array  # [R]
    edges: Array  # [N + 1] log-SNR
    banded: dict[str, Array]  # the names in _PER_BAND → [R, N]
    scalars: dict[str, Array]  # samples, skipped, level_free_loss → [R]
    texts: dict[str, str]  # weighting, target, verdict: of the last step, if it has them
    left_out: int | None  # last step with other bands than those after it, which is left out with the steps before it


def read_log(path: Path) -> tuple[list[LoggedCriterion], Array, dict[str, Array]]:
    """The criteria that logged to a `MetricsFile`, and the steps [R] and other numbers [R] in it.

    Raises:
        RunError: the file is missing or damaged, or no criterion logged to it.
    """
    try:
        lines = MetricsFile(path).read()
        names = sorted({name for entry in lines for name in entry} - {"step"})
        matches = {name: match for name in names if (match := _BANDED.fullmatch(name))}
        criteria = [_criterion(prefix, lines, matches) for prefix in sorted({match[1] for match in matches.values()})]
        theirs = {f"{criterion.prefix}/{name}" for criterion in criteria for name in (*_SCALARS, *_TEXTS)}
        texts = {name for entry in lines for name, value in entry.items() if isinstance(value, str)}
        own = [name for name in names if name not in matches and name not in theirs | texts]
        others = {} if not criteria else {name: _series(lines, name) for name in own}
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not criteria:
        raise RunError(f"{path} has no loss per noise level: {_instead(path, lines)}")
    return criteria, _steps(lines), others


def _instead(path: Path, lines: Sequence[dict[str, Any]]) -> str:
    if any("statistics" in entry for entry in lines):
        return f"it is the log of a run of `vadiff train`; use `vadiff report {path.parent}`"
    return f"write it with criterion.log_to(vadiff.MetricsFile({str(path)!r}), step) after some steps of training"


def write_log_report(path: Path, page: Path, *, title: str | None = None) -> int:
    """Write the page about the log at `path`, as `write_report` does.

    Raises:
        RunError: see `read_log`.
        MissingExtraError: plotly or jinja2 is not installed.
    """
    criteria, step, own = read_log(path)
    several = len(criteria) > 1
    sections = [_overview(criteria)]
    for criterion in criteria:
        sections += _sections(criterion, several)
    if own:
        charts = [
            _curve(f"logged-{_slug(name)}", name, "Logged by the loop itself. Look for jumps.", step, {name: values})
            for name, values in own.items()
        ]
        sections.append(Section("logged", "Other numbers of the loop", charts=charts))
    return write_page(
        page,
        sections,
        title=title or f"Training logged in {path.name}",
        lead=f"{len(step):,} logged steps, up to step {step[-1]:,}.",
        notes=[
            f"{criterion.prefix}: the bands of log-SNR changed after step {criterion.left_out:,}. The steps up to it "
            "are left out."
            for criterion in criteria
            if criterion.left_out is not None
        ],
        source=str(path),
    )


def _criterion(prefix: str, lines: Sequence[dict[str, Any]], matches: Mapping[str, re.Match[str]]) -> LoggedCriterion:
    mine = {name: match for name, match in matches.items() if match[1] == prefix}
    every = [entry for entry in lines if not mine.keys().isdisjoint(entry)]
    held = _of_the_last_bands(every, mine)
    limits = {_limits(match) for entry in held for name, match in mine.items() if name in entry}
    edges = np.array(sorted({edge for pair in limits for edge in pair}))
    shape = (len(held), len(edges) - 1)
    banded = {name: np.full(shape, np.nan) for name in _PER_BAND}
    for name, match in mine.items():
        if _limits(match) in limits:
            banded[match[2]][:, np.searchsorted(edges, float(match[3]))] = _series(held, name)
    return LoggedCriterion(
        prefix,
        _steps(held),
        edges,
        banded,
        scalars={name: _series(held, f"{prefix}/{name}") for name in _SCALARS},
        texts={name: str(held[-1][f"{prefix}/{name}"]) for name in _TEXTS if f"{prefix}/{name}" in held[-1]},
        left_out=every[-len(held) - 1]["step"] if len(held) < len(every) else None,
    )


def _of_the_last_bands(lines: Sequence[dict[str, Any]], mine: Mapping[str, re.Match[str]]) -> Sequence[dict[str, Any]]:
    """The lines from which on no two bands overlap: before, the criterion or the call had other bands."""
    known: set[tuple[float, float]] = set()
    for place in range(len(lines) - 1, -1, -1):
        new = {_limits(match) for name, match in mine.items() if name in lines[place]} - known
        if any(one[0] < other[1] and other[0] < one[1] for one in new for other in known):
            return lines[place + 1 :]
        known |= new
    return lines


def _limits(match: re.Match[str]) -> tuple[float, float]:
    return float(match[3]), float(match[4])


def _series(lines: Sequence[dict[str, Any]], name: str) -> Array:
    """The values of a name, [R]; NaN where a line has none.

    Raises:
        ValueError: a value is not a number.
    """
    for entry in lines:
        if not isinstance(value := entry.get(name), int | float | None):
            raise ValueError(f"{name} is {value!r} at step {entry['step']}, expected a number")
    return np.array([entry.get(name) for entry in lines], dtype=float)  # None becomes NaN


def _steps(lines: Sequence[dict[str, Any]]) -> Array:
    return np.array([entry["step"] for entry in lines])


def _overview(criteria: Sequence[LoggedCriterion]) -> Section:
    """Last values and verdict of each criterion."""

    def last(criterion: LoggedCriterion, name: str, spoken: Callable[[float], str] = "{:,.0f}".format) -> str:
        known = criterion.scalars[name][np.isfinite(criterion.scalars[name])]
        return spoken(float(known[-1])) if len(known) else "–"

    targets = [criterion.texts.get("target", "the data") for criterion in criteria]
    rows = [
        ["weighting", *(criterion.texts.get("weighting", "–") for criterion in criteria)],
        *([["target", *targets]] if any("target" in criterion.texts for criterion in criteria) else []),
        ["steps", *(f"{criterion.step[-1]:,}" for criterion in criteria)],
        ["samples after forgetting", *(last(criterion, "samples") for criterion in criteria)],
        ["samples skipped", *(last(criterion, "skipped") for criterion in criteria)],
        ["level-free loss", *(last(criterion, _LEVEL_FREE, number) for criterion in criteria)],
    ]
    verdicts = []
    for criterion in criteria:
        name = f"{criterion.prefix}: " if len(criteria) > 1 else ""
        verdicts.append(f"{name}{criterion.texts.get('verdict', 'no verdict, the log has none.')}")
    return Section(
        "overview",
        "In short",
        "Verdict at the last logged step: " + " ".join(verdicts),
        table=Table(["", *(criterion.prefix for criterion in criteria)], rows),
    )


def _sections(criterion: LoggedCriterion, several: bool) -> list[Section]:
    """The sections of one criterion; with `several` of them their names are in the titles."""
    of, tag = (f", {criterion.prefix}", f"-{_slug(criterion.prefix)}") if several else ("", "")
    levels = Section(
        f"noise-levels{tag}",
        f"Noise level by noise level{of}",
        "The last logged step, from the running statistics of the training loss, in which recent samples count most.",
        charts=[_profile(criterion, tag)],
    )
    curves = Section(f"curves{tag}", f"Over training{of}")
    if np.isfinite(criterion.scalars[_LEVEL_FREE]).any():
        caption = (
            "Training loss without the part that depends on which noise levels happened to be drawn. Look for a curve "
            "that has stopped falling, and for jumps."
        )
        values = {"": criterion.scalars[_LEVEL_FREE]}
        curves.charts.append(_curve(f"level-free-loss{tag}", "Level-free loss", caption, criterion.step, values))
    for name, title, caption in _BANDED_CHARTS:
        if name == _REMOVED and "target" not in criterion.texts:
            continue
        values = {
            f"{low:g} to {high:g}": criterion.banded[name][:, band]
            for band, (low, high) in enumerate(zip(criterion.edges, criterion.edges[1:], strict=False))
            if np.isfinite(criterion.banded[name][:, band]).any()
        }
        curves.charts.append(_curve(f"{name.replace('_', '-')}{tag}", title, caption, criterion.step, values))
    return [levels, curves]


_BANDED_CHARTS = (
    (
        "base_loss",
        "Base loss by noise level",
        "Mean base loss of each band of log-SNR, before the weight. Look for bands that still fall when the others "
        "have stopped, and for bands that rise.",
    ),
    (
        "weight",
        "Weight by noise level",
        "What the base loss of each band is multiplied with. Look for when the weights stop changing.",
    ),
    (
        "share",
        "Share of the samples by noise level",
        "Look for bands with next to no samples: they learn slowly, and their statistics are noisy.",
    ),
    (
        _REMOVED,
        "Removed x0 error by noise level",
        "What the posterior-mean targets take out of the mean squared error of x0, whatever the network is. Base "
        "losses are without it. Look for where it is not 0: only there do these targets differ from the data.",
    ),
)


def _profile(criterion: LoggedCriterion, tag: str) -> Chart:
    """Mean and std of the base loss over log-SNR at the last step."""
    centers = (criterion.edges[1:] + criterion.edges[:-1]) / 2
    mean, std = criterion.banded["base_loss"][-1], criterion.banded["std"][-1]
    figure, style = new_figure(LOG_SNR, "base loss"), ONLY
    spoken = [f" ± {value:.3g}" for value in std]
    add_line(figure, centers, mean, style, "base loss", markers=True, spoken=spoken)
    wide = _wide(mean)
    low = np.clip(mean - std, np.nanmin(mean) / 3 if wide else 0, None)
    add_band(figure, centers, low, mean + std, style.color, "base loss")
    log_snr_axis(figure)
    if wide:
        log_axis(figure, low, mean + std)
    else:
        figure.update_yaxes(rangemode="tozero")
    figure.update_layout(showlegend=False)
    caption = (
        "Line: mean over recent samples of that noise level; band: ± 1 standard deviation between samples. Look for "
        "where the line is high (hard to learn) and where the band is wide (one sample says little)."
    )
    return Chart(f"base-loss-profile{tag}", "Base loss per noise level", caption, figure)


def _curve(name: str, title: str, caption: str, step: Array, values: dict[str, Array]) -> Chart:
    """Lines over steps, by their label; logarithmic where all values are positive and differ by more than tenfold."""
    figure = new_figure(_STEPS, text(title.removesuffix(" by noise level").lower()))
    for place, (label, row) in enumerate(values.items()):
        known = np.isfinite(row)
        style = ONLY if len(values) == 1 else Line(shade(place / (len(values) - 1)), line(place).dash)
        add_line(figure, step[known], row[known], style, label)
    if _wide(np.concatenate(list(values.values()))):
        log_axis(figure, *values.values())
    figure.update_xaxes(tickformat="~s", unifiedhovertitle_text="step %{x:,.0f}")
    make_room_for_legend(figure, len(values))
    if len(values) > 1:
        caption += " Lines: bands of log-SNR."
    return Chart(name, title, caption, figure)


def shade(place: float) -> str:
    """Colour of a band of log-SNR, from 0, the noisiest, to 1: an order that the eye sees on both grounds."""
    ends = np.array([[0x7B, 0x62, 0xD9], [0x1F, 0x8A, 0x8C], [0xB5, 0x7C, 0x00]])
    color = [np.interp(place, [0.0, 0.5, 1.0], channel) for channel in ends.T]
    return "#" + "".join(f"{round(value):02x}" for value in color)


def _wide(values: Array) -> bool:
    """Whether the finite values are positive and spread over more than an order of magnitude."""
    found = values[np.isfinite(values)]
    return bool(len(found) and found.min() > 0 and found.max() > 10 * found.min())


def _slug(label: str) -> str:
    return "-".join("".join(c if c.isalnum() or c in ".-" else " " for c in label.lower()).split()) or "run"
