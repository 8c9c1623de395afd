"""HF diffusers: log-SNR from the scheduler, replacements for the losses of its scripts, and steps for its pipelines.

The line to change in train_text_to_image.py, train_text_to_image_lora.py and similar scripts:

    loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")                    # before
    loss = criterion(model_pred.float(), target.float(), log_snr_of(noise_scheduler, timesteps))  # after

Nothing here imports diffusers: `vadiff.schedulers` reads the scheduler's tables.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import weighting
from ..information import BaseWeight, Profile
from ..loss import DiffusionLoss
from ..sampling import noise_levels
from ..schedulers import (
    coefficients_at,
    coefficients_of,
    log_snr_of,
    log_snr_range_of,
    loss_form_of,
    prediction_type_of,
    sigma_data_of,
    sigma_of,
    timesteps_of,
)
from .form import require_form

__all__ = [
    "coefficients_of",
    "log_snr_of",
    "loss_form_of",
    "per_sample",
    "prediction_type_of",
    "prior_preservation_loss",
    "reweight_elements",
    "scheduler_loss",
    "sigma_of",
    "sigmas_for",
    "snr_gamma_weight",
    "timesteps_for",
    "timesteps_of",
]


def scheduler_loss(
    criterion: DiffusionLoss,
    scheduler: Any,
    model_pred: Tensor,
    clean: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    *,
    snr_gamma: float | None = None,
    prediction_type: str | None = None,
    base_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The whole loss in one call: target, log-SNR and Min-SNR weights, by the scheduler's prediction type.

    Neither the target nor `get_velocity` is computed: the residual a·output + b·x0 + c·eps is formed while the data is
    read. For EDM schedulers `model_pred` is the raw output of the network, before `precondition_outputs`,
    and the loss is that of the denoised image, as in `--do_edm_style_training`.

    Args:
        criterion: on the device of `model_pred`. A weighting that depends on the prediction type must have this one
            (`DiffusionLoss.for_process(scheduler, weighting="min_snr")` gives it).
        scheduler, timesteps: as given to `scheduler.add_noise`; [B].
        model_pred: what the network returned, [B, ...].
        clean: latents or images without noise, [B, ...].
        noise: the added noise, [B, ...].
        snr_gamma: Min-SNR's gamma, as `--snr_gamma`; part of the base loss. None: no Min-SNR weight.
        prediction_type: of the network, if not the scheduler's.
        base_weight, sample_weight [B], reduction: as for `DiffusionLoss.forward`.

    Returns:
        The loss, a float32 scalar; [B] for reduction "none".

    Raises:
        ValueError, TypeError, IndexError: wrong shapes (including two timesteps for each sample, as in prior
            preservation); a fixed weighting written for another form of the loss than this one; or as
            `log_snr_of` and `prediction_type_of`.

    Example:
        >>> loss = scheduler_loss(
        ...     criterion, noise_scheduler, model_pred, latents, noise, timesteps, snr_gamma=5.0
        ... )
    """
    _check_batch_size("timesteps", timesteps, len(model_pred))
    form = _form_of(scheduler, prediction_type)
    require_form(criterion, form, sigma_data=sigma_data_of(scheduler))
    log_snr = log_snr_of(scheduler, timesteps)
    if snr_gamma is not None:
        weight = weighting.MinSNR(snr_gamma, prediction_type=form)(log_snr)
        base_weight = weight if base_weight is None else weight * base_weight
    return criterion(
        model_pred,
        clean,
        log_snr,
        noise=noise,
        coefficients=coefficients_at(scheduler, log_snr, prediction_type),
        base_weight=base_weight,
        sample_weight=sample_weight,
        reduction=reduction,
    )


def snr_gamma_weight(
    scheduler: Any, timesteps: Tensor, gamma: float = 5.0, prediction_type: str | None = None
) -> Tensor:
    """Min-SNR weights of `--snr_gamma`, exact for every form of the loss and at zero SNR.

    min(S, gamma)/S for epsilon, min(S, gamma)/(S + 1) for v, min(S, gamma) for sample, min(S, gamma)/(1 + √S)² for a
    flow, S = e**log_snr. Some of the scripts add 1 to the v weight, or 1 to S before the minimum, divide a sample loss
    by S, or give 0/0 at zero terminal SNR. Source: arXiv 2303.09556; `vadiff.weighting.MinSNR`.

    Args:
        scheduler, timesteps: as for `log_snr_of`.
        gamma: SNR at which the weight is capped.
        prediction_type: form of the loss; by default the scheduler's (`loss_form_of`).

    Returns:
        [B] float32; pass it as `base_weight=`. (To weight by Min-SNR alone, give the criterion `weighting.MinSNR`.)

    Raises as `log_snr_of` and `prediction_type_of`; ValueError for a gamma that is not positive.
    """
    form = _form_of(scheduler, prediction_type)
    return weighting.MinSNR(gamma, prediction_type=form)(log_snr_of(scheduler, timesteps))


def prior_preservation_loss(
    criterion: DiffusionLoss,
    model_pred: Tensor,
    target: Tensor,
    log_snr: Tensor,
    prior_loss_weight: float = 1.0,
    *,
    base_weight: Tensor | None = None,
) -> Tensor:
    """DreamBooth's mean over the instance half + prior_loss_weight · mean over the class half, in one call.

    Call it before `torch.chunk(model_pred, 2)`: all 2·B samples keep their own timestep, are recorded and weighted.

    Args:
        model_pred, target: [2·B, ...], instance images first.
        log_snr: [2·B].
        prior_loss_weight: as `--prior_loss_weight`.
        base_weight: [2·B], as for `DiffusionLoss.forward`.

    Raises:
        ValueError: an odd number of samples, or as `DiffusionLoss.forward`.
    """
    samples = len(model_pred)
    if samples % 2:
        raise ValueError(f"model_pred has {samples} samples, expected an even number: instance and class images")
    factor = torch.ones(samples, device=model_pred.device)
    factor[samples // 2 :] = prior_loss_weight
    return 2.0 * criterion(model_pred, target, log_snr, base_weight=base_weight, sample_weight=factor)


def reweight_elements(criterion: DiffusionLoss, loss: Tensor, log_snr: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Per-sample losses, recorded and weighted, of an element-wise loss that includes the trainer's weights.

    Args:
        loss: [B, ...], the trainer's own, multiplied by its weights of shape [B, 1, 1, 1] or [B, 1, 1, 1, 1], but not
            by its mask.
        log_snr: [B].
        mask: values 0 to 1 of a shape that broadcasts to `loss` with the whole batch, as [B, 1, H, W]. The statistics
            record the mean over the mask; the mean of a sample's mask is its sample weight.

    Returns:
        [B]; take the mean. With constant weighting the mean is `(loss * mask).mean()`.

    Raises:
        ValueError: a mask that has another batch or does not broadcast; or as `DiffusionLoss.reweight`.
    """
    if loss.dim() < 2:
        raise ValueError(f"loss has shape {tuple(loss.shape)}, expected (B, ...). Use criterion.reweight for (B,).")
    elements = tuple(range(1, loss.dim()))
    if mask is None:
        return criterion.reweight(loss.mean(elements), log_snr)
    same_batch = mask.dim() == loss.dim() and len(mask) == len(loss)
    if not same_batch or any(size not in (1, full) for size, full in zip(mask.shape, loss.shape, strict=True)):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, expected that of loss, {tuple(loss.shape)}, or 1 in place of any "
            "dimension but the first"
        )
    share = mask.expand_as(loss).float().mean(elements).detach()  # [B]
    masked = (loss * mask).mean(elements) / share.where(share != 0, 1.0)  # not 0/0, whose gradient would be NaN
    return criterion.reweight(masked, log_snr, share)


def per_sample(weight: Tensor | None, samples: int) -> Tensor | None:
    """A trainer's weight of shape [B], [B, 1, 1, 1] or [B, 1, 1, 1, 1] as [B] float32, for `base_weight=`.

    None, "no weights" in some trainers, is returned unchanged.

    Raises:
        ValueError: anything but one number per sample.
    """
    if weight is None:
        return None
    if weight.dim() == 0 or len(weight) != weight.numel():
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected ({samples},) or ({samples}, 1, ...): one number per "
            "sample. Weights that vary inside a sample go through reweight_elements."
        )
    _check_batch_size("weight", weight, samples)
    return weight.detach().flatten().float()


def sigmas_for(
    criterion: DiffusionLoss,
    scheduler: Any,
    steps: int,
    *,
    prediction_type: str | None = None,
    base_weight: BaseWeight | None = None,
    sigma_data: float = 1.0,
) -> list[float]:
    """Noise levels for a pipeline with Euler's method, placed by what the criterion recorded in training.

    Equal steps of the rescaled entropic time from the scheduler's highest noise level to its lowest, then 0: see
    `vadiff.sampling.noise_levels`. Copies the statistics to the host.

    Args:
        criterion: with the statistics of the network's training, of squared errors.
        scheduler: the pipeline's EulerDiscreteScheduler.
        steps: number of steps, at least 2: network calls of an image, twice that with guidance.
        prediction_type: form of the loss that was recorded, one of `vadiff.process.PREDICTION_TYPES`, if not the
            scheduler's (`loss_form_of`).
        base_weight: u of the training loop as a function of log-SNR, [B] → [B], if it had one.
        sigma_data: standard deviation of the images or latents that the network sees, or more. Errors are taken to be
            at most its square, see `Profile.bounded`.

    Returns:
        steps + 1 numbers, falling, the last 0: `pipeline(prompt, sigmas=...)`, `scheduler.set_timesteps(sigmas=...)`.

    Raises:
        TypeError: another scheduler.
        ValueError: too few statistics, or as `vadiff.information.Profile.of_criterion` and `noise_levels`.
    """
    _require_scheduler(scheduler, "EulerDiscreteScheduler", "sigmas")
    levels: list[float] = _levels_of(criterion, scheduler, steps, prediction_type, base_weight, sigma_data).tolist()
    return levels


def timesteps_for(
    criterion: DiffusionLoss,
    scheduler: Any,
    steps: int,
    *,
    prediction_type: str | None = None,
    base_weight: BaseWeight | None = None,
    sigma_data: float = 1.0,
) -> list[int]:
    """`sigmas_for` in timesteps, for a pipeline with DPM-Solver++: the nearest ones, all different.

    The levels are made for a solver of first order: compare them with the scheduler's own before using them.

    Args:
        scheduler: the pipeline's DPMSolverMultistepScheduler, without Karras or other sigmas of its own.
        criterion, steps, prediction_type, base_weight, sigma_data: as for `sigmas_for`.

    Returns:
        `steps` numbers, falling: `pipeline(prompt, timesteps=...)`, `scheduler.set_timesteps(timesteps=...)`.

    Raises:
        TypeError: another scheduler.
        ValueError: more steps than the scheduler has timesteps, or as for `sigmas_for`.
    """
    _require_scheduler(scheduler, "DPMSolverMultistepScheduler", "timesteps")
    last = len(scheduler.alphas_cumprod) - 1
    if steps > last + 1:
        raise ValueError(f"steps is {steps}, expected at most {last + 1}: the scheduler has no more timesteps")
    sigma = _levels_of(criterion, scheduler, steps, prediction_type, base_weight, sigma_data)[:-1]
    timesteps: list[int] = timesteps_of(scheduler, -2.0 * sigma.log()).tolist()
    for place in range(steps - 2, -1, -1):  # the lowest stays, the others make room
        timesteps[place] = max(timesteps[place], timesteps[place + 1] + 1)
    timesteps[0] = min(timesteps[0], last)
    for place in range(1, steps):
        timesteps[place] = min(timesteps[place], timesteps[place - 1] - 1)
    return timesteps


def _levels_of(
    criterion: DiffusionLoss, scheduler: Any, steps: int, prediction_type: str | None, base_weight: BaseWeight | None,
    sigma_data: float,
) -> Tensor:  # fmt: skip
    """Levels between the ends of the scheduler's own, by the recorded errors. [steps + 1] float64.

    sigma_data: that of images or latents, whose square bounds the errors; EDM's formula has the scheduler's own."""
    form = _form_of(scheduler, prediction_type)
    profile = Profile.of_criterion(criterion, form, sigma_data=sigma_data_of(scheduler), base_weight=base_weight)
    lowest, highest = log_snr_range_of(scheduler)
    limits = math.exp(-0.5 * highest), math.exp(-0.5 * lowest)
    return noise_levels(steps, *limits, profile=profile.bounded(sigma_data))


def _require_scheduler(scheduler: Any, name: str, argument: str) -> None:
    """Raise unless the scheduler is of the named class of diffusers, or made from it."""
    if name not in (base.__name__ for base in type(scheduler).__mro__):
        raise TypeError(
            f"scheduler is a {type(scheduler).__name__}, expected {name}, whose {argument}= takes the result. "
            "sigmas_for is for EulerDiscreteScheduler, timesteps_for for DPMSolverMultistepScheduler; for other "
            "samplers use vadiff.sampling.noise_levels(steps, profile=...)"
        )


def _form_of(scheduler: Any, prediction_type: str | None) -> str:
    """Form of the loss; "sample" for an EDM network."""
    if prediction_type is None:
        return loss_form_of(scheduler)
    return "sample" if prediction_type == "edm" else prediction_type


def _check_batch_size(name: str, values: Tensor, samples: int) -> None:
    if isinstance(values, Tensor) and values.dim() > 0 and len(values) != samples:
        advice = ""
        if len(values) == 2 * samples:
            advice = (
                f" With prior preservation the first half is that of the instance images: {name}.chunk(2)[0]; or "
                "prior_preservation_loss on the whole batch."
            )
        raise ValueError(f"{name} has {len(values)} entries, expected {samples}: one per sample.{advice}")
