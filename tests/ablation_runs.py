"""Grids and runs that the tests of `vadiff ablate` share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vadiff.trainer.ablation import read_grid
from vadiff.trainer.ablation.grid import Grid, PlannedRun

GRID = """
name = "tiny"
preset = "digits"
baseline = "constant"
seeds = [0, 1]

[config]
steps = 4
batch_size = 8
channels = [8, 8]
held_out_images = 8
held_out_levels = 2
held_out_every = 2
tensorboard = false
device = "cpu"
backend = "reference"

[arms.twin]
weighting = "table"
table = { arm = "variance_aware" }
[arms.constant]
weighting = "constant"
[arms.fast]
weighting = "constant"
learning_rate = { times = 2.0 }
[arms.variance_aware]
"""


def grid_file(folder: Path, text: str = GRID) -> Path:
    path = folder / "grid.toml"
    path.write_text(text)
    return path


def write_run(run: PlannedRun, losses: list[list[float]], **last: Any) -> None:
    """A run with these held-out losses, [measurements][levels], at equal distances of images."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.config.save(run.path / "config.yaml")
    lines = [
        {
            "step": (number + 1) * run.config.steps // len(losses),
            "images": 100 * (number + 1),
            "seconds": 1.0,
            "held_out": {"log_snr": [0.0, 2.0], "loss_raw": [9.0, 9.0], "loss_ema": loss},
        }
        for number, loss in enumerate(losses)
    ]
    lines[-1] |= last
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def two_arms(tmp_path: Path, seeds: int) -> tuple[Grid, dict[tuple[str, int], PlannedRun]]:
    text = GRID[: GRID.index("[arms.twin]")].replace("seeds = [0, 1]", f"seeds = {list(range(seeds))}")
    text += '[arms.constant]\nweighting = "constant"\n[arms.other]\nweighting = "loss_level"\n'
    grid = read_grid(grid_file(tmp_path, text))
    return grid, {(run.arm, run.seed): run for run in grid.runs(tmp_path)}


def two_finished_arms(tmp_path: Path, seeds: int) -> tuple[Grid, dict[tuple[str, int], PlannedRun]]:
    """`two_arms`, of which each run is finished with the same losses."""
    grid, runs = two_arms(tmp_path, seeds)
    for run in runs.values():
        write_run(run, [[1.0, 1.0]])
    return grid, runs
