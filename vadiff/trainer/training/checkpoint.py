"""Checkpoints: folders that are written atomically and read without executing code.

`checkpoints/step-<n>/state.pt` holds everything needed to resume a run, `sha256` its checksum. A checkpoint is written
to a folder of another name, flushed to the disk and renamed: if the process is killed or the disk fills up, earlier
checkpoints stay unchanged. An earlier one of the same step is renamed to `.replaced-<n>`, and is valid as long as there
is no `step-<n>`.
"""

import contextlib
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError, RunError
from ...files import flush, reason, sha256_of, writing

FOLDER = "checkpoints"
_STATE, _CHECKSUM = "state.pt", "sha256"
_PARTIAL, _REMOVED, _REPLACED = ".partial-", ".removed-", ".replaced-"  # what a killed process may leave behind
_NAME, _ASIDE = re.compile(r"step-(\d+)"), re.compile(re.escape(_REPLACED) + r"(\d+)")


def steps_saved(run: Path) -> list[int]:
    """The steps of the checkpoints of a run directory, ascending; their checksums are not verified."""
    return sorted(_folders(run))


def fingerprint(run: Path) -> str:
    """Step and checksum of the latest checkpoint, "none" where there is none; equal for equal checkpoints only."""
    folders = _folders(run)
    if not folders:
        return "none"
    latest = max(folders)
    try:
        return f"step {latest}, SHA-256 {(folders[latest] / _CHECKSUM).read_text().strip()[:12]}…"
    except (OSError, UnicodeDecodeError):
        return f"step {latest}, corrupt"


def checksum(run: Path, step: int | None = None) -> tuple[int, str]:
    """Step and SHA-256 of a checkpoint, the latest if `step` is None; the file is not read.

    Raises:
        CheckpointError: there is none, or its checksum is missing.
    """
    step, folder = _chosen(run, step)
    try:
        return step, (folder / _CHECKSUM).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder} is corrupt: {error}. {_last_good(run, step)}") from error


def save_checkpoint(run: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write `checkpoints/step-<step>` and remove all but the `keep` latest.

    Args:
        run: the run directory.
        step: number of steps done.
        state: tensors and plain values.
        keep: how many checkpoints stay, this one included.

    Raises:
        CheckpointError: it could not be written (a full disk, no permission), and the earlier ones are unchanged; or
            it is written, but earlier ones could not be removed. The message says which.
    """
    folder = run / FOLDER
    final = folder / f"step-{step}"
    partial, replaced = folder / f"{_PARTIAL}{step}", folder / f"{_REPLACED}{step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        partial.mkdir()
        with writing(final, partial), (partial / _STATE).open("wb") as file:
            torch.save(dict(state), file)
        (partial / _CHECKSUM).write_text(sha256_of(partial / _STATE) + "\n")
        for written in (partial / _STATE, partial / _CHECKSUM, partial):
            flush(written)
        if final.exists():  # of an earlier run, or corrupt: replaced by this one
            os.rename(final, replaced)
        os.rename(partial, final)
        flush(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not final.exists():
            with contextlib.suppress(OSError):  # it is valid under that name too
                os.rename(replaced, final)
        kept = f"The earlier one of step {step} is unchanged. " if step in steps_saved(run) else ""
        raise CheckpointError(
            f"{final} could not be written: {reason(error)}. {kept}{_last_good(run, step)}"
        ) from error
    try:
        if replaced.exists():
            shutil.rmtree(replaced)
        for old in steps_saved(run)[:-keep]:
            removed = folder / f"{_REMOVED}{old}"
            os.rename(folder / f"step-{old}", removed)
            shutil.rmtree(removed)
    except OSError as error:
        raise CheckpointError(f"{final} is written, but earlier checkpoints could not be removed: {error}") from error
    return final


def load_checkpoint(run: Path, step: int | None = None, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint of tensors and plain values, without executing code.

    Args:
        run: the run directory.
        step: which one; None is the latest.
        device: where its tensors go.

    Raises:
        CheckpointError: there is none, or it is truncated or corrupt; the message names the last intact one.
    """
    step, folder = _chosen(run, step)
    trouble = _trouble(folder)
    if trouble is None:
        try:
            state: dict[str, Any] = torch.load(folder / _STATE, map_location=device, weights_only=True)
            return state
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            trouble = str(error)
    raise CheckpointError(f"{folder} is corrupt: {trouble}. {_last_good(run, step)}")


def load_training(run: Path, step: int | None = None) -> dict[str, Any]:
    """`load_checkpoint` of a run that was trained here: with the criterion, the levels and the optimiser.

    Raises:
        CheckpointError: there is none, or it is corrupt.
        RunError: it was imported, and has weights only.
    """
    state = load_checkpoint(run, step)
    if "criterion" not in state:
        raise RunError(f"{run} was imported: it has weights, but no statistics of its training")
    return state


def _chosen(run: Path, step: int | None) -> tuple[int, Path]:
    """Step and folder of a checkpoint, the latest if `step` is None."""
    folders = _folders(run)
    if not folders:
        raise CheckpointError(f"{run} has no checkpoint")
    if step is not None and step not in folders:
        raise CheckpointError(f"{run} has no checkpoint of step {step}, only of {', '.join(map(str, sorted(folders)))}")
    step = max(folders) if step is None else step
    return step, folders[step]


def _folders(run: Path) -> dict[int, Path]:
    """The folder of each checkpoint, by step."""
    folder = run / FOLDER
    names = {entry.name for entry in folder.iterdir() if entry.is_dir()} if folder.is_dir() else set()
    found = {int(match[1]): folder / match[0] for name in names if (match := _NAME.fullmatch(name))}
    aside = {int(match[1]): folder / match[0] for name in names if (match := _ASIDE.fullmatch(name))}
    return aside | found


def _trouble(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if its checksum matches."""
    try:
        expected = (folder / _CHECKSUM).read_text().strip()
        found = sha256_of(folder / _STATE)
    except (OSError, UnicodeDecodeError) as error:
        return str(error)
    if found != expected:
        return f"{_STATE} has SHA-256 {found[:12]}…, expected {expected[:12]}…"
    return None


def _last_good(run: Path, not_step: int) -> str:
    """What to do when the checkpoint of `not_step` is unusable."""
    good = [step for step, folder in _folders(run).items() if step != not_step and _trouble(folder) is None]
    if not good:
        return "No earlier checkpoint is intact"
    return f"The last good one is step {max(good)}: to go on from it, remove the folder of step {not_step}"


def _tidy(folder: Path) -> None:
    """Remove what killed processes left behind, and restore a `.replaced-<n>` without a `step-<n>`."""
    for entry in folder.iterdir():
        aside = _ASIDE.fullmatch(entry.name)
        if aside and not (folder / f"step-{aside[1]}").exists():
            os.rename(entry, folder / f"step-{aside[1]}")
        elif aside or entry.name.startswith((_PARTIAL, _REMOVED)):
            shutil.rmtree(entry)
