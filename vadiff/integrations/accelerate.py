"""HF Accelerate: a criterion that is saved and restored with the run, and whose statistics are logged.

criterion = prepare(accelerator, vadiff.DiffusionLoss())     # once, after accelerator.prepare(model, ...)
log_statistics(accelerator, criterion, global_step)          # in the loop, where loss is logged
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..loss import DiffusionLoss

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["log_statistics", "prepare", "unwrap"]


def prepare(accelerator: Accelerator, criterion: DiffusionLoss) -> Any:
    """Move the criterion to the accelerator's device and make it part of `save_state` and `load_state`.

    A criterion without parameters is registered for checkpointing, under every launcher, and returned unchanged.
    One with parameters of its own (`weighting.LearnedUncertainty`) goes through `accelerator.prepare`: it is then
    saved as a model and, on several processes, wrapped, so that its gradient is averaged. Use the returned one, and
    give its parameters to the optimizer as well.

    Statistics of several processes are merged by the criterion itself, so each has to call it equally often. With
    gradient accumulation each micro-batch is one call, and `half_life` counts samples: nothing needs to be set.

    Args:
        accelerator: before `load_state` is called.
        criterion: a `DiffusionLoss`.

    Returns:
        The criterion to call.

    Raises:
        TypeError: not a `DiffusionLoss`.
    """
    if not isinstance(criterion, DiffusionLoss):
        raise TypeError(f"criterion is a {type(criterion).__name__}, expected a vadiff.DiffusionLoss")
    if any(parameter.requires_grad for parameter in criterion.parameters()):
        return accelerator.prepare(criterion)
    criterion.to(accelerator.device)
    accelerator.register_for_checkpointing(criterion)
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
