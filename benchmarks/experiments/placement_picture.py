"""Regrets and picture of placement.py and placement_cifar.py.

    python benchmarks/experiments/placement_picture.py    # benchmarks/results/placement.md and docs/placement.png

Regret: the figure of an arm minus that of the grid's best mean, chosen on some seeds and scored on the others, paired.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from placement import GRID
from results import RESULTS

from vadiff.trainer.ablation.statistics import Interval, interval

DOCS = Path(__file__).parent.parent.parent / "docs"
FIGURES = {"A": "held-out loss", "B": "Fréchet distance"}
COLORS = {
    "default": "#000000", "uniform": "#7b8794", "logit-normal (0, 1)": "#CC79A7", "suggestion": "#0072B2",
    "information": "#009E73", "information, no gate": "#D55E00",
}  # fmt: skip


class Regret(NamedTuple):
    """Of one arm in one figure; ln ratios."""

    to_best: Interval  # over the scoring seeds
    to_default: Interval  # over all seeds


def means_of(arms: dict[str, Any]) -> list[str]:
    return [f"mean {mean}" for mean in GRID if f"mean {mean}" in arms]


def best_mean(arms: dict[str, Any], figure: str, choosing: list[int]) -> str:
    """The grid's mean with the lowest figure over the choosing seeds."""
    return min(means_of(arms), key=lambda arm: sum(arms[arm][figure][str(seed)] for seed in choosing))


def regret(arms: dict[str, Any], arm: str, figure: str, settings: dict[str, Any]) -> Regret:
    best = arms[best_mean(arms, figure, settings["choosing"])][figure]
    default, mine = arms["default"][figure], arms[arm][figure]
    scoring = [str(seed) for seed in settings["seeds"] if seed not in settings["choosing"]]
    return Regret(
        interval([mine[seed] - best[seed] for seed in scoring]),
        interval([mine[seed] - default[seed] for seed in mine]),
    )


def percent(value: Interval, digits: int = 1) -> str:
    """A ratio's distance from 1 with its interval, which fewer than five seeds do not have."""
    if value.number == 0 or math.isnan(value.mean):
        return "–"
    text = f"{math.expm1(value.mean):+.{digits}%}"
    if not math.isnan(value.low):
        text += f" [{math.expm1(value.low):+.{digits}%}, {math.expm1(value.high):+.{digits}%}]"
    return text.replace("%", " %")


def table(name: str, task: dict[str, Any], settings: dict[str, Any]) -> str:
    """One task as Markdown."""
    arms = task["arms"]
    suggested = task["suggestion"]
    lines = [
        f"**{name}**; best mean of the grid: {best_text(arms, settings)}; suggested: {suggested['mean']:.2f}, "
        f"{suggested['std']:.2f}",
        "",
    ]
    lines += [
        "| arm | mean, std of ln σ | loss: regret | loss: from default | distance: regret | distance: from default |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm in (arm for arm in COLORS if arm in arms):
        drawn = list(arms[arm]["levels"].values())
        placed = ", ".join(f"{sum(each[key] for each in drawn) / len(drawn):.2f}" for key in ("mean", "std"))
        cells = [arm, placed]
        for figure in FIGURES:
            found = regret(arms, arm, figure, settings)
            cells += [percent(found.to_best), "–" if arm == "default" else percent(found.to_default)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_text(arms: dict[str, Any], settings: dict[str, Any]) -> str:
    found = (f"{best_mean(arms, key, settings['choosing']).split()[1]} by {label}" for key, label in FIGURES.items())
    return ", ".join(found)


def picture(tasks: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> Figure:
    """Both figures over the mean of ln σ: the grid as a curve, the arms as points."""
    figure = Figure(figsize=(3.4 * len(tasks), 6.2), layout="constrained")
    panels = figure.subplots(len(FIGURES), len(tasks), squeeze=False)
    for column, (name, task, settings) in enumerate(tasks):
        arms, every = task["arms"], [str(seed) for seed in settings["choosing"]]
        for row, (key, label) in enumerate(FIGURES.items()):
            axes = panels[row][column]
            lowest = min(sum(arms[arm][key][seed] for seed in every) for arm in means_of(arms)) / len(every)

            def height(arm: str, key: str = key, arms: dict[str, Any] = arms, lowest: float = lowest) -> float:
                values = arms[arm][key]
                return math.exp(sum(values[seed] for seed in every_of(values)) / len(every_of(values)) - lowest)

            def every_of(values: dict[str, float], every: list[str] = every) -> list[str]:
                return [seed for seed in values if seed in every]

            axes.plot(GRID, [height(arm) for arm in means_of(arms)], color="0.6", marker=".", label="grid")
            for arm, color in COLORS.items():
                if arm in arms:
                    at = sum(arms[arm]["levels"][seed]["mean"] for seed in every) / len(every)
                    axes.plot(at, height(arm), "o", color=color, label=arm)
            axes.set_yscale("log")
            for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                axis_formatter("{x:g}")
            axes.tick_params(axis="y", which="both", labelsize="small")
            axes.axhline(1.0, color="0.85", linewidth=0.8, zorder=0)
            if row == 0:
                axes.set_title(name, fontsize="medium")
            if column == 0:
                axes.set_ylabel(f"{label} ÷ the grid's best")
        panels[-1][column].set_xlabel("mean of ln σ of the draws")
    handles, labels = panels[0][-1].get_legend_handles_labels()
    for axes in panels[0]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def main() -> None:
    tasks = []
    for name in ("placement", "placement_cifar"):
        path = RESULTS / f"{name}.json"
        if path.exists():
            content = json.loads(path.read_text())
            tasks += [(task, found, content["settings"]) for task, found in content["tasks"].items()]
    text = "\n\n".join(table(name, task, settings) for name, task, settings in tasks)
    (RESULTS / "placement.md").write_text(text + "\n")
    picture(tasks).savefig(DOCS / "placement.png", dpi=110)


if __name__ == "__main__":
    main()
