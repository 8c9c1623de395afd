"""The tables of docs/weighting.md and docs/optimal-loss.md, from the committed results of `vadiff ablate`.

python benchmarks/experiments/result_tables.py    # writes objectives-digits/table.md and ablation-digits/gap_table.txt
"""

from __future__ import annotations

import csv
import json
import math
from typing import Any

from results import RESULTS

OBJECTIVES = {
    "epsilon-linear": "ε, linear betas, uniform timesteps",
    "x0-cosine": "x0, cosine schedule, uniform timesteps",
    "v-cosine": "v, cosine schedule, uniform timesteps",
    "flow": "flow, uniform t",
    "edm": "EDM, P_mean −1.2",
    "edm-wide": "EDM, P_mean −0.4",
}


def objectives_table(results: dict[str, Any]) -> str:
    """Markdown: a row per objective and arm, with the change of both figures, its interval, and the verdict."""
    lines = ["| objective | arm | held-out loss | Fréchet distance | verdict |", "| --- | --- | --- | --- | --- |"]
    for objective, name in OBJECTIVES.items():
        for key, arm in results["arms"].items():
            if key.startswith(f"{objective}/"):
                cells = [percent(arm["held_out"], 2), percent(arm["distance"], 1)]
                lines.append(f"| {' | '.join([name, key.partition('/')[2], *cells, arm['verdict']])} |")
                name = ""
    return "\n".join(lines) + "\n"


def percent(effect: dict[str, float], digits: int) -> str:
    mean, low, high = (f"{100 * math.expm1(effect[end]):+.{digits}f}" for end in ("mean", "low", "high"))
    return f"{mean} % ({low} to {high})".replace("-", "−")


def gap_table(rows: list[dict[str, str]]) -> str:
    """Held-out loss and gap on training images of each arm: a line per arm, a column per noise level."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    sigmas = list(dict.fromkeys(row["sigma"] for row in rows))
    width = max(map(len, arms))
    text = []
    for title, field in (
        ("EDM's loss, held-out images", "held_out"),
        ("Gap to the optimal loss, training images", "gap"),
    ):
        lines = [title, f"{'σ':<{width}}" + "".join(f"{float(sigma):>8.3g}" for sigma in sigmas)]
        for arm in arms:
            values = [float(row[field]) for row in rows if row["arm"] == arm]
            lines.append(f"{arm:<{width}}" + "".join(f"{value:>8.4f}" for value in values))
        text.append("\n".join(lines) + "\n")
    return "\n".join(text)


def main() -> None:
    results = json.loads((RESULTS / "objectives-digits" / "results.json").read_text())
    (RESULTS / "objectives-digits" / "table.md").write_text(objectives_table(results))
    with (RESULTS / "ablation-digits" / "gaps.csv").open(newline="") as file:
        (RESULTS / "ablation-digits" / "gap_table.txt").write_text(gap_table(list(csv.DictReader(file))))


if __name__ == "__main__":
    main()
