"""benchmarks/gpu.sh: its stages and their options without a GPU, and what it makes of stages that fail or hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gpu_run
import pytest
from gpu_run import Run, Stage

from vadiff.trainer.cli import parse_options
from vadiff.trainer.cli.train import training_config

GPU_SH = Path(gpu_run.__file__).with_name("gpu.sh")


def python(code: str, name: str = "stub", limit: float = 20.0) -> Stage:
    return Stage(name, limit, (sys.executable, "-c", code))


def gpu_sh(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(GPU_SH), *arguments], capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )  # fmt: skip


def summary(out: Path) -> dict[str, str]:
    """Stage → its line."""
    return {line.split()[0]: line for line in (out / "summary.txt").read_text().splitlines()}


def test_the_files_and_options_of_every_stage_exist(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda part: gpu_sh("--part", part, "--dry", str(tmp_path / part)), "123"))
    for run in found:
        assert run.returncode == 0, run.stdout + run.stderr
    assert [[*summary(tmp_path / part)][1:] for part in "123"] == [
        ["build", "doctor", "smoke-native", "smoke-triton", "tests"],
        ["benchmarks", "table", "roofline", "ncu"],
        ["memcheck-native", "networks", "core", "training-loop"],
    ]


def test_the_commands_of_the_short_run_on_cifar_are_understood(tmp_path: Path) -> None:
    assert Run(tmp_path, dry=True, data=tmp_path).run(gpu_run.TRAINING), (tmp_path / "summary.txt").read_text()
    train = gpu_run.TRAINING[0].command[3:]
    config = training_config(parse_options(train))
    assert config.channels == (128, 128, 128)
    assert config.steps // config.snapshot_every >= 60
    assert gpu_run.TRAINING[0] in gpu_run.own_stages(3, tmp_path)


def test_a_dry_run_sees_an_option_and_a_file_that_are_not_there(tmp_path: Path) -> None:
    table = [
        Stage("option", 30, gpu_run.script("gpu_run.py", "--of-old")),
        Stage("file", 30, gpu_run.script("of_old.py")),
    ]
    assert not Run(tmp_path, dry=True).run(table)
    assert "FAILED   unknown options: --of-old" in summary(tmp_path)["option"]
    assert "FAILED" in summary(tmp_path)["file"]


@pytest.mark.parametrize(("part", "data"), [(1, None), (2, None), (3, None), (3, Path("cifar"))])
def test_the_limits_leave_every_stage_half_its_time(part: int, data: Path | None) -> None:
    before = 0.0
    for stage in [*gpu_run.first_stages(None), *gpu_run.own_stages(part, data)]:
        assert before + stage.limit / 2 <= 9 * 60 - gpu_run.RESERVE, stage.name
        before += stage.limit


def test_a_stage_that_fails_and_one_that_hangs_cost_their_own_limit(tmp_path: Path) -> None:
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {deaf!r}])"
    begin = time.monotonic()
    table = [
        python("print('no compiler today'); raise SystemExit(3)", "failing"),
        python(child, "hanging", limit=1.5),
        Stage("missing", 5, ("/no/such/program",)),
        python("print('42 images/s')", "good"),
    ]
    assert not Run(tmp_path, grace=0.5).run(table)
    assert time.monotonic() - begin < 15
    lines = summary(tmp_path)
    assert "FAILED   no compiler today" in lines["failing"]
    assert "STOPPED" in lines["hanging"]
    assert "No such file" in lines["missing"]
    assert "ok       42 images/s" in lines["good"]


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def test_a_stage_hears_an_interrupt_first(before: Any, tmp_path: Path) -> None:
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('3 passed, 1 failed in 2 s')"
    handler = signal.signal(signal.SIGINT, before)
    try:
        Run(tmp_path).run([python(code, limit=1.5)])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "STOPPED  3 passed, 1 failed" in summary(tmp_path)["stub"]


@pytest.mark.parametrize(("end", "told"), [("time.sleep(60)", "figures: 1 held"), ("1 / 0", "ZeroDivisionError")])
def test_what_was_judged_before_a_stage_was_stopped_is_told_and_what_made_it_fail(
    end: str, told: str, tmp_path: Path
) -> None:
    Run(tmp_path).run([python(f"import time; print('figures: 1 held', flush=True); {end}", limit=1.0)])
    assert told in summary(tmp_path)["stub"]


def test_a_stage_that_does_not_fit_and_one_without_its_program_are_not_run(tmp_path: Path) -> None:
    out = [tmp_path / "a", tmp_path / "b"]
    for folder in out:
        folder.mkdir()
    run = Run(out[0], minutes=0.5)  # 15 s
    assert not run.run([python("", limit=60), python("", "short", limit=5)])
    assert "NOT RUN  15 s are left" in summary(out[0])["stub"] or "NOT RUN  14 s are left" in summary(out[0])["stub"]
    assert "ok" in summary(out[0])["short"]
    assert Run(out[1]).run([Stage("tool", 5, ("of-old", "x"), "of-old")])  # no failure
    assert "NOT RUN  of-old is not on the PATH" in summary(out[1])["tool"]


def test_the_summary_names_failed_tests_and_missed_figures_in_at_most_twenty_lines(tmp_path: Path) -> None:
    pytest_says = "FAILED tests/gpu/test_a.py::test_b[x] - AssertionError: 1\n= 1 failed, 2 passed in 3.00s ="
    figures = "the design's figures\n" + "share of copy   90 %   MISSED   85 %\nloss   1 %  pass  0.5 %\n" * 30
    figures += "figures: 30 held, 30 missed, 9 not measured"
    Run(tmp_path).run([python(f"print({pytest_says!r}); raise SystemExit(1)"), python(f"print({figures!r})", "table")])
    text = (tmp_path / "summary.txt").read_text()
    assert "FAILED   1 failed, 2 passed in 3.00s; test_a.py::test_b[x]" in text
    assert "ok       figures: 30 held, 30 missed, 9 not measured" in text
    assert "  share of copy  90 %  MISSED  85 %" in text
    assert len(text.splitlines()) == gpu_run.MAX_LINES


def test_at_most_so_many_files_of_so_many_bytes_are_left(tmp_path: Path) -> None:
    for name in ("summary.txt", "h100.json", "table.txt", *(f"{i}.log" for i in range(9))):
        (tmp_path / name).write_text("x" * 100)
    (tmp_path / "tests.log").write_text("first" + "x" * 50_000 + "last")
    (tmp_path / "huge.bin").write_bytes(os.urandom(30_000))
    assert gpu_run.pack(tmp_path, 6, 20_000) == ["huge.bin (30000 bytes)"]
    left = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert {"summary.txt", "h100.json", "table.txt", "tests.log", "rest.tar.gz"} <= left.keys()
    assert len(left) == 6
    assert max(left.values()) <= 20_000
    log = (tmp_path / "tests.log").read_text()
    assert log.startswith("first")
    assert log.endswith("last")
    with tarfile.open(tmp_path / "rest.tar.gz") as tar:
        assert len(tar.getnames()) == 8


def test_options_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    stale = tmp_path / "stale"
    stale.mkdir()
    (stale / "vadiff-0.1.0-cp312-cp312-linux_x86_64.whl").touch()
    (stale / "commit.txt").write_text("0" * 40)
    for words, message in (
        (["--commit", "main", "--part", "1"], "--commit is 'main', expected a hash"),
        (["--data", str(tmp_path), "--part", "1"], "with --part 3"),
        (["--bundle", str(tmp_path), "--part", "1"], "`make gpu-bundle`"),
        (
            ["--commit", "1" * 40, "--bundle", str(stale), "--part", "1"],
            f"built from commit {'0' * 40}, but this tree is ",
        ),
        (["--part", "1", str(tmp_path / "full")], "is not empty"),
        (["--part", "1", "--minutes", "0"], "--minutes has to be positive"),
    ):
        run = gpu_sh(*words)
        assert run.returncode == 2
        assert message in run.stderr


def test_a_bundle_is_installed_without_the_network_and_nothing_is_built(tmp_path: Path) -> None:
    (tmp_path / "vadiff-0.1.0-cp312-cp312-linux_x86_64.whl").touch()
    install = gpu_run.first_stages(tmp_path)[0]
    assert install.name == "install"
    assert {"--no-index", "--no-deps", "--target"} <= {*install.command}
    assert install.command[-1].endswith("linux_x86_64.whl")
