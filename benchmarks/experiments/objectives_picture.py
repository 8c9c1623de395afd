"""The first picture of README and docs: what weightings do to held-out loss and samples, objective by objective.

vadiff ablate benchmarks/experiments/objectives_digits.toml --jobs 2 --evaluate
python benchmarks/experiments/objectives_picture.py   # from the committed results: writes docs/objectives.svg
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib
from looks import BLUE, GREEN, GREY, LOOKS, ORANGE, WIDTH
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "objectives-digits" / "results.json"
OBJECTIVES = {
    "epsilon-linear": "ε, linear betas,\nuniform t",
    "x0-cosine": "x0, cosine,\nuniform t",
    "v-cosine": "v, cosine,\nuniform t",
    "flow": "flow,\nuniform t",
    "edm": "EDM,\nP_mean −1.2",
    "edm-wide": "EDM,\nP_mean −0.4",
}
# name, colour, marker
ARMS = {
    "variance-aware": ("variance_aware", BLUE, "o"),
    "loss-level": ("loss_level", GREEN, "s"),
    "min-snr": ("min_snr (γ = 5)", ORANGE, "D"),
    "double-rate": ("constant, 2 × learning rate", GREY, "|"),
}
FIGURES = {"held_out": "held-out loss,\nchange (%)", "distance": "Fréchet distance\nof samples, change (%)"}


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw a row per objective and a panel per figure; a full marker where the experiment's rule allows a claim."""
    with matplotlib.rc_context(LOOKS):
        figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
        panels = figure.subplots(1, len(FIGURES), sharey=True)
        for panel, (field, title) in zip(panels, FIGURES.items(), strict=True):
            panel.axvline(0, color=GREY, linewidth=0.8)
            for row, objective in enumerate(OBJECTIVES):
                for place, arm in enumerate(ARMS):
                    draw_arm(panel, results["arms"][f"{objective}/{arm}"], field, row + 0.18 * (place - 1.5), arm)
                if row % 2:
                    panel.axhspan(row - 0.5, row + 0.5, color=GREY, alpha=0.12, zorder=0, linewidth=0)
            panel.set_xlabel(f"← better      worse →\n{title}")
            panel.set_yticks(range(len(OBJECTIVES)), list(OBJECTIVES.values()))
            panel.set_ylim(len(OBJECTIVES) - 0.5, -0.5)
            panel.tick_params(axis="y", length=0)
        names = [
            matplotlib.lines.Line2D([], [], color=color, marker=marker, linestyle="", label=name)
            for name, color, marker in ARMS.values()
        ]
        figure.legend(handles=names, loc="outside upper center", ncols=2)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_arm(panel: Any, arm: dict[str, Any], field: str, height: float, name: str) -> None:
    _, color, marker = ARMS[name]
    effect = arm[field]
    low, mean, high = (100 * math.expm1(effect[end]) for end in ("low", "mean", "high"))
    face = color if arm["verdict"] == "better" or marker == "|" else "none"
    panel.plot([low, high], [height, height], color=color, linewidth=1.4, solid_capstyle="round")
    panel.plot([mean], [height], marker=marker, color=color, markerfacecolor=face, markersize=5, linestyle="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="results.json of `vadiff ablate`")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "objectives.svg")
    arguments = parser.parse_args()
    draw(json.loads(arguments.results.read_text()), arguments.out)
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
