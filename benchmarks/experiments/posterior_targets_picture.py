"""Tables and pictures of posterior_targets.py and memorising.py.

    python benchmarks/experiments/posterior_targets_picture.py [--results FOLDER] [--docs FOLDER]

Writes posterior_targets.md and memorising.md into the folder of the results, posterior-targets.png and memorising.png
into the folder of the docs. All ratios are of an arm to plain targets, the mean over paired seeds of the logarithm.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from placement import HELD_OUT
from placement_picture import DOCS, FIGURES, percent
from results import RESULTS

from vadiff.trainer.ablation.statistics import Interval, interval

Arms = dict[str, dict[str, Any]]  # arm → seed → what a run found

PLAIN = "plain"
COLORS = {"1,024 references": "#0072B2", "256 references": "#0072B2", "all references": "#D55E00", PLAIN: "#000000"}
ALONG = {"held-out": "held-out loss", "training": "training loss", "distance": "distance", "copies": "copies"}
SIGMAS = [float(f"{sigma:.2g}") for sigma in HELD_OUT.tolist()]


def effect(arms: Arms, arm: str, figure: Callable[[Any], float]) -> Interval:
    """ln ratio of an arm's figure to that of plain targets, over the seeds of both."""
    plain, mine = arms[PLAIN], arms[arm]
    return interval([figure(mine[seed]) - figure(plain[seed]) for seed in mine if seed in plain])


def level(place: int) -> Callable[[Any], float]:
    """ln of the held-out loss at one level."""
    return lambda run: math.log(run["loss"][place])


def compared(arms: Arms) -> list[str]:
    return [arm for arm in arms if arm != PLAIN]


def figures_table(objectives: dict[str, Arms]) -> str:
    """Both primary figures of each objective and arm."""
    lines = ["| objective | targets | " + " | ".join(FIGURES.values()) + " |", "| --- | --- | --- | --- |"]
    for name, arms in objectives.items():
        for arm in compared(arms):
            cells = [percent(effect(arms, arm, itemgetter(key)), 2) for key in FIGURES]
            lines.append(f"| {name} | {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def levels_table(objectives: dict[str, Arms], arm: str) -> str:
    """The held-out loss of each level, in bold where the interval does not hold 0."""
    lines = ["| σ | " + " | ".join(objectives) + " |", "| --- |" + " --- |" * len(objectives)]
    for place, sigma in enumerate(SIGMAS):
        cells = []
        for arms in objectives.values():
            found = effect(arms, arm, level(place))
            text = f"{100.0 * math.expm1(found.mean):+.2f} %"
            cells.append(f"**{text}**" if found.low > 0.0 or found.high < 0.0 else text)
        lines.append(f"| {sigma:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figures_picture(objectives: dict[str, Arms]) -> Figure:
    """Both primary figures as intervals; below, the held-out loss over the level, a panel for each objective."""
    figure = Figure(figsize=(13.0, 6.0), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.0, 1.1))
    above, below = parts
    for axes, (key, label) in zip(above.subplots(1, 2, sharey=True), FIGURES.items(), strict=True):
        for row, arms in enumerate(objectives.values()):
            for place, arm in enumerate(compared(arms)):
                found = effect(arms, arm, itemgetter(key))
                draw_interval(axes, found, row + 0.25 * (place - 0.5), arm, label=arm if row == 0 else None)
        axes.axvline(0.0, color="0.7", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(objectives)), list(objectives))
        axes.set_xlabel(f"{label} against plain targets, %")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize="small")
    panels = below.subplots(1, len(objectives), sharey=True)
    for axes, (name, arms) in zip(panels, objectives.items(), strict=True):
        for arm in compared(arms):
            per_level = (in_percent(effect(arms, arm, level(place))) for place in range(len(SIGMAS)))
            low, mean, high = zip(*per_level, strict=True)
            axes.plot(HELD_OUT, mean, color=COLORS[arm], marker=".")
            axes.fill_between(HELD_OUT, low, high, color=COLORS[arm], alpha=0.2, linewidth=0.0)
        axes.axhline(0.0, color="0.7", linewidth=0.8, zorder=0)
        axes.set_xscale("log")
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("σ")
    panels[0].set_ylabel("held-out loss of a level, %")
    return figure


def draw_interval(axes: Axes, found: Interval, height: float, arm: str, label: str | None) -> None:
    low, mean, high = in_percent(found)
    axes.errorbar(mean, height, xerr=[[mean - low], [high - mean]], fmt="o", color=COLORS[arm], label=label)


def in_percent(found: Interval) -> tuple[float, float, float]:
    """Low end, mean and high end of a ratio, as percent from 1."""
    low, mean, high = (100.0 * math.expm1(value) for value in (found.low, found.mean, found.high))
    return low, mean, high


def at_lowest(run: dict[str, dict[str, float]]) -> dict[str, float]:
    """What was measured where the held-out loss of a run is lowest, with the step."""
    step = min(run, key=lambda step: run[step]["held-out"])
    return {"step": float(step), **run[step]}


def memorising_table(objectives: dict[str, Arms]) -> str:
    """Each arm at the step of its lowest held-out loss, and at the last step: mean, and range over the seeds."""
    lines = [
        "| objective | targets | step | held-out loss | training loss | distance to the nearest | copies |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, arms in objectives.items():
        for at in ("lowest held-out loss", "last step"):
            for arm, runs in arms.items():
                if at == "last step":
                    last = max(next(iter(runs.values())), key=int)
                    found, where = [run[last] for run in runs.values()], f"{int(last):,}"
                else:
                    found = [at_lowest(run) for run in runs.values()]
                    steps = sorted({int(run["step"]) for run in found})
                    where = " to ".join(f"{step:,}" for step in dict.fromkeys((steps[0], steps[-1]))) + " (lowest)"
                cells = [spread([run[key] for run in found], key) for key in ALONG]
                lines.append(f"| {name} | {arm} | {where} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], key: str) -> str:
    """Mean and range; of losses, which are logarithms, those of the loss."""
    if key == "copies":
        mean, low, high = (f"{100.0 * value:.1f}" for value in (sum(values) / len(values), min(values), max(values)))
        return f"{mean} % ({low} to {high})"
    if key != "distance":
        values = [math.exp(value) for value in values]
    digits = 3 if key == "distance" else 4
    return f"{sum(values) / len(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def memorising_picture(objectives: dict[str, Arms]) -> Figure:
    """Losses and nearest distances over the steps, and the distance over the held-out loss."""
    figure = Figure(figsize=(12.0, 3.1 * len(objectives)), layout="constrained")
    panels = figure.subplots(len(objectives), 3, squeeze=False)
    for row, (name, arms) in zip(panels, objectives.items(), strict=True):
        for arm, runs in arms.items():
            steps = sorted(next(iter(runs.values())), key=int)
            at = [int(step) for step in steps]
            means = {key: [sum(run[step][key] for run in runs.values()) / len(runs) for step in steps] for key in ALONG}
            losses = {key: [math.exp(value) for value in means[key]] for key in ("held-out", "training")}
            row[0].plot(at, losses["held-out"], color=COLORS[arm], marker=".", label=arm)
            row[0].plot(at, losses["training"], color=COLORS[arm], linestyle="--")
            row[1].plot(at, means["distance"], color=COLORS[arm], marker=".")
            row[2].plot(losses["held-out"], means["distance"], color=COLORS[arm], marker=".")
        row[0].set_ylabel(f"{name}: x0 loss, held-out and\ntraining images (dashed)")
        row[1].set_ylabel("median distance to the nearest\ntraining image ÷ held-out images'")
        row[2].set_ylabel("the distance")
        row[2].set_xlabel("held-out loss")
        row[2].locator_params(axis="x", nbins=5)
        for axes in row[:2]:
            axes.set_xscale("log")
            axes.set_xticks(at, [f"{step:,}" for step in at])
            axes.minorticks_off()
            axes.set_xlabel("step")
    panels[0][0].legend(frameon=False, fontsize="small")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pictures")
    arguments = parser.parse_args()
    for name, image, draw in (
        ("posterior_targets", "posterior-targets.png", figures_picture),
        ("memorising", "memorising.png", memorising_picture),
    ):
        path = arguments.results / f"{name}.json"
        if not path.exists():
            continue
        objectives = json.loads(path.read_text())["objectives"]
        if name == "memorising":
            parts = [memorising_table(objectives)]
        else:
            parts = [figures_table(objectives)]
            for arm in compared(next(iter(objectives.values()))):
                parts += [f"Held-out loss of each level, {arm}:", levels_table(objectives, arm)]
        path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
        draw(objectives).savefig(arguments.docs / image, dpi=110)


if __name__ == "__main__":
    main()
