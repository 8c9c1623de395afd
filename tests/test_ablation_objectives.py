"""vadiff.trainer.ablation: several objectives in one grid, each arm compared within its objective."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from vadiff.trainer.ablation import collect, read_grid, results_table, write_results
from vadiff.trainer.ablation.grid import Grid, GridError, PlannedRun

GRID = """
name = "two"
preset = "digits"
baseline = "constant"
seeds = [0, 1, 2, 3, 4]

[config]
steps = 4
tensorboard = false
device = "cpu"
learning_rate = 0.001

[objectives.edm]
process = "edm"
[objectives.flow]
process = "flow"
learning_rate = { times = 3.0 }

[arms.constant]
weighting = "constant"
[arms.fast]
weighting = "constant"
learning_rate = { times = 2.0 }
[arms.adaptive]
objectives = ["edm"]
[arms.twin]
objectives = ["edm"]
weighting = "table"
table = { arm = "adaptive" }
"""


def grid_of(folder: Path, text: str = GRID) -> Grid:
    (folder / "grid.toml").write_text(text)
    return read_grid(folder / "grid.toml")


def test_every_arm_is_trained_with_every_objective_that_it_is_for(tmp_path: Path) -> None:
    runs = [run for run in grid_of(tmp_path).runs(tmp_path) if run.seed == 3]
    assert [run.path.relative_to(tmp_path).as_posix() for run in runs] == [
        "edm/constant/seed-3", "edm/fast/seed-3", "edm/adaptive/seed-3", "edm/twin/seed-3",
        "flow/constant/seed-3", "flow/fast/seed-3",
    ]  # fmt: skip
    configs = {run.label: run.config for run in runs}
    assert {label: config.process for label, config in configs.items()} == {
        label: label.split("/")[0] for label in configs
    }
    rates = [configs[label].learning_rate for label in ("edm/constant", "edm/fast", "flow/constant", "flow/fast")]
    assert rates == pytest.approx([0.001, 0.002, 0.003, 0.006])  # an arm multiplies what the objective has
    assert runs[3].needs == tmp_path / "edm" / "adaptive" / "seed-3"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('objectives = ["edm"]\n[arms.twin]', 'objectives = ["vp"]\n[arms.twin]',
         r"arm adaptive has objectives \['vp'\], expected a list of some of edm, flow"),
        ('objectives = ["edm"]\n[arms.twin]', 'objectives = "edm"\n[arms.twin]',
         "arm adaptive has objectives 'edm', expected a list of some of edm, flow"),
        ('weighting = "constant"\n[arms.fast]', 'objectives = ["edm"]\n[arms.fast]',
         "objective flow lacks the arm constant, the baseline of all others"),
        ('objectives = ["edm"]\nweighting = "table"', 'weighting = "table"',
         "arm twin needs adaptive, which objective flow does not have"),
        ('process = "flow"', "seed = 1", "objective flow has seed, which is not a field that an arm can set"),
        ("[objectives.edm]", '[objectives."../edm"]', r"objective '\.\./edm' names a folder"),
        ('process = "flow"', 'process = "fish"', "objective flow, arm constant: process is 'fish'"),
    ],
)  # fmt: skip
def test_invalid_objective_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = GRID.replace(old, new, 1)
    assert text != GRID
    if "../edm" in new:
        text = text.replace('objectives = ["edm"]\n', "")
    with pytest.raises(GridError, match=message):
        grid_of(tmp_path, text).runs(tmp_path)


def finished(
    run: PlannedRun, loss: float | None, distance: float | None = None, log_snr: Sequence[float] = (0.0, 2.0)
) -> None:
    """A finished run with this held-out loss at each level, and this Fréchet distance."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.config.save(run.path / "config.yaml")
    held_out = {"log_snr": [*log_snr], "loss_raw": [9.0] * len(log_snr), "loss_ema": [loss] * len(log_snr)}
    entry = {"step": 4, "images": 100, "seconds": 1.0, "held_out": held_out}
    if distance is not None:
        entry["evaluation"] = {"fd-digits": distance}
    (run.path / "metrics.jsonl").write_text(json.dumps(entry) + "\n")


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    """All runs are done. `edm/fast` has 5 % less held-out loss than its baseline, `flow/fast` 5 % more; give or take
    what depends on the seed."""
    grid = grid_of(tmp_path)
    change = {"edm/fast": -0.05, "edm/adaptive": 0.0, "edm/twin": 0.0, "flow/fast": 0.05}
    for run in grid.runs(tmp_path / "out"):
        level = {"edm": 1.0, "flow": 7.0}[run.objective] * (1.0 + run.seed)  # which pairs share
        noise = 0.001 * (run.seed - 2) * (run.arm != grid.baseline)
        finished(run, level * math.exp(change.get(run.label, 0.0) + noise), 3.0 * math.exp(2.0 * noise))
    return grid


def test_arms_are_compared_with_the_baseline_of_their_objective(grid: Grid, tmp_path: Path) -> None:
    results = collect(grid, tmp_path / "out")
    found = {arm.label: arm for arm in results.arms}
    assert {label: round(arm.held_out.ratio.mean, 6) for label, arm in found.items()} == {
        "edm/fast": -0.05, "edm/adaptive": 0.0, "edm/twin": 0.0, "flow/fast": 0.05
    }  # fmt: skip
    assert {label: arm.verdict for label, arm in found.items()} == {
        "edm/fast": "better", "edm/adaptive": "not shown", "edm/twin": "not shown", "flow/fast": "worse"
    }  # fmt: skip
    assert found["edm/fast"].distance_name == "fd-digits"
    assert results.missing == ()


def test_p_values_are_corrected_for_the_arms_of_the_objective(grid: Grid, tmp_path: Path) -> None:
    found = {arm.label: arm.held_out.p for arm in collect(grid, tmp_path / "out").arms}
    assert found["edm/fast"] == pytest.approx(3 * found["flow/fast"], rel=1e-3)  # three arms and one
    assert found["edm/adaptive"] == 1.0


def test_results_have_a_table_for_each_objective(grid: Grid, tmp_path: Path) -> None:
    results = collect(grid, tmp_path / "out")
    write_results(results, tmp_path / "out")
    text = results_table(results)
    assert text.index("Objective edm") < text.index("adaptive") < text.index("Objective flow")
    (row,) = (line for line in text.splitlines() if line.startswith("fast") and "-4.88 %" in line)
    assert " better " in row
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["arms"]["flow/fast"]["verdict"] == "worse"
    assert content["arms"]["flow/fast"]["distance"]["metric"] == "fd-digits"
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").read_text().splitlines()))
    assert {(row["objective"], row["arm"]) for row in rows} == {
        ("edm", "fast"), ("edm", "adaptive"), ("edm", "twin"), ("flow", "fast")
    }  # fmt: skip
    assert {"held_out_log_ratio", "fd-digits_log_ratio"} <= {row["metric"] for row in rows}


def test_objectives_may_be_measured_at_different_levels(grid: Grid, tmp_path: Path) -> None:
    for run in grid.runs(tmp_path / "out"):
        if run.objective == "flow":
            finished(run, 1.0, log_snr=[0.0, 2.0, 3.0])
    results = collect(grid, tmp_path / "out")
    write_results(results, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["arms"]["edm/fast"]["log_snr"] == [0.0, 2.0]
    assert content["arms"]["flow/fast"]["log_snr"] == [0.0, 2.0, 3.0]
    assert "flow,fast,constant,held_out_log_ratio_at_log_snr_3.00" in (tmp_path / "out" / "results.csv").read_text()


def test_run_that_diverged_is_no_claim_and_counts_as_an_arm(grid: Grid, tmp_path: Path) -> None:
    out = tmp_path / "out"
    corrected = {arm.label: arm.held_out.p for arm in collect(grid, out).arms}
    diverged = next(run for run in grid.runs(out) if run.label == "edm/adaptive" and run.seed == 2)
    finished(diverged, None)  # JSON has null for what is not finite; and no images can be drawn of such a run
    results = collect(grid, out)
    found = {arm.label: arm for arm in results.arms}
    assert found["edm/adaptive"].verdict == "no claim: a run diverged"
    assert found["edm/fast"].held_out.p == corrected["edm/fast"]
    write_results(results, out)
    content = json.loads((out / "results.json").read_text())["arms"]["edm/adaptive"]["held_out"]
    assert (content["mean"], content["per_seed"]["2"]) == (None, None)
    assert "not finite" in (out / "results.txt").read_text()


def test_images_of_some_runs_and_a_distance_of_zero_are_no_claim(grid: Grid, tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs = {(run.label, run.seed): run for run in grid.runs(out)}
    finished(runs["edm/fast", 1], 0.9)
    finished(runs["flow/fast", 1], 0.9, 0.0)
    found = {arm.label: arm.verdict for arm in collect(grid, out).arms}
    assert found["edm/fast"] == "no claim: images of 9 of 10 runs"
    assert found["flow/fast"] == "no claim: a distance is not above 0"


@pytest.mark.parametrize("seeds", [-2, 0, 6])
def test_number_of_seeds_is_one_that_the_file_has(seeds: int, grid: Grid, tmp_path: Path) -> None:
    with pytest.raises(GridError, match=f"seeds is {seeds}, expected 1 to 5"):
        read_grid(tmp_path / "grid.toml", seeds=seeds)
    assert read_grid(tmp_path / "grid.toml", seeds=4).seeds == (0, 1, 2, 3)
