"""The x0 errors that a run's levels are placed by: of another run or of a validation, and copied into its folder."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import RunError
from ...information import Profile
from ...validation import LevelLosses
from ..config import TrainConfig
from .assembly import saved_criterion
from .checkpoint import load_checkpoint

PROFILE_FILE = "profile.csv"  # in a run directory: copy of the errors that the config names
_SIGMA_DATA = re.compile(r"sigma_data (\S+)$")  # as `vadiff validate` notes it with the draws


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
            return profile_of_run(TrainConfig.load(source / "config.yaml"), source)
        return _of_csv(source)
    except (OSError, ValueError) as error:
        raise RunError(
            f"profile is {config.profile}, of which no x0 errors can be read: {error}. Give the directory of a run, or "
            "a CSV that `vadiff validate --csv` wrote"
        ) from error


def profile_of_run(config: TrainConfig, path: Path, step: int | None = None) -> Profile:
    """The errors that a checkpoint's statistics hold, at most sigma_data²: see `Run.profile`, also for its errors."""
    criterion = saved_criterion(config, path, load_checkpoint(path, step))
    found = Profile.of_criterion(criterion, config.form().prediction, sigma_data=config.sigma_data)
    return found.bounded(config.sigma_data)


def _of_csv(path: Path) -> Profile:
    """Of EDM's losses per level, as `vadiff validate` measures them of any run, or of x0 errors."""
    if "x0_error" in path.read_text().partition("\n")[0].split(","):
        return Profile.load(path)
    losses = LevelLosses.load(path)
    sigma_data = _SIGMA_DATA.search(losses.draws)
    if sigma_data is None:
        raise ValueError("its losses are not those of a run, so that it is unknown of what: give log_snr,x0_error")
    return Profile.of_losses(losses, "edm", sigma_data=float(sigma_data[1]))
