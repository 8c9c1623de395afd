"""`vadiff report --from-log` and `vadiff diagnose`: any loop's log as a page, a run's criterion as a verdict."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vadiff
from vadiff.errors import RunError
from vadiff.optimal_loss import OptimalLoss
from vadiff.trainer.cli import main
from vadiff.trainer.report.from_log import read_log, write_log_report
from vadiff.training import open_run


def trained(
    path: Path,
    weighting: Any = "constant",
    steps: int = 20,
    prefix: str = "vadiff",
    tilt: float = 0.4,
    half_life: float = math.inf,
) -> vadiff.DiffusionLoss:
    """A loop of one's own that logs every fifth step; the mean loss is exp(tilt·λ)."""
    file, criterion = vadiff.MetricsFile(path), vadiff.DiffusionLoss(weighting, half_life=half_life)
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
    expected = criterion.diagnose().bands
    seen = expected.samples > 0
    np.testing.assert_allclose(logged.edges, expected.edges[3 + 2 : 11 + 1])  # -6 to 6 of -16 to 16
    for name, values in (("base_loss", expected.mean), ("std", expected.std), ("share", expected.share)):
        np.testing.assert_allclose(logged.banded[name][-1], values[seen], rtol=1e-12)
    assert step.tolist() == [5, 10, 15, 20]
    assert list(own) == ["loss"]


@pytest.mark.parametrize("half_life", [16.0, 1e6, math.inf])
@pytest.mark.parametrize("tilt", [0.0, 0.4])
@pytest.mark.parametrize("weighting", ["constant", "variance_aware", "min_snr", "gaussian"])
def test_verdict_of_a_log_is_that_of_the_criterion(
    tmp_path: Path, weighting: str, tilt: float, half_life: float
) -> None:
    form = {"prediction_type": "epsilon"} if weighting == "min_snr" else {}
    named = vadiff.weighting.from_name(weighting, **form)
    criterion = trained(tmp_path / "log.jsonl", named, tilt=tilt, half_life=half_life)
    ((logged,), *_) = read_log(tmp_path / "log.jsonl")
    assert logged.texts == {"weighting": str(named), "verdict": criterion.diagnose().verdict}


def test_timesteps_in_place_of_log_snr_are_told_by_a_log_too(tmp_path: Path) -> None:
    file, criterion = vadiff.MetricsFile(tmp_path / "log.jsonl"), vadiff.DiffusionLoss("constant")
    criterion.reweight(torch.ones(1000), torch.arange(1000.0))
    with pytest.warns(vadiff.errors.DiffusionLossWarning, match="looks like timesteps"):
        criterion.log_to(file, 1)
    ((logged,), *_) = read_log(file.path)
    assert logged.texts["verdict"].startswith("your log-SNR looks wrong: ")


def test_level_seen_only_at_times_leaves_a_gap(tmp_path: Path) -> None:
    file, criterion = vadiff.MetricsFile(tmp_path / "log.jsonl"), vadiff.DiffusionLoss("constant")
    for step, level in ((1, 1.0), (2, 7.0)):
        criterion.reweight(torch.ones(8), torch.full((8,), level))
        criterion.log_to(file, step)
    ((logged,), *_) = read_log(file.path)
    assert logged.edges.tolist() == [0.0, 2.0, 6.0, 8.0]
    assert np.isnan(logged.banded["base_loss"]).tolist() == [[False, True, True], [False, True, False]]


def _logged(path: Path, step: int, prefix: str = "vadiff", bands: int = 16, level_range: float = 16.0) -> None:
    criterion = vadiff.DiffusionLoss("constant", log_snr_range=(-level_range, level_range))
    criterion.reweight(torch.ones(400), torch.linspace(-2, 5, 400))
    criterion.log_to(vadiff.MetricsFile(path), step, prefix=prefix, bands=bands)


@pytest.mark.parametrize("change", [{"bands": 5}, {"level_range": 6.0}], ids=str)
def test_steps_before_a_change_of_bands_are_left_out_and_told(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "log.jsonl"
    for at in (10, 20):
        _logged(path, at)
    for at in (30, 40):
        _logged(path, at, **change)
    ((logged,), step, _) = read_log(path)
    alone = tmp_path / "alone.jsonl"
    _logged(alone, 30, **change)
    assert step.tolist() == [10, 20, 30, 40]
    assert (logged.step.tolist(), logged.left_out) == ([30, 40], 20)
    np.testing.assert_array_equal(logged.edges, read_log(alone)[0][0].edges)
    assert np.isfinite(logged.banded["base_loss"]).all()
    assert main(["report", "--from-log", str(path)]) == 0
    assert "bands of log-SNR changed after step 20" in path.with_suffix(".html").read_text()


def test_prefix_within_a_prefix_is_a_criterion_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    _logged(path, 1, prefix="loss")
    _logged(path, 1, prefix="loss/vae", level_range=6.0)
    vadiff.MetricsFile(path).log({"loss/total": 1.0, "note": "begun"}, 1)
    (outer, inner), _, own = read_log(path)
    assert (outer.prefix, inner.prefix) == ("loss", "loss/vae")
    assert (np.diff(outer.edges).max(), np.diff(inner.edges).max()) == (2.0, 0.75)
    assert outer.scalars["samples"] == 400
    assert list(own) == ["loss/total"]


@pytest.mark.parametrize("value", ['"high"', "[1]"])
def test_value_that_is_no_number_is_named(tmp_path: Path, value: str) -> None:
    path = tmp_path / "log.jsonl"
    _logged(path, 1)
    with path.open("a") as file:
        file.write(f'{{"step": 2, "vadiff/base_loss/log_snr_0_to_2": {value}}}\n')
    with pytest.raises(RunError, match=r"log_snr_0_to_2 is .* at step 2, expected a number"):
        read_log(path)


def test_log_and_pages_of_others_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("log.html", "mine.jsonl"):
        _logged(tmp_path / name, 1)
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name, words in (
        ("log.html", "replace the log"),
        ("mine.jsonl", "mine.html exists and is no report: replace it with --overwrite, or name another"),
    ):
        with pytest.raises(SystemExit):
            main(["report", "--from-log", str(tmp_path / name)])
        assert words in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    arguments = ["report", "--from-log", str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "other.html")]
    assert [main(arguments), main(arguments)] == [0, 0]  # a report may be made again


def test_log_of_a_run_is_told_to_be_reported_as_a_run(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--from-log", str(trained_run / "metrics.jsonl")]) == 1
    assert f"use `vadiff report {trained_run}`" in capsys.readouterr().err


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
    before_scripts = html.partition("<script>")[0]
    assert "<b>" not in before_scripts
    assert not re.search(r'(src|href)="(?!data:|#)', before_scripts)
    assert re.findall(r'id="chart-([^"]+)"', before_scripts) == [
        "base-loss-profile", "level-free-loss", "base-loss", "weight", "share", "logged-loss"
    ]  # fmt: skip
    assert {*tmp_path.iterdir()} == {path, page}


def test_two_criteria_of_one_log_have_sections_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    trained(path, steps=5, prefix="image")
    trained(path, steps=5, prefix="video", tilt=0.0)
    assert main(["report", "--from-log", str(path), "--out", str(tmp_path / "page.html")]) == 0
    html = (tmp_path / "page.html").read_text()
    assert "Over training, image" in html
    assert "Over training, video" in html
    assert "video: the mean loss differs only" in html


def test_names_that_read_alike_have_charts_of_their_own(tmp_path: Path) -> None:
    path, html = tmp_path / "log.jsonl", tmp_path / "page.html"
    for prefix in ("loss/vae", "loss_vae"):
        trained(path, steps=5, prefix=prefix)
    vadiff.MetricsFile(path).log({"train/loss": 1.0, "train_loss": 2.0}, 5)
    number = write_log_report(path, html)
    ids = re.findall(r'<(?:div class="chart"|section) id="([^"]+)"', html.read_text())
    assert len({*ids}) == len(ids)
    assert sum(name.startswith("chart-") for name in ids) == number


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


def test_page_says_what_the_losses_are_errors_against(tmp_path: Path) -> None:
    data = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    criterion, file = vadiff.DiffusionLoss("constant"), vadiff.MetricsFile(tmp_path / "log.jsonl")
    criterion.target = targets = vadiff.targets.PosteriorMean(data)
    for step in (1, 2):
        sigma = torch.logspace(-1, 1, 64)
        noisy = data[:64] + sigma[:, None] * torch.randn(64, 4)
        x0_hat = targets(data[:64], noisy, 1.0, sigma)
        criterion(noisy.requires_grad_(), x0_hat, vadiff.log_snr.from_sigma(sigma))
        criterion.log_to(file, step)
    trained(tmp_path / "log.jsonl", prefix="plain", steps=5)
    (plain, logged), _, own = read_log(file.path)
    assert own.keys() == {"loss"}
    assert logged.texts["target"] == targets.description
    assert "target" not in plain.texts
    removed = logged.banded["removed_x0_error"][-1]
    assert np.nanmax(removed) == pytest.approx(1.0, rel=0.2)  # the variance of the data, at high noise
    write_log_report(file.path, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert targets.description in page
    assert "the data" in page
    assert "Removed x0 error by noise level" in page
    assert "Logged by the loop itself" in page
