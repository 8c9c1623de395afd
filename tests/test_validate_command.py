"""`vadiff validate`: the run's own held-out loss, with errors, against another run or a file."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from vadiff.trainer.cli import main
from vadiff.training import open_run


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
    if "other.csv" in options:
        assert main(["validate", str(trained_run), "--levels", "3", "--csv", "other.csv", "--device", "cpu"]) == 0
    with pytest.raises(SystemExit) as stopped:
        main(["validate", str(trained_run), "--device", "cpu", *options])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
