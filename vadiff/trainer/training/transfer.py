"""Initial weights from another run, `--transfer`: the averaged weights of its latest checkpoint."""

import sys
from pathlib import Path

import torch

from ...errors import RunError
from ...models import Denoiser, normalize_weights
from ..config import TrainConfig
from .run import Run, open_run

_NAMED = 4  # tensors that a message names


def transfer(config: TrainConfig, denoiser: Denoiser, *, progress: bool = False) -> Run | None:
    """Start a denoiser from the run that the config names.

    Args:
        config: of the run that starts.
        denoiser: its weights change.
        progress: print what was copied.

    Returns:
        The other run, or None where the config names none.

    Raises:
        RunError: not a run directory, or one whose network is of another kind or predicts something else.
        CheckpointError: it has no checkpoint, or a corrupt one.
    """
    if config.transfer is None:
        return None
    run = _source_of(config)
    told = _start_from(run, denoiser)
    if progress:
        print(told, file=sys.stderr)
    return run


def _source_of(config: TrainConfig) -> Run:
    """The run that the config's `transfer` names, checked."""
    run = open_run(Path(str(config.transfer)))
    mine, others = config.form(), run.config.form()
    for name, value, other in (
        ("model", config.model, run.config.model),
        ("process", config.process, run.config.process),
        ("prediction", mine.prediction, others.prediction),
    ):
        if value != other:
            raise RunError(
                f"transfer is {run.path}, whose {name} is {other}, expected {value}: that of the run that starts from "
                f"it. Give --{name} {other.replace('_', '-')}, or another run"
            )
    return run


@torch.no_grad()
def _start_from(run: Run, denoiser: Denoiser) -> str:
    """Copy the averaged weights of a run's latest checkpoint, where name and shape are the same.

    Returns:
        One line: what was copied, and which tensors start as they were, as those of another number of classes do.

    Raises as `transfer`; also RunError if no tensor is the same.
    """
    step, _ = run.fingerprint()
    theirs, mine = run.denoiser(step=step).state_dict(), denoiser.state_dict()
    same = {name: value for name, value in theirs.items() if name in mine and mine[name].shape == value.shape}
    afresh = [name for name in mine if name not in same]
    if not same:
        raise RunError(
            f"transfer is {run.path}, and none of the {len(mine)} tensors of the network has the name and shape of one "
            "there: give the run's own --channels and --layers-per-block"
        )
    denoiser.load_state_dict(same, strict=False)
    if run.config.model == "edm2":
        normalize_weights(denoiser)  # as after each step; files of others, and averages, have other magnitudes
    names = ", ".join(afresh[:_NAMED]) + (f" and {len(afresh) - _NAMED} more" if len(afresh) > _NAMED else "")
    rest = f"; initialised anew: {names}" if afresh else ""
    return f"Weights: averages of step {step} of {run.path}, {len(same)} of {len(mine)} tensors{rest}"
