"""vadiff.trainer.training.optimal_curve: runs trained with what is made of the optimal loss."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from test_training_resume import assert_same, outcome, stopping_at

from vadiff.errors import RunError
from vadiff.levels import GapLevels
from vadiff.optimal_loss import OptimalLoss
from vadiff.trainer.ablation import read_grid
from vadiff.trainer.ablation.grid import GridError
from vadiff.trainer.cli import main
from vadiff.trainer.training.assembly import build_criterion, build_levels
from vadiff.trainer.training.data_set import load_images
from vadiff.trainer.training.optimal_curve import CURVE_FILE, estimate_curve
from vadiff.training import Stopped, TrainConfig, open_run, train
from vadiff.weighting import GapWeighting, InverseOptimalLoss, MinSNR

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")

CONFIG = TrainConfig(
    steps=6, batch_size=16, channels=(8, 8), log_every=2, checkpoint_every=2, held_out_images=20, held_out_levels=3,
    tensorboard=False, device="cpu", backend="reference", weighting="gap", levels="gap", levels_every=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def optimal() -> OptimalLoss:
    return estimate_curve(CONFIG, load_images(CONFIG), torch.device("cpu"))


@pytest.fixture
def file(optimal: OptimalLoss, tmp_path: Path) -> Path:
    optimal.save(tmp_path / "digits.csv")
    return tmp_path / "digits.csv"


def test_estimated_curve_is_that_of_the_training_images_and_reaches_both_ends(optimal: OptimalLoss) -> None:
    assert (optimal.samples, optimal.elements) == (1500, 64)
    assert optimal.sigma[0] < optimal.sigma_star() / 5
    assert optimal.loss[-1] == pytest.approx(optimal.total_variance, rel=0.01)
    aimed = torch.maximum(0.02 * optimal.loss, torch.tensor(2e-4 * optimal.total_variance))
    assert bool((optimal.stderr <= aimed).logical_or(optimal.draws == 4096).all())
    mirrored = dataclasses.replace(CONFIG, flips=True)
    assert estimate_curve(mirrored, load_images(CONFIG), torch.device("cpu")).samples == 3000


def test_names_stand_for_the_schedule_in_the_form_that_is_trained_on(optimal: OptimalLoss) -> None:
    criterion, levels = build_criterion(CONFIG, optimal=optimal), build_levels(CONFIG, optimal=optimal)
    assert criterion.weighting == GapWeighting(optimal, prediction_type="edm", sigma_data=0.75)
    assert isinstance(levels, GapLevels)
    assert (levels.weighting, levels.prediction_type) == (criterion.weighting, "sample")  # EDM's residual is D's
    flow = dataclasses.replace(CONFIG, process="flow", weighting="inverse_optimal_loss", levels_options={"floor": 0.3})
    inverse, levels = build_criterion(flow, optimal=optimal).weighting, build_levels(flow, optimal=optimal)
    assert isinstance(inverse, InverseOptimalLoss)
    assert isinstance(levels, GapLevels)
    assert (inverse.prediction_type, levels.prediction_type, levels.floor) == ("flow", "flow", 0.3)
    assert levels.weighting == inverse
    of_min_snr = build_levels(dataclasses.replace(CONFIG, weighting="min_snr"), optimal=optimal)
    assert isinstance(of_min_snr, GapLevels)
    assert isinstance(of_min_snr.weighting, MinSNR)
    adaptive = build_levels(dataclasses.replace(CONFIG, weighting="variance_aware"), optimal=optimal)
    assert isinstance(adaptive, GapLevels)
    assert isinstance(adaptive.weighting, GapWeighting)  # a table is no weight of the x0 loss
    with pytest.raises(ValueError, match="optimal is None, expected the optimal loss of the training images"):
        build_criterion(CONFIG)
    with pytest.raises(ValueError, match=r"weighting_options is .*gamma"):
        build_criterion(dataclasses.replace(CONFIG, weighting_options={"gamma": 5.0}), optimal=optimal)


def test_gap_schedule_stopped_and_resumed_is_as_never_stopped(tmp_path: Path) -> None:
    train(CONFIG, out=tmp_path / "whole", progress=False)
    with pytest.raises(Stopped):
        train(CONFIG, stopping_at(4), out=tmp_path / "parted", progress=False)
    train(CONFIG, out=tmp_path / "parted", resume=True, progress=False)
    for one, other in zip(outcome(tmp_path / "whole"), outcome(tmp_path / "parted"), strict=True):
        assert_same(one, other)
    ratio = outcome(tmp_path / "whole")[0]["levels"]["ratio"].view(torch.float64)
    assert ratio.max() > 1.2  # levels did follow the gap


def test_run_keeps_the_curve_it_was_trained_with(file: Path, tmp_path: Path, optimal: OptimalLoss) -> None:
    config = dataclasses.replace(CONFIG, steps=2, levels="log_normal", optimal_loss=str(file))
    out = tmp_path / "run"
    trained = train(config, out=out, progress=False)
    file.unlink()
    assert (out / CURVE_FILE).exists()
    assert_same(OptimalLoss.load(out / CURVE_FILE).as_rows(), optimal.as_rows())
    assert torch.equal(open_run(out).criterion().weights, trained.criterion.weights)  # it stands on its own
    train(dataclasses.replace(config, optimal_loss=None, steps=2), out=out, resume=True, progress=False)
    with pytest.raises(RunError, match=r"optimal_loss is .*digits.csv, which cannot be read"):
        train(config, out=tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()
    train(dataclasses.replace(config, weighting="constant", optimal_loss=None), out=out, overwrite=True, progress=False)
    assert not (out / CURVE_FILE).exists()


def test_curve_of_other_images_is_refused(file: Path, tmp_path: Path) -> None:
    mirrored = dataclasses.replace(CONFIG, flips=True, optimal_loss=str(file))
    with pytest.raises(
        RunError, match=r"optimal_loss is of 1,500 images of 64 numbers, .* 3,000 of 64 \(each mirrored"
    ):
        train(mirrored, out=tmp_path / "run", progress=False)
    file.write_text("sigma,loss\n1,2\n")
    with pytest.raises(RunError, match="is not an optimal-loss curve"):
        train(dataclasses.replace(CONFIG, optimal_loss=str(file)), out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_flags_of_the_command_name_the_schedule_and_its_curve(file: Path, tmp_path: Path) -> None:
    flags = ["--weighting", "gap", "--levels", "gap", "--optimal-loss", str(file), "--steps", "1", "--batch-size", "8"]
    flags += ["--channels", "8,8", "--held-out-images", "8", "--no-tensorboard", "--device", "cpu"]
    assert main(["train", "--preset", "digits", *flags, "--out", str(tmp_path / "run")]) == 0
    config = open_run(tmp_path / "run").config
    assert (config.weighting, config.levels, config.optimal_loss) == ("gap", "gap", str(file))


GRID = """
preset = "digits"
baseline = "constant"
[config]
steps = 1
batch_size = 8
channels = [8, 8]
held_out_images = 8
tensorboard = false
device = "cpu"
optimal_loss = "FILE"
[arms.constant]
weighting = "constant"
[arms.gap]
weighting = "gap"
"""


def test_run_of_an_experiment_is_stale_when_its_curve_changed(file: Path, tmp_path: Path, optimal: OptimalLoss) -> None:
    (tmp_path / "grid.toml").write_text(GRID.replace("FILE", str(file)))
    run = next(run for run in read_grid(tmp_path / "grid.toml").runs(tmp_path / "out") if run.arm == "gap")
    train(run.config, out=run.path, progress=False)
    run.check()
    dataclasses.replace(optimal, loss=2 * optimal.loss).save(file)
    with pytest.raises(GridError, match=r"is stale: .*digits.csv has changed since"):
        run.check()


def test_run_of_a_version_without_the_field_counts_as_the_same(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(GRID.replace('optimal_loss = "FILE"', ""))
    run = next(run for run in read_grid(tmp_path / "grid.toml").runs(tmp_path / "out") if run.arm == "constant")
    train(run.config, out=run.path, progress=False)
    config = run.path / "config.yaml"
    config.write_text("".join(line for line in config.read_text().splitlines(True) if "optimal_loss" not in line))
    run.check()
    assert run.is_done
