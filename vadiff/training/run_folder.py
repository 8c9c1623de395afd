"""A run directory before the first step: made, replaced, or found fit to go on in."""

import dataclasses
import os
import shutil
from pathlib import Path

from ..errors import RunError
from . import post_hoc
from .assembly import TABLE_FILE, keep_table, read_table
from .checkpoint import FOLDER
from .config import TABLE, TrainConfig
from .post_hoc import SNAPSHOTS
from .run import CONFIG, METRICS

# What may differ when a run goes on: nothing that changes what it computes, but for `steps`, to train longer.
CHANGEABLE = {
    "steps", "data", "table", "device", "backend", "compile", "deterministic", "max_skipped_steps",
    "log_every", "tensorboard", "log_rms", "checkpoint_every", "keep_checkpoints", "samples_every", "sample_count",
    "snapshot_every", "snapshot_precision",
    "held_out_every", "held_out_images", "held_out_draws", "held_out_levels", "held_out_sigma",
}  # fmt: skip


def check(path: Path, config: TrainConfig, *, resume: bool, overwrite: bool) -> None:
    """Whether `path` can become, or go on as, the run directory of `config`; nothing is written.

    Raises:
        RunError: it is a file, or holds a run and neither `resume` nor `overwrite` is set, or a run of another config
            is to be resumed.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file, expected a folder")
    if not (path / CONFIG).exists():
        return
    if resume:
        _check_fits(path, config)
    elif not overwrite:
        raise RunError(f"{path} holds a run already: go on with --resume, replace it with --overwrite, or name another")


def begin(path: Path, config: TrainConfig, *, resume: bool) -> None:
    """Make `path` the run directory of `config`, after `check`: what is there of a run goes, unless it is resumed.

    Raises:
        RunError: the weight table that the config names is not there.
    """
    if not (resume and (path / CONFIG).exists()):
        table = read_table(config, None) if TABLE in (config.weighting, config.levels) else None
        _clear(path)
        path.mkdir(parents=True, exist_ok=True)
        if table is not None:
            keep_table(table, path)
    partial = path / f".{CONFIG}"
    config.save(partial)
    os.replace(partial, path / CONFIG)


def _check_fits(path: Path, config: TrainConfig) -> None:
    saved = TrainConfig.load(path / CONFIG)
    differing = [
        f"{field.name} was {getattr(saved, field.name)!r}, is {getattr(config, field.name)!r}"
        for field in dataclasses.fields(TrainConfig)
        if field.name not in CHANGEABLE and getattr(saved, field.name) != getattr(config, field.name)
    ]
    if differing:
        raise RunError(f"{path} cannot go on with another config: {'; '.join(differing)}")


def _clear(path: Path) -> None:
    """Remove what a run writes, and nothing else."""
    for name in (CONFIG, METRICS, TABLE_FILE, "report.html"):
        (path / name).unlink(missing_ok=True)
    for name in (FOLDER, SNAPSHOTS, post_hoc.FOLDER, "tensorboard", "samples"):
        if (path / name).is_dir():
            shutil.rmtree(path / name)
