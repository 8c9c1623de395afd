"""The tables of a report: last values and settings of the runs."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import charts, held_out_charts
from .runs import Group, History
from .style import all_nan_is_no_value


@dataclass(frozen=True)
class Table:
    """Text cells; the first cell of a row is its heading."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def overview_table(groups: Sequence[Group]) -> Table:
    """Values of each group at its last logged step: a row for each value that any group has."""
    values: list[tuple[str, Callable[[History], float | None], Callable[[float], str]]] = [
        ("steps", lambda run: run.step[-1], _whole),
        ("images seen", lambda run: run.images[-1], _whole),
        ("training base loss", lambda run: _scalar(run, "base_loss"), number),
        ("level-free loss", lambda run: _scalar(run, "level_free_loss"), number),
        ("held-out x0 loss (EMA)", _final_held_out, number),
        *[(charts.metric_title(name), _final_metric(name), number) for name in charts.metric_names(groups)],
        ("samples skipped", lambda run: _scalar(run, "skipped_samples"), _whole),
        ("steps clipped", lambda run: _scalar(run, "clipped_share"), _percent),
        ("images / s", lambda run: _median(run, "images_per_second"), _whole),
        ("time", lambda run: _scalar(run, "seconds"), _duration),
        ("peak memory", lambda run: _scalar(run, "memory_bytes"), _bytes),
    ]
    rows = [["seeds", *(str(len(group.runs)) for group in groups)]] if several_seeds(groups) else []
    for name, value_of, spoken in values:
        cells = [cell([value_of(run) for run in group.runs], spoken) for group in groups]
        if any(cells):
            rows.append([name, *(cell or "–" for cell in cells)])
    return Table(["", *(group.label for group in groups)], rows)


def cell(values: Sequence[float | None], spoken: Callable[[float], str]) -> str:
    """Mean of the runs, with ± the standard deviation if several runs differ; empty without a value."""
    known = [float(value) for value in values if value is not None and np.isfinite(value)]
    if not known:
        return ""
    if len(known) == 1 or max(known) == min(known) or spoken is not number:
        return spoken(float(np.mean(known)))
    mean, spread = float(np.mean(known)), float(np.std(known, ddof=1))
    decimals = max(0, 1 - math.floor(math.log10(spread)))  # two digits of the spread
    return f"{mean:,.{decimals}f} ± {spread:,.{decimals}f}"


def settings_table(groups: Sequence[Group]) -> Table:
    """Every field of the config, group by group."""
    names = sorted({name for group in groups for name in group.first.config})

    def setting(group: Group, name: str) -> str:
        return ", ".join(dict.fromkeys(_plain(run.config.get(name)) for run in group.runs))

    rows = [[name, *(setting(group, name) for group in groups)] for name in names]
    return Table(["setting", *(group.label for group in groups)], rows)


def _final_held_out(run: History) -> float | None:
    return held_out_charts.mean_of(run, run.held_out[-1][1], "ema") if run.held_out else None


def _final_metric(name: str) -> Callable[[History], float | None]:
    return lambda run: run.evaluation[-1][1].get(name) if run.evaluation else None


def _scalar(run: History, name: str) -> float | None:
    values = run.scalars.get(name)
    return None if values is None else float(values[-1])


def _median(run: History, name: str) -> float | None:
    """Median over training without the first entry, which includes the warm-up."""
    values = run.scalars.get(name)
    if values is None:
        return None
    with all_nan_is_no_value():
        return float(np.nanmedian(values[1:] if len(values) > 1 else values))


def several_seeds(groups: Iterable[Group]) -> bool:
    """Whether any group has more than one run."""
    return any(len(group.runs) > 1 for group in groups)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
