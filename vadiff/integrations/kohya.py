"""kohya's sd-scripts and similar trainers: a mixin for `NetworkTrainer`, and its `post_process_loss` hook.

At the end of train_network.py, sdxl_train_network.py, flux_train_network.py, ...:

    class Trainer(kohya.AdaptiveLoss, NetworkTrainer):
        criterion = vadiff.DiffusionLoss.for_process("stable_diffusion", fine_tuning=True)

and `trainer = Trainer()` in place of `NetworkTrainer()`. The trainer's own flags (`--min_snr_gamma`,
`--debiased_estimation_loss`, `--weighting_scheme`, masks, data-set weights) stay in effect: they are the base loss.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..log_snr import from_alphas_cumprod
from ..loss import DiffusionLoss
from ..schedulers import is_flow, log_snr_of, loss_form_of
from ..weighting import SNRWeighting, UnknownForm
from .form import moved_beside, require_form

__all__ = ["AdaptiveLoss", "post_process_loss", "refresh_all_snr"]

_LEAST_SNR = 2.0**-24  # in place of 0, as diffusers' EulerDiscreteScheduler has it: 0/0 would be NaN


def post_process_loss(
    criterion: DiffusionLoss,
    loss: Tensor,
    args: Any,
    timesteps: Tensor,
    noise_scheduler: Any,
    *,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """kohya's hook of this name, as `functools.partial(post_process_loss, criterion)`: weight per-sample losses.

    Losses that require no grad (kohya validates through the same hook) are returned unchanged and not recorded, so that
    validation losses stay comparable over the run.

    Args:
        criterion: moved to the device of the loss.
        loss: [B], already multiplied by the trainer's weights, masked and averaged over the sample. Multiply by weights
            of shape [B, 1, 1, 1] or [B, 1, 1, 1, 1] before averaging.
        args: the trainer's; its `v_parameterization` determines the form of the loss.
        timesteps: [B], integers for a DDPM scheduler; for a flow 1000·sigma, also rounded down to integers
            (HunyuanImage), whose middle, half a step higher, then stands for the noise level. Times from 0 to 1 (Anima)
            have to be multiplied by 1000 before.
        noise_scheduler: see `vadiff.schedulers`. Its cached `all_snr` is not used.
        sample_weight: [B], a factor in `loss` that is not part of the objective (share of a mask,
            `batch["loss_weights"]`); the statistics exclude it.

    Returns:
        [B]; take its mean.

    Raises:
        ValueError, TypeError, IndexError: a fixed weighting written for another prediction type than the trainer's;
            or as `DiffusionLoss.reweight` and `vadiff.schedulers.log_snr_of`.
    """
    if not loss.requires_grad:
        return loss
    if isinstance(criterion.weighting, (SNRWeighting, UnknownForm)):
        v_prediction = getattr(args, "v_parameterization", False)  # some versions do not set it in the scheduler
        require_form(criterion, "v_prediction" if v_prediction else loss_form_of(noise_scheduler), loss_is_given=True)
    criterion = moved_beside(criterion, loss)
    if not timesteps.is_floating_point() and is_flow(noise_scheduler):
        timesteps = timesteps + 0.5
    log_snr = log_snr_of(noise_scheduler, timesteps.to(loss.device, non_blocking=True))
    if sample_weight is None:
        return criterion.reweight(loss, log_snr)
    sample_weight = sample_weight.to(loss)
    return criterion.reweight(loss / sample_weight.where(sample_weight != 0, 1.0), log_snr, sample_weight)


def refresh_all_snr(noise_scheduler: Any) -> None:
    """Recompute `noise_scheduler.all_snr` from its current `alphas_cumprod`.

    The trainers compute it only before `--zero_terminal_snr` changes the schedule, so that `--min_snr_gamma` and
    similar flags use the old one. A zero becomes 2⁻²⁴, so that Min-SNR's weights are at their limits instead of 0/0.
    Does nothing to a scheduler without that table.
    """
    cached = getattr(noise_scheduler, "all_snr", None)
    if isinstance(cached, Tensor):
        table = noise_scheduler.alphas_cumprod
        every = torch.arange(len(table), device=table.device)
        snr = from_alphas_cumprod(table.double(), every).exp().clamp(min=_LEAST_SNR)
        noise_scheduler.all_snr = snr.to(cached.device, cached.dtype, non_blocking=True)


class AdaptiveLoss:
    """Mixin to list before `NetworkTrainer`, or a subclass of it, in a class with a `criterion`.

    The criterion's state is saved by `--save_state` and restored by `--resume`; its statistics are logged with the
    trainer's metrics.

    Attributes:
        criterion: a `DiffusionLoss`. Each trainer copies that of the class: `trainer.criterion` is the copy, and the
            criterion of the class records nothing.
        log_every: optimiser steps between records of the statistics.
    """

    criterion: DiffusionLoss
    log_every: int = 100

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise TypeError if the trainer is listed first: its methods would then run instead of these."""
        super().__init_subclass__(**kwargs)
        for before in cls.__mro__[: cls.__mro__.index(AdaptiveLoss)]:
            if not issubclass(before, AdaptiveLoss) and hasattr(before, "post_process_loss"):
                raise TypeError(
                    f"{cls.__name__} has {before.__name__} before AdaptiveLoss, which then does nothing. Use "
                    f"class {cls.__name__}(AdaptiveLoss, {before.__name__})."
                )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        shared = getattr(type(self), "criterion", None)
        if "criterion" not in vars(self) and isinstance(shared, DiffusionLoss):
            self.criterion = copy.deepcopy(shared)

    def post_process_network(self, args: Any, accelerator: Any, network: Any, text_encoders: Any, unet: Any) -> Any:
        """Register the criterion for saving; called once, before a state is resumed."""
        from .accelerate import prepare

        if not isinstance(getattr(self, "criterion", None), DiffusionLoss):
            raise TypeError(
                f"{type(self).__name__}.criterion is missing, expected a vadiff.DiffusionLoss. Use "
                "criterion = vadiff.DiffusionLoss.for_process(...) in the class."
            )
        if any(True for _ in self.criterion.parameters()):
            raise ValueError(
                "criterion has parameters (a learned weighting), but the trainer's optimizer takes its network's only. "
                "Use weighting='loss_level', to which they converge."
            )
        prepare(accelerator, self.criterion)
        return super().post_process_network(args, accelerator, network, text_encoders, unet)  # type: ignore[misc]

    def post_process_loss(self, loss: Tensor, args: Any, timesteps: Tensor, noise_scheduler: Any) -> Tensor:
        """Apply the trainer's own hook with the current schedule's SNR, then the criterion."""
        refresh_all_snr(noise_scheduler)
        loss = super().post_process_loss(loss, args, timesteps, noise_scheduler)  # type: ignore[misc]
        return post_process_loss(self.criterion, loss, args, timesteps, noise_scheduler)

    def step_logging(self, accelerator: Any, logs: dict[str, Any], global_step: int, epoch: int) -> None:
        """Log the trainer's metrics, every `log_every` steps with the statistics of each noise level."""
        if global_step % self.log_every == 0:
            self.criterion.log_to(lambda values, step: logs.update(values), global_step)
        super().step_logging(accelerator, logs, global_step, epoch)  # type: ignore[misc]
