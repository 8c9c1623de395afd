"""`vadiff ablate --evaluate`: what is measured, what counts as measured, and what is said of what cannot be."""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ablation_runs import GRID, grid_file, two_arms, two_finished_arms

from vadiff.errors import UserError
from vadiff.information import Profile
from vadiff.trainer.ablation import Evaluation, collect, read_grid, train_all
from vadiff.trainer.ablation.evaluation import drawn_with, first_difference
from vadiff.trainer.ablation.grid import Grid, GridError, PlannedRun
from vadiff.trainer.cli import main
from vadiff.trainer.evaluation.digits_classifier import trained_classifier
from vadiff.trainer.evaluation.fidelity import content_key
from vadiff.trainer.training.data_set import load_images
from vadiff.training import Run


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
    grid, runs = two_finished_arms(tmp_path, 2)
    for run in runs.values():
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


def test_evaluation_by_statistics_is_done_again_if_the_statistics_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = Evaluation(metrics=("fid",), features="inception", layer="64", images=6, spacing="statistics")
    _, runs = two_arms(tmp_path, 1)
    run, level = runs["constant", 0], torch.tensor([-6.0, 0.0, 6.0])
    profile = Profile(level, torch.tensor([0.3, 0.2, 0.002]))
    evaluated(run, generation=evaluation.generation("edm", profile=profile).recorded())
    run.config.save(run.path / "config.yaml")
    was_done = functools.partial(
        evaluation.was_done, run.path, run.config, run.config.steps, network="published", reference="real"
    )
    monkeypatch.setattr("vadiff.trainer.training.run.Run.profile", lambda run, step: profile)
    assert was_done()
    monkeypatch.setattr("vadiff.trainer.training.run.Run.profile", lambda run, step: profile.bounded(0.5))
    assert not was_done()

    def none(run: Run, step: int) -> Profile:
        raise ValueError("the criterion has 0 samples")

    monkeypatch.setattr("vadiff.trainer.training.run.Run.profile", none)
    assert not was_done()


def test_evaluation_passes_the_solver_on() -> None:
    options = Evaluation(solver="dpmpp_2m", spacing="edm", steps=16).arguments("digits")
    assert options[-6:] == ["--solver", "dpmpp_2m", "--spacing", "edm", "--steps", "16"]
    by_statistics = Evaluation(solver="euler", spacing="statistics").arguments("digits")
    assert by_statistics[-4:] == ["--solver", "euler", "--steps-from", "statistics"]
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
    grid, runs = two_finished_arms(tmp_path, 2)
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
    grid, runs = two_finished_arms(tmp_path, 2)
    for run in runs.values():
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
    grid, runs = two_finished_arms(tmp_path, 5)
    for run in runs.values():
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
        ("spacing = 1", "evaluate: spacing is 1, expected one of edm, flow, timesteps, statistics in quotes"),
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
