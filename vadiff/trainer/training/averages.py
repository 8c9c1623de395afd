"""Files of the power-function averages of a run's weights.

snapshots/<n>.pt                        written by training, see `vadiff.ema`
ema/step-<n>/sigma-rel-<width>.pt       reconstructed from snapshots; `Run.denoiser(weights="ema-<width>")` opens it
"""

from pathlib import Path
from typing import Any

from ...ema.archive import read_archive
from ...errors import CheckpointError

SNAPSHOTS, FOLDER = "snapshots", "ema"
PREFIX = "ema-"  # of the names of weights: "ema-0.1"
_STEP, _FILE = "step-", "sigma-rel-"


def read_average(run: Path, weights: str, step: int | None = None) -> dict[str, Any]:
    """The file of "ema-<width>", with "ema", "image_shape" and "classes" as in a checkpoint.

    Raises:
        ValueError: not a width.
        CheckpointError: the file was not made yet, or is corrupt.
    """
    return read_archive(find_average(run, weights, step)[1])


def find_average(run: Path, weights: str, step: int | None = None) -> tuple[int, Path]:
    """Step and file of "ema-<width>", the latest that was made if `step` is None.

    Raises:
        ValueError: not a width.
        CheckpointError: the file was not made yet.
    """
    try:
        width = float(weights.removeprefix(PREFIX))
    except ValueError:
        raise ValueError(f"weights is {weights!r}, expected {PREFIX} and a width, e.g. {PREFIX}0.1") from None
    made = [int(folder.name.removeprefix(_STEP)) for folder in (run / FOLDER).glob(_STEP + "*")]
    steps = [made_at for made_at in made if average_file(run, made_at, width).exists() and step in (None, made_at)]
    if not steps:
        of_step, flag = ("", "") if step is None else (f" of step {step}", f" --step {step}")
        raise CheckpointError(
            f"{run} has no {weights}{of_step}: `vadiff ema {run} --sigma-rel {width:g}{flag}` makes it"
        )
    return max(steps), average_file(run, max(steps), width)


def average_file(run: Path, step: int, width: float) -> Path:
    """The file of the average of a width, made from the snapshots up to a step."""
    return run / FOLDER / f"{_STEP}{step}" / f"{_FILE}{width:g}.pt"
