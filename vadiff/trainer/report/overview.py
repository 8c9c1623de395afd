"""The tables of a report: last values and settings of the runs."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ablation.statistics import LEAST_SEEDS, interval
from .held_out_charts import comparable, mean_of
from .runs import Group, History
from .style import all_nan_is_no_value
from .training_charts import metric_names, metric_title

RATIO, DIFFERENCE = "ratio", "difference"

# Settings that decide what the training loss is a loss of: with others it is higher or lower for the same network.
_OBJECTIVE = (
    "process", "prediction", "timesteps", "zero_terminal_snr", "sigma_data", "levels", "levels_options", "shift",
    "uniform_share", "profile", "p_mean", "p_std", "target", "dataset", "image_size",
)  # fmt: skip
_TRAINING_LOSSES = ("training base loss", "level-free loss")


@dataclass(frozen=True)
class Table:
    """Text cells; the first cell of a row is its heading."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def overview_table(groups: Sequence[Group]) -> Table:
    """Values of each group at its last logged step: a row for each value that any group has.

    Every group but the first has a second column: its difference from the first, see `difference`.
    """
    held_out = RATIO if comparable(groups) else ""
    values: list[tuple[str, Callable[[History], float | None], Callable[[float], str], str]] = [
        ("steps", lambda run: run.step[-1], _whole, ""),
        ("images seen", lambda run: run.images[-1], _whole, ""),
        (_TRAINING_LOSSES[0], lambda run: _scalar(run, "base_loss"), number, RATIO),
        (_TRAINING_LOSSES[1], lambda run: _scalar(run, "level_free_loss"), number, RATIO),
        ("held-out x0 loss, geometric mean over levels (EMA)", _final_held_out, number, held_out),
        *[
            (metric_title(name), _final_metric(name), number, _compared_as(name, groups))
            for name in metric_names(groups)
        ],
        ("spread of the weighted loss over levels, highest ÷ lowest", lambda run: run.imbalance, _times, ""),
        ("samples skipped", lambda run: _scalar(run, "skipped_samples"), _whole, ""),
        ("steps clipped", lambda run: _scalar(run, "clipped_share"), _percent, ""),
        ("images / s", lambda run: _median(run, "images_per_second"), _whole, ""),
        ("time", lambda run: _scalar(run, "seconds"), _duration, ""),
        ("peak memory", lambda run: _scalar(run, "memory_bytes"), _bytes, ""),
    ]
    rows = [["seeds", *_between([str(len(_seeds(group))) for group in groups], [""] * len(groups))]]
    if not several_seeds(groups):
        rows = []
    for name, value_of, spoken, kind in values:
        cells = [cell([value_of(run) for run in group.runs], spoken) for group in groups]
        if any(cells):
            changes = [
                "" if name in _TRAINING_LOSSES and not same_objective(group, groups[0])
                else difference(group, groups[0], value_of, kind)
                for group in groups
            ]  # fmt: skip
            rows.append([name, *_between([each or "–" for each in cells], changes)])
    differences = [f"difference from {groups[0].label}"] * len(groups)
    return Table(["", *_between([group.label for group in groups], differences)], rows)


def _between(values: Sequence[str], differences: Sequence[str]) -> list[str]:
    """The first value, then of each further group its value and its difference."""
    return [*values[:1], *(cell for pair in zip(values[1:], differences[1:], strict=True) for cell in pair)]


def difference(group: Group, first: Group, value_of: Callable[[History], float | None], kind: str) -> str:
    """Difference of a value from the first group's, over the seeds that both have; "" where none can be given.

    Args:
        kind: RATIO for percent of the first group's value, the mean over seeds that of logarithms; DIFFERENCE for a
            difference; "" for none.

    Returns:
        The mean of the differences with, from two seeds, the lowest and highest in round brackets or, from
        `LEAST_SEEDS`, their 95 % interval in square brackets.
    """
    if not kind or group is first:
        return ""
    spoken: Callable[[float], str] = _change if kind == RATIO else _signed
    theirs = {seed_of(run): value_of(run) for run in first.runs}
    pairs = [(value_of(run), theirs.get(seed_of(run))) for run in group.runs]
    known = [(mine, other) for mine, other in pairs if mine is not None and other is not None]
    if kind == RATIO:
        if not known or not all(np.isfinite(pair).all() and min(pair) > 0 for pair in known):
            return ""
        ends = [math.log(mine / other) for mine, other in known]
    else:
        if not known or not np.isfinite(known).all():
            return ""
        ends = [mine - other for mine, other in known]
    found = interval(ends)
    if len(ends) == 1:
        return spoken(found.mean)
    if len(ends) < LEAST_SEEDS:
        return f"{spoken(found.mean)} ({spoken(min(ends))} to {spoken(max(ends))})"
    return f"{spoken(found.mean)} [{spoken(found.low)}, {spoken(found.high)}]"


def differences_explained(groups: Sequence[Group]) -> str:
    """How to read the differences of `overview_table`; "" for a single group."""
    if len(groups) < 2:
        return ""
    shared = [len(_seeds(group) & _seeds(groups[0])) for group in groups[1:]]
    text = f"Differences from {groups[0].label} are paired by seed: means over the seeds that both have"
    if max(shared) >= LEAST_SEEDS:
        text += ", with their 95 % interval in square brackets"
    if any(2 <= number < LEAST_SEEDS for number in shared):
        text += ", with the lowest and highest in round brackets: fewer than five seeds are too few for an interval"
    text += "."
    if 1 in shared:
        text += " Of one seed there is no uncertainty to give: train others before you believe a difference."
    if 0 in shared:
        text += " No difference is given where no seed is the same."
    if not all(same_objective(group, groups[0]) for group in groups):
        text += " Training losses of other objectives or noise levels cannot be compared: they have no difference."
    return text


def _seeds(group: Group) -> set[tuple[int, int | None]]:
    return {seed_of(run) for run in group.runs}


def seed_of(run: History) -> tuple[int, int | None]:
    """Seed of the initial weights, and that of the data if it is another."""
    return run.config["seed"], run.config.get("data_seed")


def same_objective(group: Group, first: Group) -> bool:
    """Whether the training losses of two groups are of the same objective and distribution of noise levels."""
    return all(group.first.config.get(name) == first.first.config.get(name) for name in _OBJECTIVE)


def measured_alike(groups: Sequence[Group], metric: str) -> bool:
    """Whether the last values of a metric were measured with the same options, such as the number of images."""
    runs = [run for group in groups for run in group.runs]
    last = [(run, next((at for at, found in reversed(run.evaluation) if metric in found), None)) for run in runs]
    options = [run.evaluated_with.get(at) for run, at in last if at is not None]
    return all(each == options[0] for each in options)


def _compared_as(metric: str, groups: Sequence[Group]) -> str:
    """FID and Fréchet distances in percent; KID may be below 0, and the others are on scales of their own."""
    if not measured_alike(groups, metric):
        return ""
    return RATIO if metric.split("-")[0] in ("fid", "fd") else DIFFERENCE


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
    return mean_of(run, run.held_out[-1][1], "ema") if run.held_out else None


def _final_metric(name: str) -> Callable[[History], float | None]:
    """The value of the last checkpoint at which it was measured."""

    def value_of(run: History) -> float | None:
        return next((values[name] for _, values in reversed(run.evaluation) if name in values), None)

    return value_of


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


def _change(log_ratio: float) -> str:
    """A ratio's logarithm as a change in percent."""
    return f"{100 * math.expm1(log_ratio):+.2f} %".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def _times(value: float) -> str:
    return f"{value:.1f} ×"


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
