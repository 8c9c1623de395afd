"""vadiff.trainer.ablation: what a grid means, training it, and what is collected."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from vadiff.errors import RunError, UserError
from vadiff.trainer.ablation import Evaluation, collect, read_grid, results_table, train_all, write_results
from vadiff.trainer.ablation.evaluation import drawn_with, first_difference
from vadiff.trainer.ablation.grid import Grid, GridError, PlannedRun
from vadiff.trainer.cli import main
from vadiff.trainer.evaluation.digits_classifier import trained_classifier
from vadiff.trainer.evaluation.fidelity import content_key
from vadiff.trainer.training import run_folder
from vadiff.trainer.training.assembly import load_images
from vadiff.trainer.training.run_folder import begin, lock
from vadiff.training import TrainConfig, open_run, train

EXPERIMENTS = Path(__file__).parent.parent / "benchmarks" / "experiments"

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


def test_runs_are_paired_by_seed_and_those_that_are_needed_come_first(tmp_path: Path) -> None:
    grid = read_grid(grid_file(tmp_path))
    runs = grid.runs(tmp_path)
    assert [(run.arm, run.seed) for run in runs[:4]] == [
        ("constant", 0), ("fast", 0), ("variance_aware", 0), ("twin", 0)
    ]  # fmt: skip
    assert {run.seed: run.config.seed for run in runs} == {0: 0, 1: 1}
    by_name = {run.arm: run for run in runs if run.seed == 1}
    assert by_name["fast"].config.learning_rate == 2 * by_name["constant"].config.learning_rate
    assert by_name["twin"].needs == by_name["variance_aware"].path
    assert by_name["twin"].config.table == str(by_name["variance_aware"].path)
    differing = {
        field.name
        for field in dataclasses.fields(TrainConfig)
        if getattr(by_name["twin"].config, field.name) != getattr(by_name["constant"].config, field.name)
    }
    assert differing == {"weighting", "table"}


def test_grid_of_fields_is_every_combination(tmp_path: Path) -> None:
    text = 'preset = "digits"\nbaseline = "weighting=constant,steps=2"\n'
    text += '[grid]\nweighting = ["constant", "loss_level"]\nsteps = [2, 3]\n'
    grid = read_grid(grid_file(tmp_path, text), {"device": "cpu"})
    configs = [(run.config.weighting, run.config.steps, run.config.device) for run in grid.runs(tmp_path)]
    assert configs == [(w, s, "cpu") for w in ("constant", "loss_level") for s in (2, 3)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('preset = "digits"', 'preset = "numbers"', "preset is 'numbers', expected one of digits"),
        ('baseline = "constant"', 'baseline = "none"', "baseline is 'none', expected one of the arms: twin, constant"),
        ("seeds = [0, 1]", 'seeds = "all"', "seeds is 'all', expected a list of whole numbers"),
        ("steps = 4", "stepz = 4", "stepz: no such field"),
        ("steps = 4", "steps = 0", "steps is 0, expected at least 1"),
        ("times = 2.0", 'times = "x"', "arm fast has learning_rate times 'x', expected a number"),
        ("times = 2.0", "times = -1.0", r"arm fast: learning_rate is -0\.008, expected above 0"),
        ('arm = "variance_aware"', 'arm = "nobody"', "arm twin has table = {'arm': 'nobody'}, expected"),
        ("[arms.fast]", "[arms.fast]\nseed = 3", "arm fast has seed, which is not a field that an arm can set"),
        ("[arms.fast]", '[arms."../fast"]', r"arm '\.\./fast' names a folder"),
        ("[config]", "[configs]", "has configs, expected only arms, baseline"),
        ("[config]", "[config", "cannot be read"),
    ],
)
def test_invalid_grid_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(GridError, match=message):
        read_grid(grid_file(tmp_path, GRID.replace(old, new, 1))).runs(tmp_path)


def test_committed_experiment_on_digits_has_the_arms_that_were_fixed() -> None:
    grid = read_grid(EXPERIMENTS / "digits.toml", {"device": "cpu"})
    assert set(grid.arms) == {
        "constant", "constant_half_rate", "constant_twice_rate", "variance_aware", "loss_level", "cauchy",
        "static_twin", "sampling_twin", "min_snr", "learned", "second_moment", "gap",
    }  # fmt: skip
    assert grid.seeds == tuple(range(10))
    config = grid.base
    assert (config.held_out_levels, config.held_out_sigma, config.data_seed) == (12, (0.02, 20.0), None)
    assert all(run.config.steps == config.steps for run in grid.runs(Path("out")))


def test_committed_experiment_for_a_gpu_is_the_one_that_was_fixed() -> None:
    """Epsilon on linear betas first, then EDM at two p_mean; FID-768 and KID."""
    grid = read_grid(EXPERIMENTS / "cifar10_mini.toml", {"device": "cpu"})
    runs = grid.runs(Path("out"))
    found = {
        (run.config.process, run.config.form().prediction, run.config.p_mean if run.config.process == "edm" else None)
        for run in runs
    }
    assert found == {("vp_linear", "epsilon", None), ("edm", "edm", -1.2), ("edm", "edm", -0.4)}
    assert list(grid.objectives) == ["epsilon-linear", "edm", "edm-wide"]
    assert {run.config.weighting for run in runs} == {"constant", "min_snr", "variance_aware"}
    # an experiment that is cut short lacks objectives, not seeds
    assert [run.objective for run in runs] == [name for name in grid.objectives for _ in range(3 * 5)]
    how = {"solver": "dpmpp_2m", "spacing": "edm", "steps": 16}
    assert grid.evaluation == Evaluation(("fid", "kid"), layer="768", images=5000, **how)
    assert (grid.base.held_out_levels, grid.base.held_out_sigma) == (12, (0.02, 20.0))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Runs are trained in this process, which is faster; the list says in which order."""
    trained: list[Path] = []

    def train_here(self: object, run: PlannedRun) -> bool:
        trained.append(run.path)
        train(run.config, out=run.path, resume=True, progress=False)
        return True

    monkeypatch.setattr("vadiff.trainer.ablation.runner._Children.train", train_here)
    return trained


def test_grid_is_trained_collected_and_not_trained_again(tmp_path: Path, in_process: list[Path]) -> None:
    grid = read_grid(grid_file(tmp_path), seeds=2)
    assert train_all(grid, tmp_path / "out", jobs=1) == []
    assert len(in_process) == 8
    twin, source = (tmp_path / "out" / arm / "seed-1" for arm in ("twin", "variance_aware"))
    assert in_process.index(source) < in_process.index(twin)
    weights = open_run(twin).criterion().weights
    assert torch.allclose(weights, open_run(source).criterion().weights, rtol=1e-5)
    assert train_all(grid, tmp_path / "out") == []
    assert len(in_process) == 8

    results = collect(grid, tmp_path / "out")
    write_results(results, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(content["arms"]) == {"twin", "fast", "variance_aware"}
    assert content["missing"] == []
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").read_text().splitlines()))
    assert {row["metric"] for row in rows} >= {"held_out_log_ratio", "images_to_reach"}
    assert (
        "fewer than 5 seeds (here 2): they say nothing about the spread"
        in (tmp_path / "out" / "results.txt").read_text()
    )


def test_index_trains_one_run_and_what_it_needs(tmp_path: Path, in_process: list[Path]) -> None:
    grid = read_grid(grid_file(tmp_path))
    train_all(grid, tmp_path, index=7)
    assert in_process == [tmp_path / "variance_aware" / "seed-1", tmp_path / "twin" / "seed-1"]
    with pytest.raises(GridError, match="index is 8, expected 0 to 7"):
        train_all(grid, tmp_path, index=8)


def test_failed_run_fails_only_the_runs_that_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vadiff.trainer.ablation.runner._Children.train", lambda self, run: run.arm != "variance_aware")
    failed = train_all(read_grid(grid_file(tmp_path), seeds=1), tmp_path, jobs=2)
    assert [path.parent.name for path in failed] == ["variance_aware", "twin"]


def test_command_trains_in_subprocesses_and_resumes_interrupted_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = GRID[: GRID.index("[arms.twin]")] + '[arms.constant]\nweighting = "constant"\n'
    path, out = grid_file(tmp_path, text), tmp_path / "out"
    arguments = ["ablate", str(path), "--out", str(out), "--seeds", "1", "--steps", "3"]
    run = read_grid(path, {"steps": 3}).runs(out)[0]
    begin(run.path, run.config, load_images(run.config), resume=False)  # it got no further
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert main([*arguments, "--list"]) == 0
        assert "0 of 3" in capsys.readouterr().out
        assert main(arguments) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert open_run(run.path).metrics()[-1]["step"] == 3
    assert "Training digits" in (run.path / "train.log").read_text()


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


def test_primary_figure_is_the_paired_mean_of_log_ratios(tmp_path: Path) -> None:
    grid, runs = two_arms(tmp_path, 5)
    ratios = [(1.1, 0.9), (1.3, 1.0), (0.8, 1.05), (0.9, 0.95), (1.0, 1.2)]
    for seed, (low, high) in enumerate(ratios):
        level = 1.0 + seed  # pairs share what the seed does
        write_run(runs["constant", seed], [[level, level]], evaluation={"fid": 10.0 + seed})
        write_run(runs["other", seed], [[level * low, level * high]], evaluation={"fid": 12.0 + seed})
    (arm,) = collect(grid, tmp_path).arms
    expected = [(math.log(low) + math.log(high)) / 2 for low, high in ratios]
    assert list(arm.held_out.per_seed.values()) == pytest.approx(expected)
    assert arm.held_out.ratio.mean == pytest.approx(np.mean(expected))
    bounds = stats.t.interval(0.95, 4, loc=np.mean(expected), scale=stats.sem(expected))
    assert arm.held_out.ratio[1:3] == pytest.approx(bounds)
    assert arm.held_out.p == pytest.approx(stats.ttest_1samp(expected, 0.0).pvalue)
    assert arm.per_level[0].mean == pytest.approx(np.mean([math.log(low) for low, _ in ratios]))
    assert arm.evaluation["fid"][:3] == pytest.approx((2.0, 2.0, 2.0))
    assert arm.distance is not None
    assert arm.distance.ratio.mean == pytest.approx(np.mean([math.log((12 + seed) / (10 + seed)) for seed in range(5)]))


def test_images_to_reach_the_baselines_final_loss(tmp_path: Path) -> None:
    grid, runs = two_arms(tmp_path, 2)
    e = math.e
    write_run(runs["constant", 0], [[e**3, e**3], [e**2, e**2]])
    write_run(runs["other", 0], [[e**2.5, e**2.5], [e**1.5, e**1.5]])  # passes 2 half-way between 100 and 200 images
    write_run(runs["constant", 1], [[1.0, 1.0], [1.0, 1.0]])
    write_run(runs["other", 1], [[2.0, 2.0], [2.0, 2.0]])  # never gets there
    (arm,) = collect(grid, tmp_path).arms
    assert arm.reached == 1
    assert math.isnan(arm.images_to_reach.mean)  # of the fast ones alone it would flatter
    assert "1 of 2 reached" in results_table(collect(grid, tmp_path))
    shutil.rmtree(runs["other", 1].path)
    write_run(runs["other", 1], [[2.0, 2.0], [1.0, 1.0]])
    results = collect(grid, tmp_path)
    assert results.arms[0].images_to_reach.mean == pytest.approx(math.sqrt(150 / 200 * 1.0))
    assert " 0.87 × " in results_table(results)


def test_metrics_are_those_that_evaluate_left_for_the_last_step(tmp_path: Path) -> None:
    grid, runs = two_arms(tmp_path, 2)
    for (arm, seed), run in runs.items():
        write_run(run, [[1.0, 1.0], [1.0, 1.0]])
        for step, images in ((2, 100), (4, 200)):
            folder = run.path / "evaluation" / f"step-{step}"
            folder.mkdir(parents=True)
            metrics = {"fid": 100.0 / step + seed + 3.0 * (arm == "other")}
            content = {"step": step, "images_seen": images, "metrics": metrics}
            (folder / "metrics.json").write_text(json.dumps(content))
    assert collect(grid, tmp_path).arms[0].evaluation["fid"].mean == pytest.approx(3.0)
    shutil.rmtree(runs["other", 0].path / "evaluation" / "step-4")
    assert collect(grid, tmp_path).arms[0].evaluation == {}  # nothing to set beside the baseline's last
    (runs["other", 1].path / "evaluation" / "step-4" / "metrics.json").write_text("{")
    with pytest.raises(RunError, match=r"metrics\.json cannot be read"):
        collect(grid, tmp_path)


def evaluated(run: PlannedRun, **settings: Any) -> None:
    """What `vadiff evaluate` leaves."""
    folder = run.path / "evaluation" / f"step-{run.config.steps}"
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "step": run.config.steps, "images_seen": 100, "metrics": {"fid-64": 5.0}, "images": 6, "first_seed": 0,
        "generation": {"sampler": "heun", "weights": "ema"}, "layer": "64", "inception_weights": "published",
        "reference_sha256": "real", **settings,
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(content))


def evaluated_digits(grid: Grid, run: PlannedRun, cache: Path, **settings: Any) -> None:
    """What `vadiff ablate --evaluate` leaves by default in a run on digits."""
    found = {
        "features": "digits", "images": 5000, "metrics": {"fd-digits": 3.0, "kid-digits": 0.1},
        "generation": grid.evaluation.generation(run.config.process).recorded(),
        "digits_classifier": trained_classifier(cache).key,
        "reference_sha256": content_key(load_images(run.config).train),
    }  # fmt: skip
    evaluated(run, **(found | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": 7}, "arm other, seed 1 was evaluated with images 7, arm constant, seed 0 with 6: their metrics"),
        ({"layer": "768"}, "arm other, seed 1 was evaluated with layer '768', arm constant, seed 0 with '64'"),
        ({"reference_sha256": "others"}, "seed 1 was evaluated with reference_sha256 'others', .* with 'real'"),
        ({"inception_weights": "abc"}, "seed 1 was evaluated with inception_weights 'abc', .* with 'published'"),
        ({"generation": {"sampler": "euler", "weights": "ema"}}, r"evaluated with generation\.solver 'euler'"),
    ],
)
def test_runs_that_were_evaluated_differently_are_named_and_not_averaged(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    grid, runs = two_arms(tmp_path, 2)
    for run in runs.values():
        write_run(run, [[1.0, 1.0]])
        evaluated(run)
    assert collect(grid, tmp_path).arms[0].evaluation["fid-64"].mean == 0.0
    evaluated(runs["other", 1], **settings)
    with pytest.raises(GridError, match=message):
        collect(grid, tmp_path)


@pytest.mark.parametrize("process", ["edm", "flow"])
def test_evaluation_of_version_0_1_counts_as_done_and_equals_one_of_now(tmp_path: Path, process: str) -> None:
    euler = process == "flow"
    then = {
        "sampler": "euler" if euler else "heun", "steps": 50 if euler else 18, "sigma_min": 0.002,
        "sigma_max": 1000.0 if euler else 80.0, "label": None, "guidance": 1.0, "weights": "ema", "churn": None,
    }  # fmt: skip
    evaluation = Evaluation(metrics=("fid",), features="inception", layer="64", images=6)
    _, runs = two_arms(tmp_path, 1)
    old, new = runs["constant", 0], runs["other", 0]
    evaluated(old, generation=then)
    evaluated(new, generation=evaluation.generation(process).recorded())
    steps = old.config.steps
    assert first_difference(drawn_with(old.path, steps), drawn_with(new.path, steps)) is None
    config = dataclasses.replace(old.config, process=process)
    assert evaluation.was_done(old.path, config, steps, "published", "real")
    assert not dataclasses.replace(evaluation, solver="dpmpp_2m").was_done(old.path, config, steps, "published", "real")
    assert not evaluation.was_done(old.path, config, steps, "others", "real")
    assert not evaluation.was_done(old.path, config, steps, "published", "others")
    evaluated(new, generation=then, seeds="0-4,7")
    assert not evaluation.was_done(new.path, config, steps, "published", "real")


def test_evaluation_passes_the_solver_on() -> None:
    options = Evaluation(solver="dpmpp_2m", spacing="edm", steps=16).arguments("digits")
    assert options[-6:] == ["--solver", "dpmpp_2m", "--spacing", "edm", "--steps", "16"]
    assert "--solver" not in Evaluation().arguments("cifar10")


def test_evaluate_measures_each_run_once_from_the_same_seeds(
    tmp_path: Path, in_process: list[Path], inception_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = GRID[: GRID.index("[arms.twin]")] + '[arms.constant]\nweighting = "constant"\n[arms.other]\n'
    path = grid_file(
        tmp_path,
        text + '[evaluate]\nmetrics = ["fid"]\nfeatures = "inception"\nlayer = "64"\nimages = 6\nfirst_seed = 3\n',
    )
    commands: list[list[str]] = []

    def call(self: object, command: list[str], log: Path) -> int:
        commands.append(command)
        assert log.name == "evaluate.log"
        return main(command)

    monkeypatch.setattr("vadiff.trainer.ablation.runner._Children._call", call)
    monkeypatch.setattr("vadiff.trainer.training.run.Run.images", few_images)
    arguments = ["ablate", str(path), "--out", str(tmp_path / "out"), "--seeds", "1", "--evaluate"]
    arguments += ["--inception-weights", str(inception_weights), "--cache", str(tmp_path / "cache")]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert main(arguments) == 0
        assert [Path(command[1]).parent.name for command in commands] == ["constant", "other"]
        assert "fid-64" in (tmp_path / "out" / "results.txt").read_text()
        content = json.loads((tmp_path / "out" / "other/seed-0/evaluation/step-4/metrics.json").read_text())
        assert (content["first_seed"], content["images"], content["layer"]) == (3, 6, "64")
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert list(results["arms"]["other"]["evaluation"]) == ["fid-64"]
        assert main(arguments) == 0
        assert len(commands) == 2  # nothing is measured twice
        path.write_text(path.read_text().replace("images = 6", "images = 5"))
        assert main(arguments) == 0
        assert len(commands) == 4
    finally:
        signal.signal(signal.SIGTERM, handler)


def few_images(run: Any) -> Any:
    images = load_images(run.config)
    return images._replace(train=images.train[:6], train_labels=None)


def test_run_that_cannot_be_evaluated_is_named_and_the_others_are(
    tmp_path: Path, digits_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, runs = two_arms(tmp_path, 2)
    for run in runs.values():
        write_run(run, [[1.0, 1.0]])
    seen: list[Path] = []

    def evaluate(self: object, run: PlannedRun, options: list[str]) -> bool:
        seen.append(run.path)
        return run.path != runs["other", 0].path

    monkeypatch.setattr("vadiff.trainer.ablation.runner._Children.evaluate", evaluate)
    assert train_all(grid, tmp_path, jobs=2, evaluate=True, cache=digits_cache) == [runs["other", 0].path]
    assert len(seen) == 4
    assert train_all(grid, tmp_path, index=1, evaluate=True, cache=digits_cache) == [runs["other", 0].path]
    assert seen[4:] == [runs["other", 0].path]


def test_run_is_trained_and_measured_in_one_job_and_neither_is_done_again(
    tmp_path: Path, in_process: list[Path], digits_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = read_grid(grid_file(tmp_path), seeds=1)
    done: list[tuple[str, str]] = []
    killed = ["fast"]

    def evaluate(self: object, run: PlannedRun, options: list[str]) -> bool:
        assert run.is_done
        done.append((run.arm, options[options.index("--features") + 1]))
        if run.arm in killed:
            raise KeyboardInterrupt
        evaluated_digits(grid, run, digits_cache)
        return True

    monkeypatch.setattr("vadiff.trainer.ablation.runner._Children.evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        train_all(grid, tmp_path, evaluate=True, cache=digits_cache)
    assert [path.parent.name for path in in_process] == ["constant", "fast"]  # "fast" was trained before the others
    killed.clear()
    assert train_all(grid, tmp_path, evaluate=True, cache=digits_cache) == []
    assert [path.parent.name for path in in_process] == ["constant", "fast", "variance_aware", "twin"]
    assert done == [(arm, "digits") for arm in ("constant", "fast", "fast", "variance_aware", "twin")]


def test_runs_that_were_measured_by_other_networks_or_images_are_measured_again(
    tmp_path: Path, digits_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, runs = two_arms(tmp_path, 2)
    for run in runs.values():
        write_run(run, [[1.0, 1.0]])
        evaluated_digits(grid, run, digits_cache)
    evaluated_digits(grid, runs["other", 0], digits_cache, digits_classifier="of another machine")
    evaluated_digits(grid, runs["other", 1], digits_cache, reference_sha256="of other data")
    with pytest.raises(GridError, match="`vadiff ablate --evaluate` measures all of them alike"):
        collect(grid, tmp_path)
    seen: list[Path] = []

    def evaluate(self: object, run: PlannedRun, options: list[str]) -> bool:
        seen.append(run.path)
        evaluated_digits(grid, run, digits_cache)
        return True

    monkeypatch.setattr("vadiff.trainer.ablation.runner._Children.evaluate", evaluate)
    assert train_all(grid, tmp_path, evaluate=True, cache=digits_cache) == []
    assert seen == [runs["other", 0].path, runs["other", 1].path]
    assert collect(grid, tmp_path).arms[0].distance is not None


def test_run_that_is_being_measured_counts_as_not_measured(tmp_path: Path) -> None:
    grid, runs = two_arms(tmp_path, 5)
    for run in runs.values():
        write_run(run, [[1.0, 1.0]])
        evaluated(run, repeats=3, means_over=[0, 6, 12])
    evaluated(runs["other", 1], repeats=3, means_over=[0, 6])
    (arm,) = collect(grid, tmp_path).arms
    assert arm.distance is None
    assert arm.verdict == "no claim: images of 9 of 10 runs"


def test_network_that_images_are_compared_by_is_looked_for_before_training(
    tmp_path: Path, in_process: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for table, error, message in (
        ('features = "inception"', UserError, "Inception weights could not be downloaded"),
        ('layer = "768"', GridError, "evaluate: layer is '768', but features is digits"),
    ):
        grid = read_grid(grid_file(tmp_path, f"{GRID}[evaluate]\n{table}\n"), seeds=1)
        with pytest.raises(error, match=message):
            train_all(grid, tmp_path, evaluate=True)
    assert in_process == []


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('layer = "1024"', "evaluate: layer is '1024', expected one of 64, 192, 768, 2048 in quotes"),
        ('metrics = ["fidd"]', r"evaluate: metrics is \['fidd'\], expected some of fid"),
        ('metrics = "fid"', "evaluate: metrics is 'fid', expected a list"),
        ("images = 2", "evaluate: images is 2, expected a whole number from 5"),
        ("steps = 1", "evaluate: steps is 1, expected a whole number from 2"),
        ('solver = "ddim"', "evaluate: solver is 'ddim', expected one of heun, euler, ddpm, dpmpp_2m in quotes"),
        ("spacing = 1", "evaluate: spacing is 1, expected one of edm, flow, timesteps in quotes"),
        ("repeats = 0", "evaluate: repeats is 0, expected a whole number from 1"),
        ('features = "vgg"', "evaluate: features is 'vgg', expected one of inception, digits"),
        ("seed = 2", r"evaluate: evaluate is \{'seed': 2\}, expected only metrics, features"),
    ],
)
def test_evaluation_that_makes_no_sense_is_named(table: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(GridError, match=message):
        read_grid(grid_file(tmp_path, f"{GRID}[evaluate]\n{table}\n"))


def test_options_of_evaluate_need_its_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--cache", "folder"], "argument --cache: is for --evaluate"),
        (["--evaluate", "--list"], "argument --evaluate: --list and --collect measure nothing"),
        (["--evaluate", "--inception-weights", "no.pth"], "argument --inception-weights: no.pth is not a file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["ablate", str(grid_file(tmp_path)), *arguments])
        assert message in capsys.readouterr().err


def test_pairs_that_were_measured_differently_are_named(tmp_path: Path) -> None:
    grid, runs = two_arms(tmp_path, 1)
    write_run(runs["constant", 0], [[1.0, 1.0]])
    held_out = {"log_snr": [0.0, 3.0], "loss_raw": [9.0, 9.0], "loss_ema": [1.0, 1.0]}
    write_run(runs["other", 0], [[1.0, 1.0]], held_out=held_out)
    with pytest.raises(GridError, match=r"arm other, seed 0 measured its held-out loss at log_snr \[0\.0, 3\.0\]"):
        collect(grid, tmp_path)
    arms = {**grid.arms, "other": {"weighting": "loss_level", "sigma_data": 0.5}}
    grid = dataclasses.replace(grid, arms=arms)
    shutil.rmtree(runs["other", 0].path)
    write_run({run.arm: run for run in grid.runs(tmp_path)}["other"], [[1.0, 1.0]])
    with pytest.raises(GridError, match=r"arm other, seed 0 weighs its held-out loss by sigma_data 0\.5, the baseline"):
        collect(grid, tmp_path)


def test_run_of_other_settings_is_neither_gone_on_with_nor_collected(tmp_path: Path, in_process: list[Path]) -> None:
    grid, runs = two_arms(tmp_path, 1)
    write_run(runs["other", 0], [[1.0, 1.0]])
    for text, message in (
        (GRID.replace("steps = 4", "steps = 8"), "steps was 4, is 8, which changes the linear schedule"),
        (GRID.replace("steps = 4", "steps = 4\nlearning_rate = 1e-4"), r"learning_rate was 0\.008, is 0\.0001"),
        (GRID.replace("held_out_images = 8", "held_out_images = 9"), "held_out_images was 8, is 9"),
    ):
        edited = dataclasses.replace(read_grid(grid_file(tmp_path, text), seeds=1), arms=grid.arms)
        for use in (collect, train_all):
            with pytest.raises(GridError, match=f"other/seed-0 was trained with other settings: {message}"):
                use(edited, tmp_path)
    assert in_process == []


def test_twin_of_a_run_that_was_trained_again_is_stale(tmp_path: Path, in_process: list[Path]) -> None:
    grid = read_grid(grid_file(tmp_path), seeds=1)
    train_all(grid, tmp_path, index=3)
    path = tmp_path / "variance_aware" / "seed-0" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1]["weights"][0] *= 1.01
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for use in (collect, train_all):
        with pytest.raises(GridError, match=r"twin/seed-0 is stale: .*variance_aware/seed-0 has ended with another"):
            use(grid, tmp_path)


def test_run_that_another_process_trains_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks of a job array need the same run: one trains it, the other goes on when it is there."""
    grid = read_grid(grid_file(tmp_path), seeds=1)
    source = {run.arm: run for run in grid.runs(tmp_path)}["variance_aware"]
    source.path.mkdir(parents=True)
    trained: list[str] = []
    waited = threading.Event()

    def train_here(self: object, run: PlannedRun) -> bool:
        trained.append(run.arm)
        train(run.config, out=run.path, resume=True, progress=False)
        return True

    def is_in_use(path: Path) -> bool:
        waited.set()
        return run_folder.is_in_use(path)

    monkeypatch.setattr("vadiff.trainer.ablation.runner._Children._train_once", train_here)
    monkeypatch.setattr("vadiff.trainer.ablation.runner.is_in_use", is_in_use)
    monkeypatch.setattr("vadiff.trainer.ablation.runner._POLL_SECONDS", 0.01)
    with lock(source.path):  # as the other task has it
        task = threading.Thread(target=train_all, args=(grid, tmp_path), kwargs={"index": 3})
        task.start()
        assert waited.wait(30)
        assert trained == []
        write_run(source, [[1.0, 1.0]], weights=[1.0] * 128)
    task.join(60)
    assert trained == ["twin"]


def test_trial_goes_to_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", str(grid_file(tmp_path)), "--list", "--steps", "3"]) == 0
    assert "runs/tiny-3-steps/constant/seed-0" in capsys.readouterr().out
    assert main(["ablate", str(grid_file(tmp_path)), "--list"]) == 0
    assert "runs/tiny/constant/seed-0" in capsys.readouterr().out


def test_list_into_a_closed_pipe_is_no_failure(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "vadiff", "ablate", str(grid_file(tmp_path)), "--list"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 141


def test_unfinished_and_unpaired_runs_are_excluded_and_named(tmp_path: Path) -> None:
    grid, runs = two_arms(tmp_path, 2)
    write_run(runs["constant", 0], [[1.0, 1.0]])
    write_run(runs["other", 0], [[2.0, 2.0]])
    write_run(runs["other", 1], [[2.0, 2.0]])
    write_run(runs["constant", 1], [[1.0, 1.0]], step=1)
    results = collect(grid, tmp_path)
    assert results.arms[0].held_out.ratio.number == 1
    assert math.isnan(results.arms[0].held_out.ratio.low)
    assert set(results.missing) == {"constant/seed-1", "other/seed-1"}
    assert results_table(results).endswith("how many of their runs: constant (1), other (1)")
    assert json.loads(json.dumps(results.as_dict(), allow_nan=False))["arms"]["other"]["held_out"]["low"] is None


def test_interrupted_ablation_tells_its_processes_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[int] = []
    told = threading.Event()

    class Process:
        returncode = -15

        def wait(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)  # reaches the main thread, which waits for this one
            told.wait(30)

        def send_signal(self, number: int) -> None:
            stopped.append(number)
            told.set()

    monkeypatch.setattr("subprocess.Popen", lambda *arguments, **options: Process())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            train_all(read_grid(grid_file(tmp_path), seeds=1), tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped == [signal.SIGTERM]
