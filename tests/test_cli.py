"""The command `vadiff`: what it prints, writes and returns."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import vadiff
from vadiff.cli import main
from vadiff.training import PRESETS, TrainConfig

TINY = TrainConfig(
    steps=3, batch_size=64, channels=(8, 16), log_every=1, held_out_draws=1, device="cpu", backend="reference"
)


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "digits", TINY)


def usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line that does not fit prints as its last line; its exit status must be 2."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"vadiff {vadiff.__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("train", "demo", "doctor"))


def test_train_writes_metrics_and_checkpoint_and_prints_held_out_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "run"
    assert main(["train", "--preset", "digits", "--weighting", "loss_level", "--steps", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "loss_level" in printed
    assert "log-SNR" in printed
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert (out / "checkpoint.pt").exists()


def test_demo_writes_its_report_and_prints_all_three_weightings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("constant", "loss_level", "variance_aware", "mean over levels"))
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.parent.name for path in tmp_path.glob("*/checkpoint.pt")) == [
        "constant",
        "loss_level",
        "variance_aware",
    ]


def test_doctor_prints_its_report_and_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "backends" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--steps", "0"], "vadiff train: error: steps is 0, expected at least 1"),
        (["--steps", "many"], "vadiff train: error: argument --steps: invalid int value: 'many'"),
        (["--device", "toaster"], "vadiff train: error: device is 'toaster', expected auto, cpu, cuda or cuda:N"),
        (["--weighting", "variance"], "argument --weighting: invalid choice: 'variance'"),
        (["--backend", "cuda"], "argument --backend: invalid choice: 'cuda'"),
        (["--out", __file__], "test_cli.py is a file, expected a folder"),
    ],
)
def test_bad_option_is_a_usage_error(option: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in usage_error(["train", "--preset", "digits", *option], capsys)


def test_preset_and_command_are_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: --preset" in usage_error(["train"], capsys)
    assert "required: COMMAND" in usage_error([], capsys)


def test_bad_backend_in_the_environment_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "digits", dataclasses.replace(TINY, backend="auto"))
    monkeypatch.setenv("VADIFF_BACKEND", "tritn")
    assert "VADIFF_BACKEND is 'tritn', expected one of" in usage_error(["train", "--preset", "digits"], capsys)


def test_missing_package_is_one_line_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["train", "--preset", "digits", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'vadiff[train]'" in error


def test_demo_asks_for_matplotlib_before_it_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 1
    assert "pip install 'vadiff[report]'" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_interrupt_is_said_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("vadiff.doctor.report", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "\nvadiff: interrupted\n"


def test_command_and_training_import_no_optional_package() -> None:
    code = (
        "import sys, vadiff.cli, vadiff.training, vadiff.report, vadiff.doctor, vadiff.sampling\n"
        "print(*{'diffusers', 'sklearn', 'matplotlib', 'torchvision'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
