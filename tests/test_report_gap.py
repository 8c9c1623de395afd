"""vadiff.trainer.report.gap: what `vadiff evaluate --gap` prints and writes, and the report shows."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vadiff.optimal_loss import OptimalLoss
from vadiff.process import loss_ratio
from vadiff.trainer.cli import main
from vadiff.trainer.report.page import sections_of
from vadiff.trainer.report.runs import group_runs, read_history
from vadiff.trainer.training.optimal_curve import estimate_curve
from vadiff.trainer.training.run_gap import direct_gap_of_run, gap_of_run
from vadiff.training import open_run

pytest.importorskip("plotly")
pytest.importorskip("jinja2")


def test_gap_of_a_run_is_evaluated_and_reported(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained_run, tmp_path / "run")
    curves: list[OptimalLoss] = []

    def roughly(*arguments: Any, **options: Any) -> OptimalLoss:
        curves.append(estimate_curve(*arguments, **{**options, "limit": 512}))
        return curves[0]

    monkeypatch.setattr("vadiff.trainer.report.evaluate.estimate_curve", roughly)
    nothing_else = ["--metrics", "none", "--no-held-out", "--devices", "cpu"]
    assert main(["evaluate", str(tmp_path / "run"), *nothing_else, "--gap", "--gap-images", "40"]) == 0
    printed = capsys.readouterr().out
    run = open_run(tmp_path / "run")
    folder = run.path / "evaluation" / f"step-{run.config.steps}"
    assert sorted(file.name for file in folder.iterdir()) == ["gap.csv"]
    rows = list(csv.DictReader((folder / "gap.csv").read_text().splitlines()))
    assert len(rows) == run.config.held_out_levels

    assert [float(row["sigma"]) for row in rows] == pytest.approx(curves[0].sigma.tolist())
    gap = gap_of_run(run, curves[0], number=40)
    unit = loss_ratio("edm", -2.0 * gap.sigma.log(), sigma_data=run.config.sigma_data)
    for row, expected, error in zip(rows, (unit * gap.gap).tolist(), (unit * gap.stderr).tolist(), strict=True):
        assert float(row["gap"]) == pytest.approx(expected, rel=1e-4)
        assert float(row["gap_standard_error"]) == pytest.approx(error, rel=1e-4)
        assert f"{float(row['gap']):.5f} ± {float(row['gap_standard_error']):.5f}" in printed

    assert main(["report", str(run.path)]) == 0
    page = (run.path / "report.html").read_text()
    assert "Gap to the optimal loss" in page
    [section] = [each for each in sections_of(group_runs([read_history(run)])) if each.anchor == "gap"]
    drawn = {line.name: line for line in section.charts[0].figure.data}
    np.testing.assert_allclose(drawn["loss of the run"].y, [float(row["loss"]) for row in reversed(rows)])
    assert list(drawn["optimal loss"].text) == [f"{float(row['optimal']):.4g}" for row in reversed(rows)]
    sections = sections_of(group_runs([read_history(open_run(trained_run))]))  # of a run that was not measured
    assert "gap" not in [section.anchor for section in sections]


def test_gap_of_a_run_is_measured_directly(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(shutil.copytree(trained_run, tmp_path / "run"))
    options = [
        "--metrics",
        "none",
        "--no-held-out",
        "--devices",
        "cpu",
        "--gap",
        "--gap-images",
        "40",
        "--gap-directly",
    ]
    assert main(["evaluate", str(run.path), *options]) == 0
    printed = capsys.readouterr().out
    written = run.path / "evaluation" / f"step-{run.config.steps}" / "gap.csv"
    rows = list(csv.DictReader(written.read_text().splitlines()))
    sigmas = [float(row["sigma"]) for row in rows]
    direct = direct_gap_of_run(run, sigmas, number=40)
    unit = loss_ratio("edm", -2.0 * direct.sigma.log(), sigma_data=run.config.sigma_data)
    assert [float(row["gap"]) for row in rows] == pytest.approx((unit * direct.gap).tolist(), rel=1e-4)
    assert f"{float(rows[0]['gap']):.5f} ± {float(rows[0]['gap_standard_error']):.5f}" in printed

    curve = estimate_curve(run.config, run.images(), torch.device("cpu"), sigmas=sigmas, limit=2048)
    subtracted = gap_of_run(run, curve, number=40)
    error = (direct.stderr.square() + subtracted.stderr.square()).sqrt()
    assert ((direct.gap - subtracted.gap).abs() < 4 * error).all()
    assert (direct.stderr <= 1.1 * subtracted.stderr).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gap"], "argument --gap: . is not a run directory"),
        (["--gap-images", "1"], "--gap-images: 1, expected at"),
        (["--gap-directly"], "argument --gap-directly: expected with --gap"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", ".", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
