"""Preparation of a run directory before the first step: created, replaced, or checked for resuming."""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import time
import weakref
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO

from ...errors import RunError
from ...files import reason, replacing
from ...information import Profile
from ...optimal_loss import OptimalLoss
from ..config import TrainConfig
from ..config_schema import TABLE
from ..data import Images
from . import averages
from .assembly import TABLE_FILE, keep_table, read_table
from .checkpoint import FOLDER
from .level_profile import PROFILE_FILE
from .metrics import METRICS
from .optimal_curve import CURVE_FILE
from .run import CONFIG, DATA, IMPORTED, open_run
from .run_encoding import ENCODING_FILE, keep_encoding

# Fields that do not affect what a run computes.
IMMATERIAL = {
    "data", "cache", "workers", "gradient_checkpointing", "table", "optimal_loss", "device", "backend", "compile",
    "graph", "tf32", "deterministic", "max_skipped_steps", "log_every", "tensorboard", "log_rms", "checkpoint_every",
    "keep_checkpoints", "samples_every", "sample_count", "snapshot_every", "snapshot_precision",
}  # fmt: skip
# Further fields that a resumed run may change: how it is measured, and remedies against non-finite steps.
_CHANGEABLE = IMMATERIAL | {
    "steps", "held_out_every", "held_out_images", "held_out_draws", "held_out_levels", "held_out_sigma",
    "learning_rate", "clip", "precision", "on_bad_image",
}  # fmt: skip
_OPEN_ENDED = ("constant", "inverse_sqrt")  # schedules that do not depend on the number of steps
_AVERAGES = f"{averages.FOLDER}/step-*"
_FILES = (IMPORTED, METRICS, DATA, ENCODING_FILE, TABLE_FILE, CURVE_FILE, PROFILE_FILE, "report.html")
_FOLDERS = (
    FOLDER, averages.SNAPSHOTS, averages.FOLDER, "tensorboard", "samples", "evaluation", "generated", "report",
)  # fmt: skip
_LOCK = ".lock"
_ATTEMPTS, _PAUSE = 5, 0.05  # seconds


def check(path: Path, config: TrainConfig, *, resume: bool, overwrite: bool) -> None:
    """Raise unless `path` can become, or be resumed as, the run directory of `config`; nothing is written.

    Raises:
        RunError: `path` is a file, or holds a run and neither `resume` nor `overwrite` is set, or `resume` is set and
            the run has another config; or what would be removed is not known to be a run's.
    """
    _check_folder(path)
    if resume and (path / CONFIG).exists():
        if (path / IMPORTED).exists():
            raise RunError(
                f"{path} was imported, and cannot be trained on: it has weights, but no state of an optimiser. Start "
                f"a run of your own from them, in another folder: --transfer {path}"
            )
        saved = TrainConfig.load(path / CONFIG)
        if differing := differences(saved, config, _CHANGEABLE):
            raise RunError(
                f"{path} cannot go on with another config: {'; '.join(differing)}. Leave out --preset, --config and "
                "these fields, and --resume takes the run's own"
            )
    else:
        _check_removable(path, overwrite=overwrite, instead="go on with --resume, replace it")
        if config.transfer is not None and path.resolve() == Path(config.transfer).resolve():
            raise RunError(f"transfer is {config.transfer}, which --overwrite would remove: name another folder")


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise unless `path` can become a run directory that cannot be resumed.

    Raises:
        RunError: `path` is a file, or holds a run and `overwrite` is not set, or what would be removed is not known to
            be a run's.
    """
    _check_folder(path)
    _check_removable(path, overwrite=overwrite, instead="replace it")


def check_results(path: Path, names: Iterable[str], runs: Iterable[Path]) -> None:
    """Raise if a folder holds files with the names of results, and none of the runs that results are made from.

    Raises:
        RunError: it does: the files may be anything.
    """
    there = [name for name in names if os.path.lexists(path / name)]
    if there and not any((run / CONFIG).exists() for run in runs):
        raise RunError(
            f"{path} holds {', '.join(there)} and none of the runs that would make them. They may not be "
            "vadiff's, and would be replaced. Name another folder with --out, or move them away"
        )


def _check_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file, expected a folder")


def _check_removable(path: Path, *, overwrite: bool, instead: str) -> None:
    """Raise unless all that `clear` would remove is of a run that may be replaced."""
    there = [name for name in (*_FILES, *_FOLDERS) if os.path.lexists(path / name)]
    if not (path / CONFIG).exists():
        if there:
            raise RunError(
                f"{path} holds {', '.join(there)} and no config.yaml: a run would replace what may not be vadiff's. "
                "Name another folder, or move them away"
            )
        return
    if not overwrite:
        raise RunError(f"{path} holds a run already: {instead} with --overwrite, or name another")
    try:
        TrainConfig.load(path / CONFIG)
    except RunError as error:
        raise RunError(
            f"{path} is not replaced, as its config.yaml is of no run of this version ({error}). Name another folder, "
            "or remove it yourself"
        ) from error
    for name in there:
        if name in _FOLDERS and (path / name).is_symlink():
            raise RunError(
                f"{path} is not replaced, as {name} in it is a link to {os.readlink(path / name)}. Name another "
                "folder, or remove the link yourself"
            )


def differences(saved: TrainConfig, config: TrainConfig, ignored: Collection[str]) -> list[str]:
    """The fields, except `ignored` ones, in which two configs differ; `steps` only if the schedule depends on it."""
    saved, config = saved.resolved(), config.resolved()
    names = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in ignored]
    if "steps" not in names and saved.schedule not in _OPEN_ENDED:
        names.append("steps")
    return [
        f"{name} was {getattr(saved, name)!r}, is {getattr(config, name)!r}"
        + (f", which changes the {saved.schedule} schedule" if name == "steps" else "")
        for name in names
        if getattr(saved, name) != getattr(config, name)
    ]


def check_images(path: Path, images: Images) -> None:
    """Raise unless a run is resumed with as many images as it began with.

    Raises:
        RunError: the data set has changed since.
    """
    facts = open_run(path).data_facts() if (path / CONFIG).exists() else None
    if facts is not None and (facts.train, facts.held_out) != (len(images.train), len(images.held_out)):
        raise RunError(
            f"{path} began with {facts.train:,} training and {facts.held_out:,} held-out images, the data set now has "
            f"{len(images.train):,} and {len(images.held_out):,}: give the same with --data"
        )
    if facts is not None and facts.fingerprint and facts.fingerprint != images.fingerprint:
        raise RunError(
            f"{path} began with other images: names, sizes or labels of the files have changed. Give the same with "
            "--data"
        )


def begin(
    path: Path,
    config: TrainConfig,
    images: Images,
    *,
    resume: bool,
    step: int = 0,
    optimal: OptimalLoss | None = None,
    profile: Profile | None = None,
) -> None:
    """Make `path` the run directory of `config`, after `check`: an existing run is removed unless it is resumed.

    Args:
        path: the folder.
        config: saved in it.
        images: the data set, whose size is noted.
        resume: keep the existing run, except files made after `step`.
        step: from which the run is resumed.
        optimal: the optimal loss that the run is trained with, saved in the folder.
        profile: the x0 errors that its levels are placed by, saved in the folder.

    Raises:
        RunError: the weight table that the config names is missing.
    """
    if resume and (path / CONFIG).exists():
        _drop_later(path, step)
        _write_facts(path, config, images, optimal, profile)
        return
    table = read_table(config, None) if TABLE in (config.weighting, config.levels) else None
    clear(path)
    path.mkdir(parents=True, exist_ok=True)
    try:
        if table is not None:
            keep_table(table, path)
        _write_facts(path, config, images, optimal, profile)
    except BaseException:  # as a full disk: nothing half-written stays
        clear(path)
        raise


def _write_facts(
    path: Path, config: TrainConfig, images: Images, optimal: OptimalLoss | None, profile: Profile | None
) -> None:
    """What `begin` writes of a run, new or resumed; the config last: without it the folder is no run."""
    if optimal is not None and not (path / CURVE_FILE).exists():
        optimal.save(path / CURVE_FILE)
    if profile is not None and not (path / PROFILE_FILE).exists():
        profile.save(path / PROFILE_FILE)
    keep_encoding(images.encoding, path)
    facts = {
        "train": len(images.train),
        "held_out": len(images.held_out),
        "held_out_is_test": images.held_out_is_test,
        "fingerprint": images.fingerprint,
    }
    with replacing(path / DATA) as partial:
        partial.write_text(json.dumps(facts) + "\n")
    with replacing(path / CONFIG) as partial:
        config.save(partial)


_locks: weakref.WeakSet[IO[str]] = weakref.WeakSet()  # locked by this process


def _leave_locks() -> None:
    """Close the locked files in a process that was forked: it would keep the lock of a parent that is killed."""
    for file in _locks:
        file.close()


os.register_at_fork(after_in_child=_leave_locks)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Keep other processes from training in a folder. A process that is killed leaves no lock.

    Raises:
        RunError: another process trains in it, or the folder cannot be written.
    """
    try:
        file = (path / _LOCK).open("a")
    except OSError as error:
        raise RunError(f"{path} cannot be written: {reason(error)}") from error
    with file:
        _locks.add(file)
        for attempt in range(_ATTEMPTS):  # `is_in_use` of another process holds it for a moment
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == _ATTEMPTS - 1:
                    raise RunError(
                        f"{path} is in use: another process trains there. Wait for it, or name another"
                    ) from None
                time.sleep(_PAUSE)
            except OSError:  # a file system without locks
                break
        yield


def is_in_use(path: Path) -> bool:
    """Whether a process trains in a folder."""
    try:
        with (path / _LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such folder, or a file system without locks
        return False
    return False


def clear(path: Path) -> None:
    """Remove the files that `vadiff` writes to a run directory, and nothing else; call `check` before.

    The config last: what is left of a killed call is a run still, and can be replaced.
    """
    for name in _FILES:
        (path / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        if (path / name).is_dir():
            shutil.rmtree(path / name)
    (path / CONFIG).unlink(missing_ok=True)


def _drop_later(path: Path, step: int) -> None:
    """Remove sample grids, evaluations and averages of later steps, which will be trained again."""
    for entry in (*path.glob("samples/step-*.png"), *path.glob("evaluation/**/step-*"), *path.glob(_AVERAGES)):
        number = entry.stem.removeprefix("step-")
        if number.isdigit() and int(number) > step:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
