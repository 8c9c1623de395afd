"""The x0 errors that a run's levels are placed by: of another run or of a validation, and copied into its folder."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import RunError
from ...information import Profile
from ..config import TrainConfig
from .assembly import saved_criterion
from .checkpoint import load_training

PROFILE_FILE = "profile.csv"  # in a run directory: copy of the errors that the config names
_SHOWN = 120  # characters of the columns of another file in an error
_SIGMA_DATA = re.compile(r"sigma_data (\S+)$")  # as `vadiff validate` notes it with the draws


class RecordedLosses(NamedTuple):
    """Losses per level of a file, in the form of the loop that wrote them."""

    log_snr: Tensor  # [L] float64
    loss: Tensor  # [L] float64
    sigma_data: float | None  # of EDM's losses, as `vadiff validate` measures them; None: of a form that is not named


def read_errors(path: Path) -> Profile | RecordedLosses:
    """Read CSV of x0 errors (log_snr, x0_error), or of losses (log_snr, loss, and how they were drawn).

    Raises:
        ValueError: it cannot be read, or is another file.
    """
    wanted = "expected CSV with the columns log_snr and x0_error, or log_snr and loss as `vadiff validate --csv` writes"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = reader.fieldnames or [], list(reader)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}), {wanted}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV ({error}), {wanted}") from error
    value = "x0_error" if "x0_error" in columns else "loss"
    if not {"log_snr", value} <= set(columns):
        found = ascii(", ".join(columns))[1:-1]
        raise ValueError(f"{path} has the columns {found[:_SHOWN] or '(none)'}, {wanted}")
    try:
        numbers = [[float(row[name]) for name in ("log_snr", value)] for row in rows]
        log_snr, values = torch.tensor(numbers, dtype=torch.float64).reshape(-1, 2).unbind(1)
        profile = Profile(log_snr, values)  # positive losses at different levels, as errors are
    except (TypeError, ValueError) as error:
        raise ValueError(f"the column log_snr or {value} of {path} has an unexpected value: {error}") from error
    if value == "x0_error":
        return profile
    note = _SIGMA_DATA.search(rows[0].get("draws") or "")
    return RecordedLosses(log_snr, values, None if note is None else float(note[1]))


def read_profile(config: TrainConfig, run: Path | None) -> Profile | None:
    """The errors of a config: the copy in the run's folder, or else those of the run or CSV that it names.

    None where its levels are not placed by such errors.

    Raises:
        CheckpointError: the other run has no intact checkpoint.
        RunError: there is no such file, or it holds no errors; or the other run has too few samples.
    """
    if config.levels != "information" or config.profile is None:
        return None
    copy = None if run is None else run / PROFILE_FILE
    try:
        if copy is not None and copy.exists():
            return Profile.load(copy)
        source = Path(config.profile)
        if source.is_dir():
            found = profile_of_run(TrainConfig.load(source / "config.yaml"), source)
            return found.bounded(config.sigma_data)
        return _of_csv(source)
    except (OSError, ValueError) as error:
        raise RunError(
            f"profile is {config.profile}, of which no x0 errors can be read: {error}. Give the directory of a run, or "
            "a CSV that `vadiff validate --csv` wrote"
        ) from error


def profile_of_run(config: TrainConfig, path: Path, step: int | None = None) -> Profile:
    """The errors that a checkpoint's statistics hold: see `Run.profile`, also for its errors."""
    criterion = saved_criterion(config, path, load_training(path, step))
    return Profile.of_criterion(criterion, config.form().prediction, sigma_data=config.sigma_data)


def _of_csv(path: Path) -> Profile:
    """Of EDM's losses per level, as `vadiff validate` measures them of any run, or of x0 errors."""
    found = read_errors(path)
    if isinstance(found, Profile):
        return found
    if found.sigma_data is None:
        raise ValueError("its losses are not those of a run, so that it is unknown of what: give log_snr,x0_error")
    return Profile.of_losses(found, "edm", sigma_data=found.sigma_data)
