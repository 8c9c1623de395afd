"""vadiff.trainer.training.checkpoint: whole or not at all, and no code."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vadiff.errors import CheckpointError
from vadiff.trainer.training.checkpoint import FOLDER, load_checkpoint, save_checkpoint, steps_saved


def save(run: Path, *steps: int, keep: int = 3) -> None:
    for step in steps:
        save_checkpoint(run, step, {"step": step, "values": torch.full((50_000,), float(step))}, keep)


def damage(run: Path, step: int) -> None:
    path = run / FOLDER / f"step-{step}" / "state.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_latest_is_loaded_unless_another_is_named(tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    assert load_checkpoint(tmp_path)["step"] == 10
    assert load_checkpoint(tmp_path, 5)["values"][0] == 5.0


def test_only_the_latest_are_kept_and_counted_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, 9, 10, 100, keep=2)
    assert steps_saved(tmp_path) == [10, 100]
    assert sorted(entry.name for entry in (tmp_path / FOLDER).iterdir()) == ["step-10", "step-100"]


def killed_while_saving(*arguments: str | Path) -> list[dict[str, Any]]:
    """What was found after a kill at each point."""
    command = [sys.executable, Path(__file__).with_name("kill_while_saving.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_at_any_point_of_saving_the_last_good_one_is_there(tmp_path: Path) -> None:
    lines = killed_while_saving(tmp_path)
    assert len(lines) > 15
    assert [line["ended"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert all(line["sound"] for line in lines)
    latest = [line["latest"] for line in lines]
    assert set(latest[:3]) == {2}
    assert latest[-1] == 3
    assert latest == sorted(latest)
    assert all(set(line["left"]) <= {"step-2", "step-3", "step-4"} for line in lines)


def test_killed_while_saving_the_only_step_again_it_is_there(tmp_path: Path) -> None:
    lines = killed_while_saving(tmp_path, "again")
    assert len(lines) > 15
    assert all(line["latest"] == 2 and line["sound"] for line in lines)
    assert all(line["left"] == ["step-4"] for line in lines)


def failing(function: Callable[..., None], call: int) -> Callable[..., None]:
    """`function`, but its n-th call fails."""
    calls = itertools.count(1)

    def fail(*arguments: Any, **options: Any) -> None:
        if next(calls) == call:
            raise OSError("no such luck")
        function(*arguments, **options)

    return fail


def test_step_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5, keep=1)
    monkeypatch.setattr("os.rename", failing(os.rename, 2))
    with pytest.raises(CheckpointError, match=r"no such luck. The earlier one of step 5 is unchanged"):
        save_checkpoint(tmp_path, 5, {"step": 5, "values": torch.zeros(3)}, keep=1)
    assert [entry.name for entry in (tmp_path / FOLDER).iterdir()] == ["step-5"]
    assert load_checkpoint(tmp_path)["values"][0] == 5.0


def test_earlier_ones_that_cannot_be_removed_are_a_named_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr("shutil.rmtree", failing(shutil.rmtree, 1))
    with pytest.raises(CheckpointError, match="step-2 is written, but earlier checkpoints could not be removed: no"):
        save(tmp_path, 2, keep=1)
    assert load_checkpoint(tmp_path)["step"] == 2
    save(tmp_path, 3, keep=1)
    assert [entry.name for entry in (tmp_path / FOLDER).iterdir()] == ["step-3"]


def test_failing_write_leaves_what_was_there_and_says_so(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    save(tmp_path, 1)
    request.getfixturevalue("small_disk")
    with pytest.raises(
        CheckpointError, match=r"step-2 could not be written: the file is larger .*The last good one is step 1"
    ):
        save(tmp_path, 2)
    assert [entry.name for entry in (tmp_path / FOLDER).iterdir()] == ["step-1"]
    assert load_checkpoint(tmp_path)["step"] == 1


def test_one_flipped_bit_is_found_and_the_last_good_one_offered(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    damage(tmp_path, 2)
    damage(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"step-3 is corrupt: state\.pt has SHA-256 .*last good one is step 1"):
        load_checkpoint(tmp_path)
    damage(tmp_path, 1)
    with pytest.raises(CheckpointError, match="No earlier checkpoint is intact"):
        load_checkpoint(tmp_path)


def test_missing_parts_are_corrupt(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / FOLDER / "step-2" / "sha256").unlink()
    with pytest.raises(CheckpointError, match="step-2 is corrupt"):
        load_checkpoint(tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        load_checkpoint(tmp_path)
    save(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match="has no checkpoint of step 7, only of 1, 2"):
        load_checkpoint(tmp_path, 7)


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code ran",)


def test_no_code_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1, "harm": Hostile()}, keep=1)
    with pytest.raises(CheckpointError, match="step-1 is corrupt: Weights only load failed"):
        load_checkpoint(tmp_path)
    assert capsys.readouterr().out == ""
    assert pickle.loads(pickle.dumps(Hostile())) is None
    assert capsys.readouterr().out == "code ran\n"
