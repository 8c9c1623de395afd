"""`vadiff optimal-loss`: its files, its table, a run's gap, and what it says to arguments that do not fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from vadiff.optimal_loss import OptimalLoss, estimate_until
from vadiff.trainer.cli import main
from vadiff.trainer.data import load_digits
from vadiff.training import TrainConfig, train

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def small_reference_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product that a command compares its speed with takes seconds."""
    monkeypatch.setattr("vadiff.trainer.cli.optimal_loss._SQUARE", 64)


QUICK = [
    "optimal-loss",
    "--dataset",
    "digits",
    "--levels",
    "4",
    "--sigma-min",
    "0.3",
    "--limit",
    "512",
    "--device",
    "cpu",
]


def test_it_writes_the_curve_of_the_training_images_and_a_picture(tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert main([*QUICK, "--out", str(out)]) == 0
    curve = OptimalLoss.load(out / "optimal_loss.csv")
    sigmas = torch.logspace(torch.tensor(0.3).log10().item(), torch.tensor(40.0).log10().item(), 4, dtype=torch.float64)
    torch.testing.assert_close(curve.sigma, sigmas, rtol=1e-6, atol=0)
    expected = estimate_until(load_digits().train, sigmas, limit=512)
    torch.testing.assert_close(curve.loss, expected.loss, rtol=1e-3, atol=1e-6)
    assert (out / "optimal_loss.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "1,500 images of 64 numbers, 4 noise levels, on cpu" in printed
    assert f"{curve.loss[1]:.5g}" in printed
    assert "GFLOP/s" in printed


def test_flips_and_a_subset_are_taken_into_account(tmp_path, capsys):
    options = ["--flips", "--estimator", "cdol", "--subset", "200", "--out", str(tmp_path)]
    assert main([*QUICK, *options]) == 0
    curve = OptimalLoss.load(tmp_path / "optimal_loss.csv")
    assert (curve.samples, curve.estimator) == (3000, "cdol")
    assert "3,000 images" in capsys.readouterr().out


def test_a_runs_loss_and_gap_stand_beside_it(tmp_path, capsys):
    pytest.importorskip("diffusers")
    config = TrainConfig(steps=2, batch_size=16, channels=(8, 8), held_out_draws=1, tensorboard=False, device="cpu")
    train(config, out=tmp_path / "run", progress=False)
    assert main([*QUICK, "--run", str(tmp_path / "run"), "--gap-images", "32", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"\d of 4 levels done after 512 draws, \d+ s", line) for line in printed)
    start = next(place for place, line in enumerate(printed) if "J*/D" in line)
    header, *lines = printed[start : start + 5]
    assert header.split()[-4:-2] == ["loss", "gap"]
    for line in lines:
        columns = [float(value) for value in line.replace("%", "").split()]
        loss, gap = columns[-3:-1]
        assert loss - gap == pytest.approx(columns[3], abs=2e-3 * max(loss, 1e-3))  # J*/D
    assert (tmp_path / "out" / "optimal_loss.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sigma-min", "50"], "--sigma-min: 50, expected 0 < sigma-min < sigma-max"),
        (["--levels", "1"], "--levels: 1"),
        (["--device", "gpu7"], "--device: gpu7"),
        (["--subset", "100"], "subset is 100 with estimator 'full'"),
        (["--estimator", "dol", "--subset", "9999"], "subset is 9999, expected an integer from 2 to 1500"),
        (["--limit", "0"], "limit is 0"),
    ],
)
def test_arguments_that_do_not_fit_are_usage_errors_and_write_nothing(tmp_path: Path, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        main([*QUICK, "--out", str(tmp_path / "out"), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_data_is_one_line_and_status_one(tmp_path, capsys):
    assert main(["optimal-loss", "--data", str(tmp_path / "nothing"), "--device", "cpu"]) == 1
    assert capsys.readouterr().err.startswith("vadiff: data is")
    assert main(["optimal-loss", "--run", str(tmp_path), "--device", "cpu"]) == 1
    assert "is not a run directory" in capsys.readouterr().err
