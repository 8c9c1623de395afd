"""OneTrainer: adaptive weights in both of its losses, from one line before the trainer is made.

criterion = onetrainer.attach(vadiff.DiffusionLoss.for_process("flow", fine_tuning=True))
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._ranks import number_of_ranks
from ..log_snr import from_alphas_cumprod, from_flow_time
from ..loss import DiffusionLoss
from .form import moved_beside, require_form

__all__ = ["attach"]

_MIXIN = "modules.modelSetup.mixin.ModelSetupDiffusionLossMixin"


def attach(criterion: DiffusionLoss) -> DiffusionLoss:
    """Weight the per-sample losses of every OneTrainer model from now on, and record them.

    Replaces the methods `_diffusion_losses` and `_flow_matching_losses` of `ModelSetupDiffusionLossMixin` by ones that
    call them. What they compute, with OneTrainer's loss weight functions, masks and concepts' loss weights, is the base
    loss. Losses that require no grad (validation) are returned unchanged and not recorded. Call it again to attach
    another criterion.

    Args:
        criterion: for the process of the model that is trained; moved to the device of the loss.

    Returns:
        The criterion.

    Raises:
        TypeError: not a `DiffusionLoss`.
        ValueError: a learned weighting, whose parameters no optimizer of OneTrainer has.
        RuntimeError: in training, on several GPUs, whose other processes would not weight.
        ModuleNotFoundError: OneTrainer's folder is not the working directory, nor on `sys.path`.
    """
    if not isinstance(criterion, DiffusionLoss):
        raise TypeError(f"criterion is a {type(criterion).__name__}, expected a vadiff.DiffusionLoss")
    if any(True for _ in criterion.parameters()):
        raise ValueError(
            "criterion has parameters (a learned weighting), but OneTrainer's optimizer takes its model's only. "
            "Use weighting='loss_level', to which they converge."
        )
    try:
        mixin = importlib.import_module(_MIXIN).ModelSetupDiffusionLossMixin
    except ModuleNotFoundError as error:
        if error.name is None or not _MIXIN.startswith(error.name):
            raise
        raise ModuleNotFoundError(
            f"{_MIXIN} of OneTrainer is not found: run this in OneTrainer's folder, after its `script_imports()`",
            name=error.name,
        ) from error
    for name in ("_diffusion_losses", "_flow_matching_losses"):
        own = getattr(mixin, name)
        setattr(mixin, name, _weighted(criterion, getattr(own, "__wrapped__", own)))
    return criterion


def _weighted(criterion: DiffusionLoss, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(own)
    def losses(
        self: Any, batch: dict[str, Any], data: dict[str, Any], config: Any, train_device: Any, **tables: Any
    ) -> Tensor:
        loss = own(self, batch, data, config, train_device, **tables)  # [B]
        if not loss.requires_grad or "timestep" not in data:
            return loss
        _require_one_process()
        # By how the noise was added: Sana's is that of a flow, and its loss is computed by _diffusion_losses.
        flow = any(base.__name__ == "ModelSetupFlowMatchingMixin" for base in type(self).__mro__)
        log_snr = _log_snr_of_flow(data, **tables) if flow else _log_snr_of_diffusion(data, **tables)
        require_form(criterion, "flow" if flow else data.get("prediction_type", "epsilon"), loss_is_given=True)
        return moved_beside(criterion, loss).reweight(loss, log_snr.to(loss.device))

    return losses


def _require_one_process() -> None:
    ranks = number_of_ranks()
    if ranks > 1:
        raise RuntimeError(
            f"OneTrainer trains on {ranks} GPUs, expected one: it starts the other processes anew, in which no "
            "criterion is attached. Switch multi_gpu off."
        )


def _log_snr_of_flow(data: dict[str, Any], sigmas: Tensor | None = None, betas: Tensor | None = None) -> Tensor:
    """log-SNR [B] of whole timesteps, the first of which has sigma 1/T; the tables [T] give T only."""
    table = betas if sigmas is None else sigmas
    assert table is not None
    return from_flow_time((data["timestep"].double() + 1) / len(table)).float()


def _log_snr_of_diffusion(
    data: dict[str, Any],
    betas: Tensor | None = None,
    alphas_cumprod_fun: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """log-SNR [B] of whole timesteps with betas [T], or of times from 0 to 1 with ᾱ as a function."""
    timestep = data["timestep"]
    if alphas_cumprod_fun is not None:
        return torch.logit(alphas_cumprod_fun(timestep, 1).double()).float()
    assert betas is not None
    table = torch.cumprod(1 - betas.double(), 0).to(timestep.device)
    return from_alphas_cumprod(table, timestep).float()
