"""The hook `post_process_loss` of kohya's trainers as a function, and their table of SNR."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...log_snr import from_alphas_cumprod
from ...loss import DiffusionLoss
from ...schedulers import is_flow, log_snr_of, loss_form_of
from ...weighting import SNRWeighting, UnknownForm
from ..form import moved_beside, require_form

_LEAST_SNR = 2.0**-24  # in place of 0, as diffusers' EulerDiscreteScheduler has it: 0/0 would be NaN


def post_process_loss(
    criterion: DiffusionLoss,
    loss: Tensor,
    args: Any,
    timesteps: Tensor,
    noise_scheduler: Any,
    *,
    sample_weight: Tensor | None = None,
    loss_form: str | None = None,
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
        loss_form: form of the loss, one of `vadiff.process.PREDICTION_TYPES`, for a fixed weighting; None: that of
            `args` and the scheduler.

    Returns:
        [B]; take its mean.

    Raises:
        ValueError, TypeError, IndexError: a fixed weighting written for another prediction type than the trainer's;
            or as `DiffusionLoss.reweight` and `vadiff.schedulers.log_snr_of`.
    """
    if not loss.requires_grad:
        return loss
    if isinstance(criterion.weighting, (SNRWeighting, UnknownForm)):
        if loss_form is None:
            v_prediction = getattr(args, "v_parameterization", False)  # some versions do not set it in the scheduler
            loss_form = "v_prediction" if v_prediction else loss_form_of(noise_scheduler)
        require_form(criterion, loss_form, loss_is_given=True)
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

    sd-scripts' trainers compute it only before `--zero_terminal_snr` changes the schedule, so that `--min_snr_gamma`
    and similar flags use the old one. A zero becomes 2⁻²⁴, so that Min-SNR's weights are at their limits, not 0/0.
    Does nothing to a scheduler without that table.
    """
    cached = getattr(noise_scheduler, "all_snr", None)
    if isinstance(cached, Tensor):
        table = noise_scheduler.alphas_cumprod
        every = torch.arange(len(table), device=table.device)
        snr = from_alphas_cumprod(table.double(), every).exp().clamp(min=_LEAST_SNR)
        noise_scheduler.all_snr = snr.to(cached.device, cached.dtype, non_blocking=True)
