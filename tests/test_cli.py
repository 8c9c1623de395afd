"""The command `vadiff`: what it prints, writes and returns."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import vadiff
from vadiff.extras import install_command
from vadiff.trainer.cli import main
from vadiff.trainer.training.objective import OBJECTIVES
from vadiff.training import PRESETS, TrainConfig, edm_objective, open_run

TINY = TrainConfig(
    steps=3, batch_size=64, channels=(8, 16), log_every=1, held_out_images=20, tensorboard=False, device="cpu",
    backend="reference",
)  # fmt: skip


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


def test_train_writes_a_run_directory_and_prints_held_out_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "run"
    assert main(["train", "--preset", "digits", "--weighting", "loss_level", "--steps", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "loss_level" in printed
    assert "log-SNR" in printed
    assert open_run(out).metrics()[-1]["step"] == 2
    assert open_run(out).checkpoints() == [2]


def test_flags_reach_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--channels", "8", "8", "--weighting", "cauchy", "--weighting-options", "alpha=0.1", "--clip", "inf"]
    flags += ["--flips", "--no-tensorboard", "--log-snr-range", "-10", "10", "--data-seed", "3"]
    flags += ["--target", "posterior-mean", "--reference", "all"]
    assert main(["train", "--preset", "digits", *flags, "--out", str(tmp_path)]) == 0
    assert "cauchy was not measured with them" in capsys.readouterr().out
    config = open_run(tmp_path).config
    assert (config.channels, config.weighting_options, config.flips) == ((8, 8), {"alpha": 0.1}, True)
    assert (config.clip, config.log_snr_range, config.data_seed) == (math.inf, (-10.0, 10.0), 3)
    assert (config.target, config.reference) == ("posterior_mean", "all")
    assert config.batch_size == TINY.batch_size


def test_run_is_resumed_by_its_folder_alone_and_never_overwritten_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "--out", str(tmp_path)]
    assert main([*train, "--preset", "digits", "--steps", "2", "--schedule", "constant"]) == 0
    assert main([*train, "--preset", "digits"]) == 1
    assert "holds a run already: go on with --resume" in capsys.readouterr().err
    assert main([*train, "--resume", "--steps", "4"]) == 0
    assert [line["step"] for line in open_run(tmp_path).metrics()] == [1, 2, 3, 4]
    assert main([*train, "--resume", "--batch-size", "8"]) == 1
    assert "batch_size was 64, is 8" in capsys.readouterr().err
    assert main([*train, "--overwrite", "--preset", "digits", "--steps", "1"]) == 0
    assert [line["step"] for line in open_run(tmp_path).metrics()] == [1]


def test_config_file_stands_in_for_a_preset(tmp_path: Path) -> None:
    TINY.save(tmp_path / "mine.yaml")
    out = tmp_path / "run"
    assert main(["train", "--config", str(tmp_path / "mine.yaml"), "--steps", "1", "--out", str(out)]) == 0
    assert open_run(out).config == dataclasses.replace(TINY, steps=1).resolved()


def test_signal_ends_training_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killing(*arguments: Any) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return edm_objective(*arguments)

    monkeypatch.setitem(OBJECTIVES, "edm", killing)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--preset", "digits", "--out", str(tmp_path)])
    assert stopped.value.code == 143
    assert "stopped by SIGTERM after step 1; go on with --resume" in capsys.readouterr().err
    assert open_run(tmp_path).checkpoints() == [1]


def test_demo_writes_its_report_and_prints_all_three_weightings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], digits_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vadiff.trainer.report.demo.COMPARED", 100)
    monkeypatch.setattr("vadiff.trainer.evaluation.fidelity.cache_folder", lambda: digits_cache)
    assert main(["demo", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("constant", "loss_level", "variance_aware", "x0, all levels"))
    assert "spread of the loss" in printed
    assert "Fréchet distance of samples" in printed
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in ("constant", "loss level", "variance aware"))
    assert sorted(path.parent.name for path in tmp_path.glob("*/config.yaml")) == [
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
        (["--weighting-options", "alpha"], "argument --weighting-options: 'alpha', expected NAME=NUMBER"),
        (["--weighting-options", "beta=1"], "weighting_options is {'beta': 1.0}: "),
        (["--channels", "8", "8", "8", "8", "8"], "images of 8 × 8 cannot be halved 4 times"),
        (["--out", __file__], "test_cli.py is a file, expected a folder"),
    ],
)
def test_bad_option_is_a_usage_error(
    option: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in usage_error(["train", "--preset", "digits", "--out", str(tmp_path), *option], capsys)


def test_preset_and_command_are_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert "one of the arguments --preset --config is required" in usage_error(["train"], capsys)
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
    assert install_command("train") in error


def test_demo_asks_for_matplotlib_before_it_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 1
    assert install_command("report") in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_interrupt_is_said_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("vadiff.trainer.doctor.report", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "\nvadiff: interrupted\n"


def test_command_and_training_import_no_optional_package() -> None:
    code = (
        "import sys, vadiff.trainer.cli, vadiff.training, vadiff.trainer.report, vadiff.trainer.doctor\n"
        "import vadiff.sampling, vadiff.trainer.ablation\n"
        "optional = {'diffusers', 'sklearn', 'matplotlib', 'torchvision', 'yaml', 'tensorboard', 'PIL', 'scipy'}\n"
        "print(*optional & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
