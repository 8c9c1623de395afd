"""Post-hoc averages of a run's weights, of any width, made from its snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ...ema import reconstruct, times_saved
from ...ema.archive import write_archive
from ...errors import CheckpointError
from ...models.edm2 import with_null_class
from .averages import PREFIX, SNAPSHOTS, average_file
from .checkpoint import load_checkpoint
from .held_out import HeldOutLoss, held_out_loss_of_run
from .run import Run

_CLASSES = "network.class_embedding.weight"  # of EDM2's network, in a denoiser's state


def write_averages(run: Run, sigma_rel: Sequence[float], step: int | None = None) -> dict[float, Path]:
    """Reconstruct the averaged weights of the given widths, and write each to a file of the run.

    Args:
        run: trained with `sigma_rel` in its config.
        sigma_rel: the widths.
        step: of a snapshot; None is the latest.

    Returns:
        The file of each width.

    Raises:
        CheckpointError: snapshots or checkpoint (of that step) are missing or corrupt, or a file cannot be written.
        ValueError: a width not above 0 and below 0.2887.
    """
    snapshots = run.path / SNAPSHOTS
    saved = times_saved(snapshots)
    if not saved:
        raise CheckpointError(f"{run.path} has no snapshots of averages: train with --sigma-rel 0.05,0.1")
    step = int(saved[-1]) if step is None else step
    states = reconstruct(snapshots, sigma_rel, step)
    about = {name: value for name, value in load_checkpoint(run.path).items() if name in ("image_shape", "classes")}
    files = {width: average_file(run.path, step, width) for width in states}
    for width, state in states.items():
        if run.is_imported and (weight := state.get(_CLASSES)) is not None:
            # Its last column is the RMS of the others, and a mean of RMS is not the RMS of a mean.
            state[_CLASSES] = with_null_class(weight[:, :-1])
        write_archive(files[width], {**about, "step": step, "sigma_rel": width, "ema": state})
    return files


def held_out_of_averages(
    run: Run, sigma_rel: Sequence[float], step: int, device: torch.device
) -> tuple[dict[float, HeldOutLoss], dict[str, HeldOutLoss]]:
    """The held-out loss, measured as the run's config says, of averages that `write_averages` made.

    Returns:
        The loss of each width, and of "ema" and "raw" if there is a checkpoint of that step.

    Raises:
        DataError: the data set is missing.
    """
    images = run.images()
    names = {width: f"{PREFIX}{width:g}" for width in sigma_rel}
    others = ("ema", "raw") if step in run.checkpoints() else ()
    found = {
        name: held_out_loss_of_run(run.config, images, run.denoiser(name, step, device), progress=True)
        for name in (*names.values(), *others)
    }
    return {width: found[name] for width, name in names.items()}, {name: found[name] for name in others}
