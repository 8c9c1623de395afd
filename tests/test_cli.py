"""The command `vadiff`: what it prints, writes and returns."""

import dataclasses
import math
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from ablation_runs import grid_file
from torch import Tensor

import vadiff
from vadiff.extras import install_command
from vadiff.trainer.cli import VADIFF, levels, main, parse_options
from vadiff.trainer.cli.command import Command
from vadiff.trainer.config_schema import FIELD_GROUPS
from vadiff.trainer.training.objective import OBJECTIVES
from vadiff.training import PRESETS, TrainConfig, edm_objective, open_run

TINY = TrainConfig(
    steps=3, batch_size=64, channels=(8, 16), log_every=1, held_out_images=20, tensorboard=False, device="cpu",
    backend="reference",
)  # fmt: skip


COMMANDS = [levels.run if command is levels.COMMAND else command for command in VADIFF.commands.values()]


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "digits", TINY)


def usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command line that does not fit: one line, and one that says where to look; exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error, where = capsys.readouterr().err.splitlines()
    command, _, _ = error.partition(": error: ")
    assert where == f"See `{command} --help`."
    return error


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
    flags = ["--channels", "8,8", "--weighting", "cauchy", "--weighting-options", "alpha=0.1", "--clip", "inf"]
    flags += ["--flips", "--no-tensorboard", "--log-snr-range", "-10,10", "--data-seed", "3"]
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
    assert main(["demo", "--steps", "4", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("constant", "loss_level", "variance_aware", "x0, all levels"))
    assert "spread of the loss" in printed
    assert "Fréchet distance of samples" in printed
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in ("constant", "loss level", "variance aware", "Fréchet distance (digits)"))
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
        (["--steps", "many"], "vadiff train: error: argument --steps: 'many', expected a whole number"),
        (["--device", "toaster"], "vadiff train: error: device is 'toaster', expected auto, cpu, cuda or cuda:N"),
        (["--weighting", "variance"], "--weighting: 'variance'; did you mean variance_aware? Expected cauchy, "),
        (["--weighting", "variance-awre"], "'variance-awre'; did you mean variance_aware? Expected cauchy, "),
        (["--backend", "cuda"], "argument --backend: 'cuda', expected auto, reference, native, triton"),
        (["--weighting-options", "alpha"], "argument --weighting-options: 'alpha', expected NAME=NUMBER"),
        (
            ["--weighting-options", "strenght=.5"],
            "weighting_options is {'strenght': 0.5}: variance_aware has no option strenght; did you mean strength? "
            "It has strength, smoothing, clip, prior",
        ),
        (["--weighting", "cauchy", "--weighting-options", "beta=1"], "cauchy has no option beta. It has alpha"),
        (["--weighting", "constant", "--weighting-options", "beta=1"], "constant has no option beta. It has none"),
        (["--levels", "beta", "--levels-options", "alhpa=1"], "beta has no option alhpa. It has a, b"),
        (["--levels-options", "alpha=1"], "levels_options is {'alpha': 1.0}: log_normal has no option alpha. It has p"),
        (["--channels", "8,8,8,8,8"], "images of 8 × 8 cannot be halved 4 times"),
        (["--out", __file__], "test_cli.py is a file, expected a folder"),
    ],
)
def test_bad_option_is_a_usage_error(
    option: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in usage_error(["train", "--preset", "digits", "--out", str(tmp_path), *option], capsys)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "vadiff: error: no such command: trian; did you mean train?"),
        ("levels sugest", "vadiff levels: error: no such command: sugest; did you mean suggest?"),
        ("--verson", "vadiff: error: no such option: --verson; did you mean --version?"),
        ("train --step 5", "vadiff train: error: no such option: --step; did you mean --steps?"),
        ("train --steps-from statistics", "vadiff train: error: no such option: --steps-from"),
        ("train -steps 5", "vadiff train: error: no such option: -steps; did you mean --steps?"),
        ("train --preset digit", "argument --preset: 'digit'; did you mean digits? Expected digits, digits-edm2, "),
        ('train --preset digits --out ""', "argument --out: '' is empty, expected a path"),
        ('train --preset digits --data ""', "argument --data: '' is empty, expected a value"),
        ('train --preset digits --sigma-rel ""', "argument --sigma-rel: '' is empty, expected values with commas"),
        ('report ""', "argument RUN: '' is empty, expected a path"),
        ("train --steps", "argument --steps: expected a value, got nothing"),
        ("train --data --steps 5", "argument --data: expected a value, got the option --steps"),
        ("train --flips=3", "argument --flips: takes no value, got '3'"),
        ("train digits", "vadiff train: error: 'digits' is one argument too many"),
        ("train --preset digits --config x", "argument --config: not allowed with argument --preset"),
        ("train --resume --overwrite", "argument --overwrite: not allowed with argument --resume"),
        ("train --betas 0.9", "argument --betas: '0.9', expected 2 values with commas between them"),
        ("train --channels 8,x", "argument --channels: 'x', expected a whole number"),
        ("train --channels 8 16", "'8 16', expected commas between the values: --channels 8,16"),
        ("train --log-snr-range -10 -5", "'-10 -5', expected commas between the values: --log-snr-range -10,-5"),
        ("train --weighting-options strength=1 prior=2", "between the values: --weighting-options strength=1,prior=2"),
        ("train --weighting-options prior=x", "argument --weighting-options: 'x', expected a number after prior="),
        ("ema RUN --sigma-rel 0.05 0.1", "'0.05 0.1', expected commas between the values: --sigma-rel 0.05,0.1"),
        ("evaluate RUN --metrics fid kid", "'fid kid', expected commas between the values: --metrics fid,kid"),
        ("evaluate --metrics fid kid RUN", "'fid kid', expected commas between the values: --metrics fid,kid"),
        ("evaluate RUN --metrics --gap", "expected a value (none: an empty list), got the option --gap"),
        ("sample RUN --devices cpu cuda:0", "expected commas between the values: --devices cpu,cuda:0"),
        ("sample", "vadiff sample: error: argument RUN: required"),
        ("encode --vae x", "vadiff encode: error: argument --out: required"),
        ("sample RUN --seeds 1 --images 1", "argument --images: not allowed with argument --seeds"),
    ],
)  # fmt: skip
def test_error_says_what_is_wrong_and_what_was_probably_meant(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in usage_error(shlex.split(line), capsys)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command.name))
def test_help_of_a_command_shows_defaults_and_ends_with_examples_that_parse(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ["levels", "suggest"] if command.name == "suggest" else [str(command.name)]
    with pytest.raises(SystemExit) as stopped:
        main([*path, "--help"])
    assert stopped.value.code == 0
    head, _, examples = capsys.readouterr().out.partition("\nExamples:\n")
    assert head.startswith(f"Usage: vadiff {' '.join(path)} ")
    assert (1 if command.name == "doctor" else 2) <= len(examples.splitlines()) <= 4
    for example in examples.splitlines():
        program, *arguments = shlex.split(example, comments=True)
        assert program == "vadiff"
        parse_options(arguments)
    for param in command.params:  # no two spellings of a list
        assert param.nargs == 1 or isinstance(param, click.Argument)


def test_help_of_train_has_every_field_in_a_group_with_the_presets_value(capsys: pytest.CaptureFixture[str]) -> None:
    in_groups = [name for names in FIELD_GROUPS.values() for name in names]
    assert sorted(in_groups) == sorted(field.name for field in dataclasses.fields(TrainConfig))
    with pytest.raises(SystemExit):
        main(["train", "--preset", "cifar10-edm2", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f" {title}: --" in printed for title in FIELD_GROUPS)
    assert "--sigma-rel X,... relative widths of power-function EMAs" in printed
    assert "a list with commas, none if empty [default: 0.05,0.1]" in printed
    assert f"[default: {PRESETS['cifar10-edm2'].steps}]" in printed
    assert "--graph / --no-graph" in printed
    assert "[default: on]" in printed


def test_empty_list_is_written_none(tmp_path: Path) -> None:
    options = parse_options(["train", "--preset", "digits", "--attention-resolutions", "none", "--sigma-rel", "none"])
    assert (options.attention_resolutions, options.sigma_rel, options.channels) == ([], [], None)
    assert parse_options(["evaluate", str(tmp_path), "--metrics", "none"]).metrics == []


def test_shell_completes_options_and_choices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_VADIFF_COMPLETE", "bash_complete")
    for words, cword, expected in (
        ("vadiff tr", "1", "train"),
        ("vadiff train --sigma-r", "2", "--sigma-rel"),
        ("vadiff train --weighting vari", "3", "variance_aware"),
    ):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", cword)
        with pytest.raises(SystemExit):
            main([])
        assert capsys.readouterr().out == f"plain,{expected}\n"


def test_folder_of_runs_is_refused_with_the_runs_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("constant", "variance_aware"):
        (tmp_path / "demo" / name).mkdir(parents=True)
        TINY.save(tmp_path / "demo" / name / "config.yaml")
    assert main(["report", str(tmp_path / "demo")]) == 1
    error = capsys.readouterr().err
    assert "demo is not a run directory: it has no config.yaml, but it holds 2: " in error
    assert f"{tmp_path / 'demo/constant'}, {tmp_path / 'demo/variance_aware'}\n" in error
    assert main(["diagnose", str(tmp_path / "demo" / "constnat")]) == 1
    assert f"it is not a folder; did you mean {tmp_path / 'demo/constant'}?" in capsys.readouterr().err
    assert main(["diagnose", str(tmp_path / "new")]) == 1
    assert f"`vadiff train --preset NAME --out {tmp_path / 'new'}` makes one" in capsys.readouterr().err


def test_demo_replaces_runs_only_when_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "variance_aware").mkdir()
    TINY.save(tmp_path / "variance_aware" / "config.yaml")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "variance_aware holds a run already: replace it with --overwrite, or name another" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["variance_aware"]


@pytest.mark.parametrize(("command", "name"), [(["demo", "--overwrite"], "report.html"), (["ablate"], "results.csv")])
def test_files_that_are_no_results_are_never_replaced(
    command: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == ["ablate"]:
        command = ["ablate", str(grid_file(tmp_path))]
    out = tmp_path / "mine"
    out.mkdir()
    (out / name).write_text("mine")
    assert main([*command, "--out", str(out)]) == 1
    assert f"mine holds {name} and none of the runs that would make them" in capsys.readouterr().err
    assert [path.read_text() for path in out.iterdir()] == ["mine"]


def test_preset_and_command_are_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert "one of the arguments --preset --config is required" in usage_error(["train"], capsys)
    assert "expected a command, got none: demo, doctor, train, " in usage_error([], capsys)
    assert "levels: error: expected a command, got none: suggest" in usage_error(["levels"], capsys)


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


@pytest.mark.parametrize(
    ("flag", "words"),
    [([], " with --resume"), (["--overwrite"], " with --resume in place of --overwrite"), (["--resume"], "")],
)
def test_interrupt_before_the_first_step_says_how_to_go_on(
    flag: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vadiff.trainer.training.train", interrupted)
    assert main(["train", "--preset", "digits", "--out", str(tmp_path / "run"), *flag]) == 130
    assert f"interrupted outside the training steps: the same command{words} goes on" in capsys.readouterr().err


def test_interrupt_is_said_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("vadiff.trainer.doctor.report", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "\nvadiff: interrupted\n"


def test_next_steps_of_training_work_as_they_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--preset", "digits", "--steps", "1", "--out", "a run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    report, sample, evaluate = [shlex.split(line)[1:] for line in printed[printed.index("Next:") + 1 :]]
    assert evaluate == ["evaluate", "a run"]
    assert main([*sample, "--images", "2"]) == 0
    assert main(report) == 0
    assert Path("a run/report.html").exists()


@pytest.mark.parametrize("command", ["train --preset digits", "optimal-loss --dataset digits", "demo", "report RUN"])
def test_path_that_cannot_be_written_is_one_line_before_any_work(
    command: str, tmp_path: Path, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    out = tmp_path / "file" / "below.html"
    arguments = [str(trained_run) if part == "RUN" else part for part in command.split()]
    assert main([*arguments, "--out", str(out)]) == 1
    assert capsys.readouterr().err == f"vadiff: {tmp_path / 'file'} is a file, expected a folder\n"


def test_output_on_a_full_disk_is_one_line(trained_run: Path) -> None:
    command = [sys.executable, "-m", "vadiff", "diagnose", str(trained_run)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "vadiff: the output cannot be written: no space left on device\n"


def test_error_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> str:
        raise OSError("no such thing")

    monkeypatch.setattr("vadiff.trainer.doctor.report", failing)
    with pytest.raises(OSError, match="no such thing"):
        main(["doctor"])


def test_command_and_training_import_no_optional_package() -> None:
    code = (
        "import sys, vadiff.trainer.cli, vadiff.training, vadiff.trainer.report, vadiff.trainer.doctor\n"
        "import vadiff.sampling, vadiff.trainer.ablation\n"
        "optional = {'diffusers', 'sklearn', 'matplotlib', 'torchvision', 'yaml', 'tensorboard', 'PIL', 'scipy'}\n"
        "print(*optional & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
