"""What version 0.1 wrote opens in this version: state_dicts of criteria, and a run directory.

tests/data/version_0_1 was written by version 0.1, and is not written again:

    <weighting>.pt     state_dict of DiffusionLoss(<weighting>, bins=16, log_snr_range=(-8, 8)) after five calls
    <weighting>.json   what that criterion reported, null for NaN
    criterion.pickle   a pickled DiffusionLoss("variance_aware", bins=16, log_snr_range=(-8, 8)) after three calls
    run                vadiff train --channels 8 --steps 4 --batch-size 16 --bins 16 --log-snr-range -12 12
                       --schedule constant --warmup 0 --log-every 2 --no-tensorboard --keep-checkpoints 1
                       --held-out-images 20 --held-out-levels 4
"""

import csv
import dataclasses
import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import vadiff
from vadiff.trainer.cli import main
from vadiff.training import Run, open_run, train

FOLDER = Path(__file__).parent / "data" / "version_0_1"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A copy of the run directory: opening or resuming a run may write into it."""
    return open_run(shutil.copytree(FOLDER / "run", tmp_path / "run"))


def expected(weighting: str) -> dict[str, Any]:
    content = json.loads((FOLDER / f"{weighting}.json").read_text())
    return {
        name: torch.tensor([math.nan if number is None else number for number in value], dtype=torch.float64)
        if isinstance(value, list)
        else value
        for name, value in content.items()
    }


@pytest.mark.parametrize("weighting", ["variance_aware", "learned"])
def test_saved_criterion_reports_the_same_numbers(weighting: str) -> None:
    criterion = vadiff.DiffusionLoss(weighting, bins=16, log_snr_range=(-8.0, 8.0))
    criterion.load_state_dict(torch.load(FOLDER / f"{weighting}.pt", weights_only=True))
    numbers = expected(weighting)
    assert int(criterion.statistics.skipped) == numbers.pop("skipped") == 1
    weights = numbers.pop("weights")
    torch.testing.assert_close(criterion.weights.double(), weights, rtol=1e-5, atol=0)
    assert weights.unique().numel() > 8, "a table of ones would load as well"
    assert numbers.keys() == {"count", "mean", "variance", "mass"}
    for name, values in numbers.items():
        torch.testing.assert_close(getattr(criterion.statistics, name), values, rtol=1e-12, atol=0, equal_nan=True)


def test_pickled_criterion_goes_on_training() -> None:
    criterion = pickle.loads((FOLDER / "criterion.pickle").read_bytes())
    assert criterion.statistics.count.sum() == pytest.approx(59.7975, abs=1e-4)
    torch.testing.assert_close(criterion.weights[:4], torch.tensor([1.0101, 1.0050, 0.9852, 1.0391]), rtol=0, atol=1e-4)
    assert criterion(torch.randn(5, 3, requires_grad=True), torch.zeros(5, 3), torch.randn(5)).isfinite()
    assert criterion.statistics.count.sum() > 60


def test_saved_criterion_goes_on_training() -> None:
    criterion = vadiff.DiffusionLoss("variance_aware", bins=16, log_snr_range=(-8.0, 8.0))
    criterion.load_state_dict(torch.load(FOLDER / "variance_aware.pt", weights_only=True))
    before = criterion.statistics.count.sum()
    output, target = torch.randn(8, 3, 4, 4, requires_grad=True), torch.randn(8, 3, 4, 4)
    criterion(output, target, torch.linspace(-6, 6, 8)).backward()
    assert criterion.statistics.count.sum() != before
    assert output.grad is not None
    assert output.grad.isfinite().all()


def test_run_opens(run: Run) -> None:
    assert run.checkpoints() == [4]
    last = run.metrics()[-1]
    assert last["step"] == 4
    criterion = run.criterion()
    torch.testing.assert_close(criterion.weights, torch.tensor(last["weights"]), rtol=1e-5, atol=0)
    counts = torch.tensor(last["statistics"]["count"], dtype=torch.float64)
    torch.testing.assert_close(criterion.statistics.count, counts)
    denoiser = run.denoiser()
    noisy = torch.randn(2, *denoiser.image_shape or ())
    assert denoiser(noisy, torch.ones(2)).shape == noisy.shape


def test_held_out_loss_of_run_is_what_it_was(run: Run) -> None:
    from vadiff.trainer.training.held_out import held_out_loss_of_run

    recorded = run.metrics()[-1]["held_out"]
    for weights in ("ema", "raw"):
        found = held_out_loss_of_run(run.config, run.images(), run.denoiser(weights))
        torch.testing.assert_close(found.log_snr, torch.tensor(recorded["log_snr"]))
        torch.testing.assert_close(found.mean, torch.tensor(recorded[f"loss_{weights}"]), rtol=1e-4, atol=0)


def test_run_is_resumed(run: Run) -> None:
    before = run.metrics()
    trained = train(dataclasses.replace(run.config, steps=7), out=run.path, resume=True, progress=False)
    assert trained.metrics[: len(before)] == before
    assert trained.metrics[-1]["step"] == 7
    assert trained.metrics[-1]["skipped_steps"] == 0
    assert open_run(run.path).checkpoints() == [7]
    assert trained.criterion.statistics.count.sum() > 0


def test_run_is_evaluated(run: Run, digits_cache: Path) -> None:
    command = ["evaluate", str(run.path), "--images", "20", "--held-out-images", "20", "--devices", "cpu"]
    assert main([*command, "--cache", str(digits_cache)]) == 0
    folder = run.path / "evaluation" / "step-4"
    content = json.loads((folder / "metrics.json").read_text())
    assert math.isfinite(content["metrics"]["fd-digits"])
    assert content["generation"]["solver"] == "heun"
    recorded = run.metrics()[-1]["held_out"]
    lines = csv.DictReader((folder / "held-out.csv").read_text().splitlines())
    measured = [float(line["loss_ema"]) for line in lines]
    assert measured == pytest.approx(recorded["loss_ema"], rel=1e-3)
