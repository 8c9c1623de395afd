"""HF Accelerate: a criterion that is saved and restored with the run, and whose statistics are logged.

criterion = prepare(accelerator, vadiff.DiffusionLoss())     # once, after accelerator.prepare(model, ...)
log_statistics(accelerator, criterion, global_step)          # in the loop, where loss is logged
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..files import replacing
from ..loss import DiffusionLoss

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["log_statistics", "prepare", "unwrap"]

_prepared: WeakKeyDictionary[Accelerator, list[DiffusionLoss]] = WeakKeyDictionary()


def prepare(accelerator: Accelerator, criterion: DiffusionLoss) -> Any:
    """Move the criterion to the accelerator's device and make it part of `save_state` and `load_state`.

    Its state is a file of its own in the folder, `vadiff_criterion.pt`: neither a model, which the hooks of diffusers'
    scripts would save as one of theirs, nor a custom object, whose number Accelerate compares on loading. A folder from
    before the criterion was added is loaded by one with ``fresh_statistics=True``.

    A criterion with parameters of its own (`weighting.LearnedUncertainty`) is wrapped on several processes, so that its
    gradient is averaged: call the returned one, and give its parameters to the optimizer as well.

    Statistics of several processes are merged by the criterion itself, so each has to call it equally often. With
    gradient accumulation each micro-batch is one call, and `half_life` counts samples: nothing needs to be set.

    Args:
        accelerator: before `load_state` is called.
        criterion: a `DiffusionLoss`.

    Returns:
        The criterion to call.

    Raises:
        TypeError: not a `DiffusionLoss`.
        RuntimeError: from `load_state`, if the folder has no statistics, or some that do not fit.
    """
    if not isinstance(criterion, DiffusionLoss):
        raise TypeError(f"criterion is a {type(criterion).__name__}, expected a vadiff.DiffusionLoss")
    criterion.to(accelerator.device)
    earlier = _prepared.setdefault(accelerator, [])
    name = f"vadiff_criterion_{len(earlier)}.pt" if earlier else "vadiff_criterion.pt"
    earlier.append(criterion)

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        each_node = accelerator.project_configuration.save_on_each_node
        if accelerator.is_local_main_process if each_node else accelerator.is_main_process:
            with replacing(Path(folder, name)) as partial:
                torch.save(criterion.state_dict(), partial)

    def load(models: list[nn.Module], folder: str) -> None:
        path = Path(folder, name)
        if not path.exists():
            _refuse_older(Path(folder), name)
        criterion.load_state_dict(torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {})

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    if accelerator.num_processes > 1 and any(parameter.requires_grad for parameter in criterion.parameters()):
        # Without its buffers: the criterion merges the statistics itself.
        return nn.parallel.DistributedDataParallel(criterion, broadcast_buffers=False)
    return criterion


def log_statistics(accelerator: Accelerator, criterion: nn.Module, step: int, every: int = 100, **options: Any) -> None:
    """Log the statistics to the accelerator's trackers every `every` optimiser steps, from the main process.

    Call it in each step, on all processes. It does nothing in other steps, or in micro-batches that only accumulate
    gradients.

    Args:
        accelerator: with trackers, see `accelerator.init_trackers`.
        criterion: what `prepare` returned.
        step: optimiser steps so far.
        every: optimiser steps between records; reading the statistics synchronises with the GPU.
        options: of `DiffusionLoss.log_to`.

    Raises:
        ValueError: every is not positive.
    """
    if every < 1:
        raise ValueError(f"every is {every!r}, expected a positive integer")
    if step % every == 0 and accelerator.sync_gradients and accelerator.is_main_process:
        unwrap(criterion).log_to(accelerator, step, **options)


def unwrap(criterion: nn.Module) -> DiffusionLoss:
    """The criterion inside the wrappers of `accelerator.prepare`, for `statistics` and `plot`.

    Not for `reweight` with a learned weighting on several processes: DistributedDataParallel averages only the
    gradients of its own forward, and the heads of the processes would diverge.
    """
    while not isinstance(criterion, DiffusionLoss):
        inner = getattr(criterion, "module", None)
        if not isinstance(inner, nn.Module):
            raise TypeError(
                f"criterion is a {type(criterion).__name__}, expected a vadiff.DiffusionLoss, or one wrapped"
            )
        criterion = inner
    return criterion


def _refuse_older(folder: Path, name: str) -> None:
    """Raise if an earlier vadiff saved the statistics here, as one of Accelerate's custom objects."""
    for path in sorted(folder.glob("custom_checkpoint_*.pkl")):
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # an object of another kind
            continue
        if isinstance(saved, dict) and "statistics.state" in saved:
            raise RuntimeError(
                f"{path} has the statistics of an earlier version of vadiff, expected {name}: rename the file to that"
            )
