"""`vadiff report --from-log`: the page about a training with any loop, from what `log_to` wrote to a `MetricsFile`."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...bands import Bands
from ...diagnosis import Verdict, spread_of, verdict_of
from ...errors import RunError
from ...extras import import_extra
from ...metrics_file import MetricsFile
from .charts import number_label, plain_log_ticks, slug
from .overview import Table, number
from .page import Section, write_page
from .runs import Array
from .style import LOG_SNR, Chart, line

_BANDED = re.compile(r"(.+)/(base_loss|std|relative_std|weight|share)/log_snr_(\S+?)_to_(\S+)")
_STEPS = "optimiser steps"
_LEVEL_FREE = "level_free_loss"


@dataclass(frozen=True)
class LoggedCriterion:
    """What one criterion logged over R steps, in N bands; NaN where a step has no value."""

    prefix: str
    step: Array  # [R]
    edges: Array  # [N + 1] log-SNR
    banded: dict[str, Array]  # base_loss, std, weight, share → [R, N]
    scalars: dict[str, Array]  # samples, skipped, level_free_loss, ... → [R]

    def bands(self) -> Bands | None:
        """The statistics at the last logged step; None if the number of samples was not logged."""
        if "samples" not in self.scalars:
            return None
        share, mean, std, weight = (
            torch.from_numpy(self.banded[name][-1].copy()) for name in ("share", "base_loss", "std", "weight")
        )
        samples = (share * self.scalars["samples"][-1]).nan_to_num()
        return Bands(torch.from_numpy(self.edges), samples, mean, std, weight)

    def verdict(self) -> Verdict | None:
        """The verdict of the last logged step, without a check of the noise levels, which the log does not have.

        None if the number of samples was not logged. A weighting counts as balancing if weight × mean differs less
        between the bands than the mean does.
        """
        bands = self.bands()
        if bands is None:
            return None
        spread = spread_of(bands)
        balanced = spread.weighted_ratio < 0.9 * spread.mean_ratio
        skipped = self.scalars.get("skipped", np.zeros(1))[-1]
        return verdict_of(bands, "The weighting", balanced, 0 if math.isnan(skipped) else int(skipped))


def read_log(path: Path) -> tuple[list[LoggedCriterion], Array, dict[str, Array]]:
    """The criteria that logged to a `MetricsFile`, and the steps [R] and other numbers [R] in it.

    Raises:
        RunError: the file is missing or damaged, or no criterion logged to it.
    """
    try:
        lines = MetricsFile(path).read()
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    names = sorted({name for entry in lines for name in entry} - {"step"})
    prefixes = sorted({match[1] for name in names if (match := _BANDED.fullmatch(name))})
    if not prefixes:
        raise RunError(
            f"{path} has no loss per noise level: write it with criterion.log_to(vadiff.MetricsFile({str(path)!r}), "
            "step) after some steps of training"
        )
    criteria = [_criterion(prefix, lines, names) for prefix in prefixes]
    own = [name for name in names if not any(name.startswith(f"{prefix}/") for prefix in prefixes)]
    return criteria, _steps(lines), {name: _series(lines, name) for name in own}


def write_log_report(path: Path, page: Path, *, title: str | None = None) -> list[Path]:
    """Write the page about the log at `path`, and its charts beside it, as `write_report` does.

    Raises:
        RunError: see `read_log`.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    criteria, step, own = read_log(path)
    several = len(criteria) > 1
    sections = [_overview(criteria)]
    for criterion in criteria:
        sections += _sections(criterion, several)
    if own:
        charts = [
            _curve(f"logged-{slug(name)}", name, "Logged by the loop itself. Look for jumps.", step, {name: values})
            for name, values in own.items()
        ]
        sections.append(Section("logged", "Other numbers of the loop", charts=charts))
    return write_page(
        page,
        sections,
        title=title or f"Training logged in {path.name}",
        lead=f"{len(step):,} logged steps, up to step {step[-1]:,}.",
        notes=[],
        source=str(path),
    )


def _criterion(prefix: str, lines: Sequence[dict[str, Any]], names: Sequence[str]) -> LoggedCriterion:
    mine = [name for name in names if name.startswith(f"{prefix}/")]
    limits = {(match[3], match[4]) for name in mine if (match := _BANDED.fullmatch(name))}
    edges = np.array(sorted({float(edge) for pair in limits for edge in pair}))
    held = [entry for entry in lines if any(_BANDED.fullmatch(name) for name in mine if name in entry)]
    shape = (len(held), len(edges) - 1)
    banded = {name: np.full(shape, np.nan) for name in ("base_loss", "std", "relative_std", "weight", "share")}
    scalars = {}
    for name in mine:
        match = _BANDED.fullmatch(name)
        if match is None:
            scalars[name.removeprefix(f"{prefix}/")] = _series(held, name)
        else:
            band = int(np.searchsorted(edges, float(match[3])))
            banded[match[2]][:, band] = _series(held, name)
    return LoggedCriterion(prefix, _steps(held), edges, banded, scalars)


def _series(lines: Sequence[dict[str, Any]], name: str) -> Array:
    return np.array([entry.get(name) for entry in lines], dtype=float)  # None becomes NaN


def _steps(lines: Sequence[dict[str, Any]]) -> Array:
    return np.array([entry["step"] for entry in lines])


def _overview(criteria: Sequence[LoggedCriterion]) -> Section:
    """Last values and verdict of each criterion."""

    def last(criterion: LoggedCriterion, name: str, spoken: Callable[[float], str] = "{:,.0f}".format) -> str:
        values = criterion.scalars.get(name, np.array([np.nan]))
        known = values[np.isfinite(values)]
        return spoken(float(known[-1])) if len(known) else "–"

    rows = [
        ["steps", *(f"{criterion.step[-1]:,}" for criterion in criteria)],
        ["samples after forgetting", *(last(criterion, "samples") for criterion in criteria)],
        ["samples skipped", *(last(criterion, "skipped") for criterion in criteria)],
        ["level-free loss", *(last(criterion, _LEVEL_FREE, number) for criterion in criteria)],
    ]
    text = []
    for criterion in criteria:
        verdict = criterion.verdict()
        name = f"{criterion.prefix}: " if len(criteria) > 1 else ""
        text.append(f"{name}{'no verdict: the log has no number of samples.' if verdict is None else verdict.text}")
    return Section(
        "overview",
        "In short",
        "Verdict at the last logged step: " + " ".join(text),
        table=Table(["", *(criterion.prefix for criterion in criteria)], rows),
    )


def _sections(criterion: LoggedCriterion, several: bool) -> list[Section]:
    """The sections of one criterion; with `several` of them their names are in the titles."""
    of, tag = (f", {criterion.prefix}", f"-{slug(criterion.prefix)}") if several else ("", "")
    levels = Section(
        f"noise-levels{tag}",
        f"Noise level by noise level{of}",
        "The last logged step, from the running statistics of the training loss, in which recent samples count most.",
        charts=[_profile(criterion, tag)],
    )
    curves = Section(f"curves{tag}", f"Over training{of}")
    if np.isfinite(criterion.scalars.get(_LEVEL_FREE, np.array([np.nan]))).any():
        caption = (
            "Training loss without the part that depends on which noise levels happened to be drawn. Look for a curve "
            "that has stopped falling, and for jumps."
        )
        values = {"": criterion.scalars[_LEVEL_FREE]}
        curves.charts.append(_curve(f"level-free-loss{tag}", "Level-free loss", caption, criterion.step, values))
    for name, title, caption in _BANDED_CHARTS:
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
)


def _profile(criterion: LoggedCriterion, tag: str) -> Chart:
    """Mean and std of the base loss over log-SNR at the last step."""

    def draw(panel: Any) -> None:
        centers = (criterion.edges[1:] + criterion.edges[:-1]) / 2
        mean, std = criterion.banded["base_loss"][-1], criterion.banded["std"][-1]
        panel.fill_between(centers, np.clip(mean - std, 0, None), mean + std, color="#56B4E9", alpha=0.35, lw=0)
        panel.plot(centers, mean, color="#0072B2", marker="o", markersize=4)
        if _wide(mean):
            panel.set_yscale("log", nonpositive="clip")
            panel.set_ylim(np.nanmin(mean) / 3, np.nanmax(mean + std) * 1.5)
        panel.set_xlabel(LOG_SNR)
        panel.set_ylabel("base loss")

    caption = (
        "Line: mean over recent samples of that noise level; band: ± 1 standard deviation between samples. Look for "
        "where the line is high (hard to learn) and where the band is wide (one sample says little)."
    )
    return Chart(f"base-loss-profile{tag}", "Base loss per noise level", caption, draw)


def _curve(name: str, title: str, caption: str, step: Array, values: dict[str, Array]) -> Chart:
    """Lines over steps, by their label; logarithmic where all values are positive and differ by more than tenfold."""

    def draw(panel: Any) -> None:
        colors = import_extra("matplotlib", "report").colormaps["viridis"](np.linspace(0, 0.95, len(values)))
        for color, (label, row) in zip(colors, values.items(), strict=True):
            known = np.isfinite(row)
            one = len(values) == 1
            panel.plot(step[known], row[known], color=line(0).color if one else color, label=None if one else label)
        if _wide(np.concatenate(list(values.values()))):
            panel.set_yscale("log")
            plain_log_ticks(panel.yaxis)
        panel.set_xlabel(_STEPS)
        panel.set_ylabel(title.removesuffix(" by noise level").lower())
        panel.xaxis.set_major_formatter(number_label)

    return Chart(name, title, caption, draw)


def _wide(values: Array) -> bool:
    """Whether the finite values are positive and spread over more than an order of magnitude."""
    found = values[np.isfinite(values)]
    return bool(len(found) and found.min() > 0 and found.max() > 10 * found.min())
