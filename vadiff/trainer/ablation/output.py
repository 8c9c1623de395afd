"""Results of a grid as files: JSON, CSV, text and a picture."""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...extras import import_extra
from ...files import check_writable, replacing
from ..next_steps import next_steps
from ..training.run_folder import check_results
from .collect import ArmResult, Results
from .grid import Grid
from .statistics import LEAST_SEEDS, Effect, Interval

# Okabe & Ito's colour-blind-safe colours; markers for black-and-white prints, dashes for every further seven arms.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_MARKERS = "osD^vPX*"  # one more than colours, so that no two of 56 arms look the same
_WRITTEN = [f"{name}.{kind}" for name in ("results", "gaps") for kind in ("json", "csv", "txt", "png")]
_SHOWN = 12  # runs in the command that is named at the end
_DASHES = ("-", "--", ":", "-.")


def write_results(results: Results, out: Path) -> None:
    """Write results.json, results.csv, results.txt and results.png to a folder, creating it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    table = io.StringIO()
    _write_csv(results, table)
    texts = {
        "results.json": json.dumps(results.as_dict(), indent=1) + "\n",
        "results.csv": table.getvalue(),
        "results.txt": results_table(results) + "\n",
    }
    for name, text in texts.items():
        with replacing(out / name) as partial:
            partial.write_text(text)
    with replacing(out / "results.png") as partial:
        _picture(results).savefig(partial, format="png")


def next_steps_of(grid: Grid, out: Path) -> str:
    """How to look at the runs that are done, or at those of the first seed where they are many; nothing without any."""
    done = [run for run in grid.runs(out) if run.is_done]
    if len(done) > _SHOWN:
        done = [run for run in done if run.seed == grid.seeds[0]][:_SHOWN]
    return next_steps(("report", *(run.path for run in done), "--out", out / "report.html")) if done else ""


def check_outputs(grid: Grid, out: Path) -> None:
    """Raise unless results can be computed, drawn and written to a folder: before hours of training.

    Raises:
        RunError: files there would be replaced that are no results of this grid.
        OSError: the folder cannot be written.
        MissingExtraError: matplotlib or SciPy is not installed.
    """
    check_results(out, _WRITTEN, (run.path for run in grid.runs(out)))
    check_writable(out, folder=True)
    import_extra("matplotlib", "report")
    import_extra("scipy.stats", "train")


def results_table(results: Results) -> str:
    """The results as a text table, without a trailing newline."""
    fewest = min((arm.held_out.ratio.number for arm in results.arms), default=LEAST_SEEDS)
    most = max((arm.held_out.ratio.number for arm in results.arms), default=LEAST_SEEDS)
    shown = "mean [95 % interval]" if most >= LEAST_SEEDS else "mean"
    lines = [f"{results.name}: compared with {results.baseline}, paired by seed; {shown}"]
    for objective in dict.fromkeys(arm.objective for arm in results.arms):
        arms = [arm for arm in results.arms if arm.objective == objective]
        lines += ["", *([f"Objective {objective}"] if objective else []), *_rows(arms)]
    lines += [
        "",
        "Held-out loss: geometric mean over noise levels of x0 loss / x0 loss of the baseline, as change in percent.",
        "fid, fd: change of the Fréchet distance in percent; other metrics: differences.",
        "p: t-test over seeds, corrected for the number of arms (Holm).",
        "Verdict: better needs one of held-out loss and Fréchet distance better (p < 0.05) and the other not worse "
        "(interval not above 0), and both finite.",
        "Images to reach the baseline's final held-out loss ÷ images the baseline saw; below 1 is faster.",
    ]
    if fewest < LEAST_SEEDS:
        lines.append(
            f"No intervals from fewer than {LEAST_SEEDS} seeds (here {fewest}): they say nothing about the spread over "
            "seeds."
        )
    if results.missing:
        unfinished = Counter(name.rpartition("/")[0] for name in results.missing)
        runs = ", ".join(f"{arm} ({seeds})" for arm, seeds in unfinished.items())
        lines.append(f"Not finished, arms and in brackets how many of their runs: {runs}")
    return "\n".join(lines)


def _rows(arms: Sequence[ArmResult]) -> list[str]:
    """Header and rows of the arms of one objective."""
    distances = sorted({arm.distance_name for arm in arms if arm.distance_name is not None})
    others = sorted({name for arm in arms for name in arm.evaluation if name not in distances and "_std" not in name})
    table = [["arm", "seeds", "held-out loss", *distances, "verdict", "images to reach", "seconds", *others]]
    for arm in arms:
        reach = f"{arm.reached} of {arm.held_out.ratio.number} reached"
        if arm.reached == arm.held_out.ratio.number:
            reach = _bounded(arm.images_to_reach, "{:.2f}", " ×")
        row = [arm.arm, str(arm.held_out.ratio.number), _percentages(arm.held_out)]
        row += [_percentages(arm.distance) if arm.distance and name == arm.distance_name else "" for name in distances]
        row += [arm.verdict, reach, f"{arm.seconds:.0f}"]
        table.append(row + [_bounded(arm.evaluation[n], "{:+.3g}") if n in arm.evaluation else "" for n in others])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in table]


def _percentages(effect: Effect) -> str:
    """-1.20 % [-1.90, -0.50] p 0.012"""
    if not effect.finite:
        return "not finite"
    ratio = effect.ratio
    change = Interval(_percent(ratio.mean), _percent(ratio.low), _percent(ratio.high), ratio.number)
    return _bounded(change, "{:+.2f}", " %") + ("" if math.isnan(effect.p) else f" p {effect.p:.2g}")


def _bounded(value: Interval, form: str, unit: str = "") -> str:
    """Mean and, where there are any, bounds."""
    mean, low, high = map(form.format, value[:3])
    return f"{mean}{unit}" + ("" if math.isnan(value.low) else f" [{low}, {high}]")


def _write_csv(results: Results, file: io.StringIO) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["objective", "arm", "baseline", "metric", "mean", "low_95", "high_95", "seeds", "p", "verdict"])
    for arm in results.arms:
        rows: dict[str, tuple[Interval, float | str]] = {"held_out_log_ratio": (arm.held_out.ratio, arm.held_out.p)}
        if arm.distance is not None:
            rows[f"{arm.distance_name}_log_ratio"] = (arm.distance.ratio, arm.distance.p)
        rows["images_to_reach"] = (arm.images_to_reach, "")
        for level, value in zip(arm.log_snr, arm.per_level, strict=True):
            rows[f"held_out_log_ratio_at_log_snr_{level:.2f}"] = (value, "")
        rows |= {f"{metric}_difference": (value, "") for metric, value in arm.evaluation.items()}
        for metric, (value, p) in rows.items():
            writer.writerow([arm.objective, arm.arm, results.baseline, metric, *value, p, arm.verdict])


def _picture(results: Results) -> Any:
    """A row of panels per objective: held-out loss, Fréchet distance if it was measured, held-out loss by level."""
    matplotlib = import_extra("matplotlib.figure", "report")
    names = list(dict.fromkeys(arm.objective for arm in results.arms)) or [""]
    rows = [[arm for arm in results.arms if arm.objective == name] for name in names]
    measured = any(arm.distance is not None for arm in results.arms)
    heights = [max(2.2, 0.7 + 0.32 * len(arms)) for arms in rows]
    figure = matplotlib.Figure(
        figsize=(15 if measured else 12, 1.4 + sum(heights)), dpi=100, facecolor="white", layout="constrained"
    )
    panels = figure.subplots(
        len(rows), 2 + measured, squeeze=False, height_ratios=heights, width_ratios=(1, *[1] * measured, 1.1),
        sharex="col",
    )  # fmt: skip
    arms_of_all = list(dict.fromkeys(arm.arm for arm in results.arms))
    # style 0 is the baseline's, as in gaps.png; an arm looks alike with every objective
    styles = {arm: arm_style(row + 1) for row, arm in enumerate(arms_of_all)}
    effects = [("held-out loss", lambda arm: arm.held_out), ("Fréchet distance", lambda arm: arm.distance)][
        : 1 + measured
    ]
    for column, (_, effect_of) in enumerate(effects):
        limits = _limits([effect_of(arm) for arm in results.arms])
        for row, arms in enumerate(rows):
            _draw_effects(panels[row, column], [(arm.arm, effect_of(arm)) for arm in arms], styles, limits)
            panels[row, column].tick_params(labelleft=column == 0, labelbottom=True)
    for row, arms in enumerate(rows):
        _draw_levels(panels[row, -1], arms, styles)
        if names[row]:
            panels[row, 0].set_title(names[row], loc="left", weight="bold")
    for column, (title, _) in enumerate(effects):
        panels[-1, column].set_xlabel(f"{title} against {results.baseline} (%)   ← better")
    panels[-1, -1].set_xlabel("log-SNR  λ = −2 ln σ  (nats)      ← more noise · less noise →")
    for panel in panels.flat:
        plain_axes(panel)
    intervals = "Bars and bands: 95 % intervals."
    if len(results.seeds) < LEAST_SEEDS:
        intervals = f"No intervals: {len(results.seeds)} seeds carry none, {LEAST_SEEDS} or more do."
    title = (
        f"{results.name}: {len(results.seeds)} seeds, paired\n"
        f"{intervals} Grey: each seed. Right: the same arms by noise level."
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    return figure


def _limits(effects: Sequence[Effect | None]) -> tuple[float, float]:
    """Where an axis of changes in percent ends: beyond every interval, and 0. Single seeds may lie outside."""
    values = [0.0]
    for effect in effects:
        if effect is not None:
            values += [_percent(value) for value in effect.ratio[:3] if math.isfinite(value)]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


def _draw_effects(
    panel: Any,
    effects: Sequence[tuple[str, Effect | None]],
    styles: dict[str, dict[str, str]],
    limits: tuple[float, float],
) -> None:
    """A line per arm: mean, interval, and each seed; a seed outside of the axis is an arrow with its number."""
    low_end, high_end = limits
    for row, (arm, effect) in enumerate(effects):
        if effect is None:
            continue
        for value in map(_percent, effect.per_seed.values()):
            if not math.isfinite(value):
                continue
            inside = low_end <= value <= high_end
            marker = "." if inside else ">" if value > high_end else "<"
            shown = min(max(value, low_end), high_end)
            panel.plot([shown], [row + 0.25], marker, color="0.65", clip_on=False)
            if not inside:
                panel.annotate(
                    f"{value:+.0f} %", (shown, row + 0.25), (-6 if value > high_end else 6, 0), color="0.4",
                    textcoords="offset points", ha="right" if value > high_end else "left", va="center", fontsize=8,
                )  # fmt: skip
        mean, low, high = (_percent(value) for value in effect.ratio[:3])
        panel.plot([low, high], [row, row], color=styles[arm]["color"], linewidth=3)
        panel.plot([mean], [row], markersize=8, **styles[arm])
    panel.set_yticks(range(len(effects)), [arm for arm, _ in effects])
    panel.set_ylim(max(1, len(effects)) - 0.5, -0.5)
    panel.set_xlim(low_end, high_end)
    panel.axvline(0.0, color="black", linewidth=1)
    panel.locator_params(axis="x", nbins=6)


def _draw_levels(panel: Any, arms: Sequence[ArmResult], styles: dict[str, dict[str, str]]) -> None:
    """Held-out loss by noise level. The axis follows the means; a wide band may leave it."""
    panel.axhline(0.0, color="black", linewidth=1)
    all_means = [0.0]
    for arm in arms:
        means = [_percent(level.mean) for level in arm.per_level]
        panel.plot(arm.log_snr, means, markersize=4, **styles[arm.arm])
        low, high = ([_percent(level[end]) for level in arm.per_level] for end in (1, 2))
        panel.fill_between(arm.log_snr, low, high, color=styles[arm.arm]["color"], alpha=0.12, linewidth=0)
        all_means += [value for value in means if math.isfinite(value)]
    margin = 0.1 * (max(all_means) - min(all_means)) or 1.0
    panel.set_ylim(min(all_means) - margin, max(all_means) + margin)
    panel.set_ylabel("held-out loss (%)")
    panel.tick_params(labelbottom=True)


def arm_style(row: int) -> dict[str, str]:
    """Colour, marker and dashes of the arm in this row."""
    cycle, colour = divmod(row, len(_COLOURS))
    return {
        "color": _COLOURS[colour],
        "marker": _MARKERS[row % len(_MARKERS)],
        "linestyle": _DASHES[cycle % len(_DASHES)],
    }


def plain_axes(panel: Any) -> None:
    """Light grid, no spines at the top and right."""
    panel.grid(alpha=0.3, linewidth=0.6)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _percent(log_ratio: float) -> float:
    return 100.0 * math.expm1(log_ratio) if math.isfinite(log_ratio) else math.nan
