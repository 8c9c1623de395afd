"""`vadiff report --from-log` and `vadiff diagnose`: any loop's log as a page, a run's criterion as a verdict."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import vadiff
from vadiff.errors import RunError
from vadiff.optimal_loss import OptimalLoss
from vadiff.trainer.cli import main
from vadiff.trainer.report.from_log import read_log
from vadiff.training import open_run


def trained(
    path: Path, weighting: str = "constant", steps: int = 20, prefix: str = "vadiff", tilt: float = 0.4
) -> vadiff.DiffusionLoss:
    """A loop of one's own that logs every fifth step; the mean loss is exp(tilt·λ)."""
    file, criterion = vadiff.MetricsFile(path), vadiff.DiffusionLoss(weighting, half_life=math.inf)
    for step in range(1, steps + 1):
        log_snr = 12 * torch.rand(512) - 6
        loss = criterion.reweight((tilt * log_snr).exp() * (1 + 0.2 * torch.randn(512)), log_snr)
        if step % 5 == 0:
            criterion.log_to(file, step, prefix=prefix)
            file.log({"loss": loss.mean(), f"{prefix}/level_free_loss": 1 / step}, step)
    return criterion


def test_bands_read_from_a_log_are_those_of_the_criterion(tmp_path: Path) -> None:
    criterion = trained(tmp_path / "log.jsonl")
    ((logged,), step, own) = read_log(tmp_path / "log.jsonl")
    bands, expected = logged.bands(), criterion.diagnose().bands
    assert bands is not None
    seen = expected.samples > 0
    np.testing.assert_allclose(bands.edges, expected.edges[3 + 2 : 11 + 1])  # -6 to 6 of -16 to 16
    for found, values in zip(bands[1:], expected[1:], strict=True):
        np.testing.assert_allclose(found, values[seen], rtol=1e-12)
    assert step.tolist() == [5, 10, 15, 20]
    assert list(own) == ["loss"]


@pytest.mark.parametrize(
    ("weighting", "words"), [("constant", "Try criterion"), ("loss_level", "The weighting brings that to")]
)
def test_verdict_of_a_log_is_that_of_the_criterion(tmp_path: Path, weighting: str, words: str) -> None:
    criterion = trained(tmp_path / "log.jsonl", weighting)
    ((logged,), *_) = read_log(tmp_path / "log.jsonl")
    verdict = logged.verdict()
    assert verdict is not None
    assert verdict.finding == criterion.diagnose().finding == "try"
    assert words in verdict.text


def test_level_seen_only_at_times_leaves_a_gap(tmp_path: Path) -> None:
    file, criterion = vadiff.MetricsFile(tmp_path / "log.jsonl"), vadiff.DiffusionLoss("constant")
    for step, level in ((1, 1.0), (2, 7.0)):
        criterion.reweight(torch.ones(8), torch.full((8,), level))
        criterion.log_to(file, step)
    ((logged,), *_) = read_log(file.path)
    assert logged.edges.tolist() == [0.0, 2.0, 6.0, 8.0]
    assert np.isnan(logged.banded["base_loss"]).tolist() == [[False, True, True], [False, True, False]]


def test_page_of_a_log_has_its_charts_values_and_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "<b>mine.jsonl"
    trained(path)
    assert main(["report", "--from-log", str(path)]) == 0
    page = tmp_path / "<b>mine.html"
    assert str(page) in capsys.readouterr().out
    html = page.read_text()
    assert re.search(r"differs 5\d-fold", html)
    assert "Level-free loss" in html
    assert "10,240" in html  # samples
    assert "<b>" not in html
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert {file.stem for file in page.with_suffix("").iterdir()} == {
        "base-loss-profile", "level-free-loss", "base-loss", "weight", "share", "logged-loss"
    }  # fmt: skip


def test_two_criteria_of_one_log_have_sections_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    trained(path, steps=5, prefix="image")
    trained(path, steps=5, prefix="video", tilt=0.0)
    assert main(["report", "--from-log", str(path), "--out", str(tmp_path / "page.html")]) == 0
    html = (tmp_path / "page.html").read_text()
    assert "Over training, image" in html
    assert "Over training, video" in html
    assert "video: the mean loss differs only" in html


def test_log_without_a_criterion_or_a_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = vadiff.MetricsFile(tmp_path / "log.jsonl")
    with pytest.raises(RunError, match=r"log\.jsonl cannot be read: .*No such file"):
        read_log(file.path)
    file.log({"loss": 1.0}, step=1)
    assert main(["report", "--from-log", str(file.path)]) == 1
    assert "has no loss per noise level: write it with criterion.log_to(vadiff.MetricsFile(" in capsys.readouterr().err
    assert list(tmp_path.glob("*.html")) == []


@pytest.mark.parametrize("arguments", [[], ["RUN", "--from-log", "FILE"]], ids=str)
def test_report_takes_runs_or_a_log(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report", *arguments])
    assert stopped.value.code == 2
    assert "expected run directories, or --from-log FILE, and not both" in capsys.readouterr().err


def test_diagnose_prints_the_diagnosis_of_the_last_checkpoint(
    trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", str(trained_run)]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{open_run(trained_run).criterion().diagnose()}\n"
    assert "verdict: too few samples" in printed
    last = open_run(trained_run).checkpoints()[-1]
    assert main(["diagnose", str(trained_run), "--step", str(last)]) == 0
    assert capsys.readouterr().out == printed
    assert main(["diagnose", str(trained_run), "--step", str(last + 1)]) == 1
    assert f"has no checkpoint of step {last + 1}" in capsys.readouterr().err


def test_diagnose_with_an_optimal_loss_shows_the_gap(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(trained_run)
    facts = run.data_facts()
    assert facts is not None
    sigma, ones = torch.logspace(-2, 2, 10, dtype=torch.float64), torch.ones(10)
    number = facts.train * (2 if run.config.flips else 1)
    curve = OptimalLoss(sigma, 1e-6 * ones, 0 * ones, ones.long(), 64, 64.0, number, classes=10)
    curve.save(tmp_path / "curve.csv")
    assert main(["diagnose", str(trained_run), "--optimal", str(tmp_path / "curve.csv")]) == 0
    assert re.search(r"gap to the optimal loss +100.0% of the loss can be reduced", capsys.readouterr().out)
    OptimalLoss(sigma, ones, 0 * ones, ones.long(), 64, 64.0, number + 1, classes=10).save(tmp_path / "other.csv")
    assert main(["diagnose", str(trained_run), "--optimal", str(tmp_path / "other.csv")]) == 1
    assert "give the curve of this data set" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["diagnose", str(trained_run), "--optimal", str(tmp_path / "none.csv")])
    assert "argument --optimal: " in capsys.readouterr().err


def test_diagnose_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(tmp_path)]) == 1
    assert "is not a run directory" in capsys.readouterr().err
