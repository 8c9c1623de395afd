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

import numpy as np
import pytest
import torch
from ablation_runs import GRID, grid_file, two_arms, write_run
from scipy import stats

from vadiff.errors import RunError
from vadiff.trainer.ablation import Evaluation, collect, read_grid, results_table, train_all, write_results
from vadiff.trainer.ablation.grid import GridError, PlannedRun
from vadiff.trainer.cli import main
from vadiff.trainer.training import run_folder
from vadiff.trainer.training.data_set import load_images
from vadiff.trainer.training.run_folder import begin, lock
from vadiff.training import TrainConfig, open_run, train

EXPERIMENTS = Path(__file__).parent.parent / "benchmarks" / "experiments"


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
    assert grid.seeds == tuple(range(5))
    # an experiment that is cut short lacks objectives, not seeds
    assert [run.objective for run in runs] == [name for name in grid.objectives for _ in range(3 * 5)]
    how = {"solver": "dpmpp_2m", "spacing": "edm", "steps": 16}
    assert grid.evaluation == Evaluation(("fid", "kid"), layer="768", images=5000, **how)
    assert (grid.base.held_out_levels, grid.base.held_out_sigma) == (12, (0.02, 20.0))


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
    table = results_table(collect(grid, tmp_path))
    assert "1 of 2 reached" in table
    assert "paired by seed; mean\n" in table
    assert "No intervals from fewer than 5 seeds (here 2)" in table
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
