"""benchmarks/gpu.sh, with a stand-in for Python: its stages, their limits, and what it says of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vadiff.trainer.cli import _parser
from vadiff.trainer.cli.train import training_config

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def program(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


@pytest.fixture
def stub_python(tmp_path: Path) -> Path:
    """Stands in for Python in gpu.sh: installing fails, everything else succeeds at once."""
    return program(tmp_path / "python", 'case "$*" in *"pip install"*) echo no compiler today; exit 3 ;; esac')


@pytest.fixture
def able_python(tmp_path: Path) -> Path:
    """As `stub_python`, where all succeeds, the benchmarks leave a result file and its table is written."""
    return program(
        tmp_path / "python",
        'for last; do :; done',
        'case "$*" in',
        '    *"-m vadiff doctor"*) echo "commit $VADIFF_COMMIT" ;;',
        '    *"pytest -q benchmarks"*) echo {} >"$last/gpu.json" ;;',
        "    *result_table*) printf 'left out: one\\nthe design\\n' >\"$last\" ;;",
        'esac',
    )  # fmt: skip


def run_gpu_script(python: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BENCHMARKS / "gpu.sh"), *arguments], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHON": str(python), **environment},
    )  # fmt: skip


def test_the_gpu_script_measures_networks_and_a_short_run_instead(stub_python: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    weights.touch()
    out = tmp_path / "out"
    arguments = ["--networks", "--data", str(tmp_path), "--inception-weights", str(weights)]
    run_gpu_script(stub_python, *arguments, str(out))
    stages = [line.split()[0] for line in (out / "summary.txt").read_text().splitlines()]
    assert stages == ["build", "machine", "networks", "train", "sweep"]
    found = run_gpu_script(stub_python, "--networks", str(out))
    assert "NOT RUN: no --data" in found.stdout
    assert run_gpu_script(stub_python, "--networks", "--data", str(tmp_path / "no")).returncode == 2
    assert "are for --networks" in run_gpu_script(stub_python, "--data", str(tmp_path)).stderr


def test_the_gpu_script_measures_one_network_where_the_other_cannot_be_made(tmp_path: Path) -> None:
    python = program(tmp_path / "python", 'case "$*" in *diffusers*) exit 1 ;; *networks.py*) echo "with $*" ;; esac')
    run_gpu_script(python, "--networks", str(tmp_path / "out"))
    assert "classic             - s  NOT RUN" in (tmp_path / "out" / "summary.txt").read_text()
    assert "networks.py --presets cifar10-edm2 --out" in (tmp_path / "out" / "log.txt").read_text()


def test_the_commands_of_the_gpu_scripts_short_run_are_understood(tmp_path: Path) -> None:
    """Those of `vadiff`, as they stand in the script, by its parser."""
    script = (BENCHMARKS / "gpu.sh").read_text().replace("\\\n", " ")
    commands = [line.split("-m vadiff ")[1] for line in script.splitlines() if "-m vadiff " in line and "stage" in line]
    commands = [command for command in commands if command.startswith(("train", "ema"))]
    assert [command.split()[0] for command in commands] == ["train", "ema"]
    for command in commands:
        plain = command.replace('"${metrics[@]}"', "--metrics fid --layer 768 --images 2000")
        words = [word.strip('"').replace("$run", str(tmp_path)).replace("$data", "data") for word in plain.split()]
        options = _parser().parse_args(words)
        if words[0] == "train":
            assert training_config(options).channels == (128, 128, 128)
            assert training_config(options).steps // training_config(options).snapshot_every >= 60


def test_the_gpu_script_goes_on_after_a_failed_stage_and_says_so(stub_python: Path, tmp_path: Path) -> None:
    found = run_gpu_script(stub_python, str(tmp_path / "out"))
    assert found.returncode == 1
    stages = {line.split()[0]: line for line in (tmp_path / "out" / "summary.txt").read_text().splitlines()}
    assert "FAILED, exit status 3" in stages["build"]
    assert stages["tests"].endswith("ok")
    assert stages["core"].endswith("ok")
    assert stages["benchmarks"].endswith("ok")
    assert "NOT RUN: the benchmarks left no result file" in stages["roofline"]
    assert "no compiler today" in (tmp_path / "out" / "log.txt").read_text()
    assert "no compiler today" in found.stdout  # the end of a failed stage is shown at once


def test_the_gpu_script_refuses_a_folder_of_wheels_that_is_not_there(stub_python: Path, tmp_path: Path) -> None:
    found = run_gpu_script(stub_python, "--wheels", str(tmp_path / "none"), str(tmp_path / "out"))
    assert found.returncode == 2
    assert "no such folder" in found.stderr


def test_the_gpu_script_runs_its_stages_dearest_first_and_their_limits_leave_time(
    able_python: Path, tmp_path: Path
) -> None:
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    program(tools / "compute-sanitizer")
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    found = run_gpu_script(able_python, str(out), PATH=path, VADIFF_COMMIT="0123456")
    assert found.returncode == 0, found.stdout + found.stderr
    limits = {name: int(seconds) for name, seconds in re.findall(r"== (\S+) \(at most (\d+) s\)", found.stdout)}
    before = ["build", "machine", "tests", "benchmarks", "table", "roofline"]
    sanitizers = ["memcheck-native", "racecheck-native", "compile-triton", "memcheck-triton", "racecheck-triton"]
    assert [*limits] == [*before, "core", *sanitizers]
    left = 570 - sum(limits[name] for name in before)
    assert left >= 80 + 50  # for the sanitizers, and for the suite
    lines = [line.split()[0] for line in (out / "summary.txt").read_text().splitlines()]
    assert lines == [*before[:-1], "left", "roofline", "core", *sanitizers]
    assert "the design\n== summary" in found.stdout
    found = run_gpu_script(able_python, "--sanitize", str(out), PATH=path)
    assert re.findall(r"== (\S+) \(at", found.stdout) == ["build", "machine", *sanitizers]
    assert "the design" not in found.stdout  # of the run before


def test_stages_of_the_gpu_script_hear_an_interrupt_that_its_shell_ignores(tmp_path: Path) -> None:
    asked = f'exec {sys.executable} -c "import signal; print(signal.getsignal(signal.SIGINT))"'
    python = program(tmp_path / "python", f'case "$*" in *doctor*) {asked} ;; esac')
    out = tmp_path / "out"
    command = ["bash", "-c", "trap '' INT; exec \"$@\"", "bash", str(BENCHMARKS / "gpu.sh"), str(out)]
    subprocess.run(command, capture_output=True, timeout=60, check=False, env={**os.environ, "PYTHON": str(python)})
    log = (out / "log.txt").read_text()
    assert "default_int_handler" in log, log


def test_the_gpu_script_hands_on_the_commit_and_refuses_what_is_none(able_python: Path, tmp_path: Path) -> None:
    for told in ("0123456", "0123456789abcdef0123456789abcdef01234567-dirty"):
        run_gpu_script(able_python, "--commit", told, str(tmp_path / "out"))
        assert f"commit {told}\n" in (tmp_path / "out" / "log.txt").read_text()
    for wrong in ("main", "0123456-"):
        found = run_gpu_script(able_python, "--commit", wrong, str(tmp_path / "none"))
        assert found.returncode == 2
        assert f"--commit {wrong}: expected a hash" in found.stderr
    assert not (tmp_path / "none").exists()


def test_the_gpu_script_takes_python3_where_there_is_no_python(able_python: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    able_python.rename(tools / "python3")
    needed = "bash cat dirname env find git head mkdir mktemp nproc rm sed sh tail tee timeout wc"
    for name in needed.split():
        (tools / name).symlink_to(shutil.which(name) or name)
    run_gpu_script(Path(), str(tmp_path / "out"), PATH=str(tools), PYTHON="")
    assert re.search(r"^benchmarks +\d+ s  ok$", (tmp_path / "out" / "summary.txt").read_text(), re.MULTILINE)


def test_the_usage_of_the_gpu_script_is_its_head(able_python: Path) -> None:
    found = run_gpu_script(able_python, "--help")
    assert found.stdout.startswith("Everything that needs an NVIDIA GPU")
    assert found.stdout.endswith("from the wheels in DIR alone.\n")
