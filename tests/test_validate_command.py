"""`vadiff validate`: the run's own held-out loss, with errors, against another run or a file."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from vadiff.trainer.cli import main
from vadiff.training import Run, open_run


def test_table_has_the_numbers_of_training(
    trained_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "levels.csv"
    assert main(["validate", str(trained_run), "--csv", str(file), "--device", "cpu"]) == 0
    recorded = open_run(trained_run).metrics()[-1]["held_out"]
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [float(row["loss"]) for row in rows] == pytest.approx(recorded["loss_ema"], rel=1e-6)
    assert [float(row["log_snr"]) for row in rows] == pytest.approx(recorded["log_snr"])
    assert {row["samples"] for row in rows} == {"20"}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("EDM's loss by noise level (every level of each sample, ")
    assert len(printed) == 2 + len(rows) + 1
    assert printed[-1].startswith("geometric mean over levels of the x0 loss: ")


def test_reference_is_a_run_or_what_was_written_of_it(
    trained_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--levels", "3", "--images", "10", "--device", "cpu"]
    file, picture = tmp_path / "raw.csv", tmp_path / "new" / "levels.png"
    assert main(["validate", str(trained_run), *options, "--weights", "raw", "--csv", str(file)]) == 0
    capsys.readouterr()
    command = ["validate", str(trained_run), *options, "--reference", str(file), "--plot", str(picture), "--json"]
    assert main(command) == 0
    against_file = json.loads(capsys.readouterr().out)
    assert len(against_file["levels"]) == 3
    assert against_file["mean_log_ratio"] != 0.0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["validate", str(trained_run), *options, "--reference", str(trained_run)]) == 0
    assert "ln(loss / reference): +0.0000 ± 0.0000 (+0.00%)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--levels", "1"], "argument --levels: held_out_levels is 1, expected"),
        (["--images", "0"], "argument --images: 0, expected at least 1"),
        (["--device", "cupboard"], "argument --device: device is 'cupboard'"),
        (["--weights", "best"], "argument --weights: 'best', expected ema, raw"),
        (["--reference", "nothing.csv"], "argument --reference: .*nothing.csv"),
        (["--reference", "other.txt"], "argument --reference: other.txt is not the result of a validation"),
        (["--csv", "other.txt"], "argument --csv: other.txt cannot be written: other.txt is not the result of"),
        (["--csv", "other.txt/levels.csv"], "argument --csv: other.txt/levels.csv cannot be written: .*other.txt"),
        (["--plot", "levels.xyz"], r"argument --plot: levels.xyz, expected a file ending in \.png, \.svg, \.pdf"),
        (
            ["--levels", "4", "--reference", "other.csv"],
            "argument --reference: the reference has log-SNR .*the same levels",
        ),
    ],
)
def test_invalid_arguments_are_a_usage_error(
    options: list[str], message: str, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("other.txt").write_bytes(b"\xff kept \n")
    if "other.csv" in options:
        assert main(["validate", str(trained_run), "--levels", "3", "--csv", "other.csv", "--device", "cpu"]) == 0
    monkeypatch.setattr("vadiff.trainer.training.held_out.held_out_loss", None)  # nothing is measured before
    with pytest.raises(SystemExit) as stopped:
        main(["validate", str(trained_run), "--device", "cpu", *options])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert Path("other.txt").read_bytes() == b"\xff kept \n"


def refusal(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main(["validate", *command, "--levels", "3", "--device", "cpu"])
    return capsys.readouterr().err.splitlines()[-2]


def other_run(run: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a run with another config."""
    shutil.copytree(run, folder)
    file = folder / "config.yaml"
    text = file.read_text()
    for name, value in changes.items():
        text, found = re.subn(rf"(?m)^{name}: .*$", f"{name}: {value}", text)
        assert found == 1
    file.write_text(text)
    return folder


def test_run_that_holds_out_other_images_is_no_reference(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = open_run(trained_run).images()
    changed = images._replace(held_out=255 - images.held_out)
    other = other_run(trained_run, tmp_path / "other")
    monkeypatch.setattr(Run, "images", lambda run: changed if run.path == other else images)
    monkeypatch.setattr("vadiff.trainer.training.held_out.held_out_loss", None)  # nothing is measured before
    message = refusal([str(trained_run), "--reference", str(other)], capsys)
    assert re.search(r"argument --reference: .*other holds out 297 images of shape 1x8x8, with pixels of hash", message)
    assert message.endswith(": a run of the same data set")


def test_file_of_other_images_or_another_form_of_the_loss_is_no_reference(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "levels.csv"
    options = ["--levels", "3", "--images", "10", "--device", "cpu"]
    assert main(["validate", str(trained_run), *options, "--csv", str(file)]) == 0
    fewer = refusal([str(trained_run), "--images", "9", "--reference", str(file)], capsys)
    assert re.search("measured on 10 images of shape 1x8x8, .* expected 9 images of shape 1x8x8, ", fewer)
    other = other_run(trained_run, tmp_path / "other", sigma_data=0.25)
    scaled = refusal([str(other), "--images", "10", "--reference", str(file)], capsys)
    assert re.search(r"draws 1, sigma_data 0\.75, expected .*draws 1, sigma_data 0\.25: the same noise", scaled)
    assert main(["validate", str(other), *options, "--reference", str(trained_run)]) == 0  # converted
