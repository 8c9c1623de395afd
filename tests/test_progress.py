"""Progress in a pipe, what is said at the end, and what is kept and said when a signal stops the work."""

import os
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ablation_runs import two_arms

from vadiff.errors import Stopped
from vadiff.sampling.generation import Generated
from vadiff.trainer.ablation.progress import GridProgress
from vadiff.trainer.cli import main
from vadiff.trainer.next_steps import after_training, next_steps, training_on_latents
from vadiff.trainer.pictures import read_pictures
from vadiff.trainer.progress import progress_bar
from vadiff.trainer.report.ema_sweep import lowest_of, scores_table
from vadiff.trainer.training.metrics import last_step
from vadiff.trainer.training.stopping import stoppable


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of the trained run that was not evaluated."""
    return Path(shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation")))


@pytest.fixture
def every_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each state, in place of one every half minute."""
    monkeypatch.setattr("vadiff.trainer.progress.PIPE_SECONDS", 0.0)


@pytest.mark.usefixtures("every_state")
def test_each_state_in_a_pipe_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(4, "drawing", "image") as bar:
        bar.update(2)
        bar.set_postfix_str("loss=0.5", refresh=False)
        bar.update(2)
    printed = capsys.readouterr().err
    assert "\r" not in printed
    assert printed.endswith("\n")
    lines = printed.splitlines()
    assert all(line.startswith("drawing: ") for line in lines)
    assert any("2/4" in line for line in lines)
    assert "4/4" in lines[-1]
    assert "loss=0.5" in lines[-1]


def test_short_work_writes_nothing_to_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(4, "drawing", "image") as bar:
        bar.update(4)
    with progress_bar(None, "listing", "file", shown=False) as bar:
        bar.update(4)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("every_state")
def test_progress_of_a_grid_names_runs_and_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, runs = two_arms(tmp_path, 2)
    done, failing = runs["constant", 0], runs["other", 0]
    with GridProgress(list(runs.values()), set()) as shown:
        for run, steps in ((done, 4), (failing, 1)):
            run.path.mkdir(parents=True)
            (run.path / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(1, steps + 1)))
        (failing.path / "train.log").write_text("step 1\nvadiff: no space left\n\n")
        shown.show([done, failing])
        shown.end(done, trained=True, complete=True)
        shown.end(failing, trained=False, complete=False)
        shown.show([])
    lines = capsys.readouterr().err.splitlines()
    assert any(
        "5/16" in line and "constant/seed-0 measuring images, other/seed-0 step 1 of 4" in line for line in lines
    )
    assert "constant/seed-0: done" in lines
    assert f"other/seed-0: failed: vadiff: no space left (all of it: {failing.path / 'train.log'})" in lines
    assert lines[-1].startswith("1 of 4 runs")


def test_last_step_is_of_the_last_whole_line(tmp_path: Path) -> None:
    assert last_step(tmp_path) == 0
    file = tmp_path / "metrics.jsonl"
    long = '{"step": 1}\n{"step": 2, "x": "' + "y" * 10**6 + '"}\n'
    for text, step in (("", 0), ('{"step": 1', 0), ('{"step": 1}\n{"st', 1), (long, 2)):
        file.write_text(text)
        assert last_step(tmp_path) == step


def test_next_steps_are_quoted_for_a_shell(tmp_path: Path) -> None:
    text = next_steps(("report", Path("my runs/a")), ("sample", "b"))
    assert text.splitlines() == ["Next:", "  vadiff report 'my runs/a'", "  vadiff sample b"]
    assert after_training(Path("a"), "latents").endswith("vadiff evaluate a --metrics none")
    latents = shlex.join(map(str, training_on_latents(Path("latents"), (4, 32, 32))))
    assert "--preset images --dataset latents --data latents --image-size 32 --image-channels 4" in latents


@stoppable(lambda: "half is kept")
def wait_for(number: int) -> None:
    os.kill(os.getpid(), number)
    signal.pause()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_stoppable_work_with_advice(number: signal.Signals) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(Stopped, match=f"stopped by {number.name}; half is kept") as stopped:
            wait_for(number)
    finally:
        signal.signal(signal.SIGINT, handlers[1])
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(signal.SIGTERM) == handlers[0]


@pytest.mark.parametrize("name", ["drawn", "drawn.npz"])
def test_interrupted_drawing_keeps_its_images_and_says_which_are_missing(
    name: str, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any) -> Any:
        yield Generated(0, torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2]))
        raise KeyboardInterrupt

    monkeypatch.setattr("vadiff.sampling.generation.generate", interrupted)
    command = ["sample", str(trained_run), "--images", "8", "--first-seed", "2", "--out", str(tmp_path / name)]
    for mark in ("", "-2"):  # a second time it replaces nothing
        assert main(command) == 130
        kept = (tmp_path / name).with_name(f"drawn-incomplete{mark}{Path(name).suffix}")
        assert f"stopped by SIGINT; 3 of 8 images are in {kept}" in (printed := capsys.readouterr().err)
        assert "--seeds 5-9" in printed
        assert read_pictures(kept).shape == (3, 1, 8, 8)
    assert len(list(tmp_path.iterdir())) == 2


def test_interrupted_commands_say_how_to_go_on(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    def stopped(*arguments: Any, **options: Any) -> Any:
        raise Stopped("stopped by SIGTERM after step 1; go on with --resume", signal.SIGTERM)

    two_arms(tmp_path, 1)
    monkeypatch.setattr("vadiff.trainer.ablation.train_all", killed)
    assert main(["ablate", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "grid")]) == 143
    assert "stopped by SIGTERM; the runs at work wrote checkpoints: the same command" in capsys.readouterr().err
    monkeypatch.setattr("vadiff.trainer.report.evaluate._measure_levels", killed)
    assert main(["evaluate", str(run), "--metrics", "none"]) == 143
    assert "stopped by SIGTERM; nothing is kept yet" in capsys.readouterr().err
    monkeypatch.setattr("vadiff.trainer.report.demo.find_network", lambda features: None)
    monkeypatch.setattr("vadiff.trainer.report.demo.train", stopped)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 143
    assert "stopped by SIGTERM; the demo is not complete; the same command" in capsys.readouterr().err


def test_what_was_measured_is_named_when_a_later_part_fails(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run / "evaluation" / "step-4"

    def failing(*arguments: Any, **options: Any) -> Any:
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text("{}")
        raise ValueError("too few images")

    monkeypatch.setattr("vadiff.trainer.report.evaluate._measure_levels", failing)
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--metrics", "none"])
    assert f"kept in {folder}: metrics.json; the same command takes what it can" in capsys.readouterr().err


def test_lowest_of_a_sweep_is_the_lowest_of_all_weights() -> None:
    widths, others = {0.1: 0.3, 0.05: 0.2}, {"ema": 0.1, "raw": 0.4}
    marked = [line for line in scores_table(widths, others).splitlines() if line.endswith("lowest")]
    assert marked == ["        ema 0.10000  lowest"]
    assert lowest_of(widths, {}) == "ema-0.05"
