"""Checkpoints: folders that appear whole or not at all, and are read without executing code.

`checkpoints/step-<n>/state.pt` holds everything a run needs to go on, `sha256` its checksum. A checkpoint is written
to a folder of another name, flushed to the disk and renamed: whenever the process is killed or the disk fills up,
what was there before stays as it was.
"""

import hashlib
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError

FOLDER = "checkpoints"
_STATE, _CHECKSUM = "state.pt", "sha256"
_NAME = re.compile(r"step-(\d+)")
_PARTIAL, _REMOVED = ".partial-", ".removed-"  # what a killed process may leave behind


def steps_saved(run: Path) -> list[int]:
    """The steps of the checkpoints of a run directory, ascending. Whether they are sound is seen when they are read."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def save_checkpoint(run: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write `checkpoints/step-<step>` and remove all but the `keep` latest.

    Args:
        run: the run directory.
        step: number of steps done.
        state: tensors and plain values.
        keep: how many checkpoints stay, this one included.

    Raises:
        CheckpointError: it could not be written (a full disk, no permission); the earlier ones are as they were.
    """
    folder = run / FOLDER
    final = folder / f"step-{step}"
    partial = folder / f"{_PARTIAL}{step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        partial.mkdir()
        with (partial / _STATE).open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        with (partial / _CHECKSUM).open("w") as text:
            text.write(_digest(partial / _STATE) + "\n")
            text.flush()
            os.fsync(text.fileno())
        _flush_folder(partial)
        if final.exists():  # of an earlier run of the same steps, or corrupt: this one takes its place
            os.rename(final, folder / f"{_REMOVED}{step}")
        os.rename(partial, final)
        _flush_folder(folder)
    except (OSError, RuntimeError) as error:  # torch reports a failing write as RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{final} could not be written: {error}. {_last_good(run, step)}") from error
    for old in steps_saved(run)[:-keep]:
        removed = folder / f"{_REMOVED}{old}"
        os.rename(folder / f"step-{old}", removed)
        shutil.rmtree(removed)
    return final


def load_checkpoint(run: Path, step: int | None = None, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values are made, no code runs.

    Args:
        run: the run directory.
        step: which one; None is the latest.
        device: where its tensors go.

    Raises:
        CheckpointError: there is none, or it is truncated or corrupt; the message names the last good one.
    """
    saved = steps_saved(run)
    if not saved:
        raise CheckpointError(f"{run} has no checkpoint")
    if step is not None and step not in saved:
        raise CheckpointError(f"{run} has no checkpoint of step {step}, only of {', '.join(map(str, saved))}")
    step = saved[-1] if step is None else step
    folder = run / FOLDER / f"step-{step}"
    trouble = _trouble(folder)
    if trouble is None:
        try:
            state: dict[str, Any] = torch.load(folder / _STATE, map_location=device, weights_only=True)
            return state
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            trouble = str(error)
    raise CheckpointError(f"{folder} is corrupt: {trouble}. {_last_good(run, step)}")


def _trouble(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if its checksum fits."""
    try:
        expected = (folder / _CHECKSUM).read_text().strip()
        found = _digest(folder / _STATE)
    except (OSError, UnicodeDecodeError) as error:
        return str(error)
    if found != expected:
        return f"{_STATE} has SHA-256 {found[:12]}…, expected {expected[:12]}…"
    return None


def _last_good(run: Path, not_step: int) -> str:
    """What to do when the checkpoint of `not_step` is of no use."""
    good = [s for s in steps_saved(run) if s != not_step and _trouble(run / FOLDER / f"step-{s}") is None]
    if not good:
        return "There is no other good one"
    return f"The last good one is step {good[-1]}: to go on from it, remove the folder of step {not_step}"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _flush_folder(folder: Path) -> None:
    """Make what was created or renamed in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name.startswith((_PARTIAL, _REMOVED)):
            shutil.rmtree(entry)
