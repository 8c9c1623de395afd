"""kohya's sd-scripts and what is built like them: a mixin for `NetworkTrainer`, and the `post_process_loss` slot.

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
from ..schedulers import log_snr_of, loss_form_of
from ..weighting import SNRWeighting
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
    """`functools.partial(post_process_loss, criterion)` is kohya's slot: per-sample losses in, per-sample losses out.

    Losses that nothing is to be trained on (kohya validates through the same slot) come back as they are and are not
    recorded, so that validation curves compare over the run.

    Args:
        criterion: is put on the device of the loss.
        loss: [B], already times what the trainer weighs by, masked and averaged over the sample. Where those weights
            have shape [B, 1, 1, 1] or [B, 1, 1, 1, 1], multiply before averaging.
        args: the trainer's; its `v_parameterization` says what the loss is written in.
        timesteps: [B], integers for a DDPM scheduler, values of its `timesteps` for a flow.
        noise_scheduler: see `vadiff.schedulers`. Its cached `all_snr` is not used.
        sample_weight: [B], a factor in `loss` that is no part of the objective at a noise level (share of a mask,
            `batch["loss_weights"]`), to keep it out of the statistics.

    Returns:
        [B]; take its mean.

    Raises:
        ValueError, TypeError, IndexError: a fixed weighting written for another prediction type than the trainer's;
            or as `DiffusionLoss.reweight` and `vadiff.schedulers.log_snr_of`.
    """
    if not loss.requires_grad:
        return loss
    if isinstance(criterion.weighting, SNRWeighting):
        v_prediction = getattr(args, "v_parameterization", False)  # the scheduler is not told in all versions
        require_form(criterion, "v_prediction" if v_prediction else loss_form_of(noise_scheduler), loss_is_given=True)
    criterion = moved_beside(criterion, loss)
    log_snr = log_snr_of(noise_scheduler, timesteps.to(loss.device, non_blocking=True))
    if sample_weight is None:
        return criterion.reweight(loss, log_snr)
    sample_weight = sample_weight.to(loss)
    return criterion.reweight(loss / sample_weight.where(sample_weight != 0, 1.0), log_snr, sample_weight)


def refresh_all_snr(noise_scheduler: Any) -> None:
    """Make `noise_scheduler.all_snr` that of its present `alphas_cumprod`.

    The trainers fill it before `--zero_terminal_snr` changes the schedule and never again, so that `--min_snr_gamma`
    and its kin weigh by the old one. A zero becomes 2⁻²⁴: Min-SNR's weights are at their limits there, instead of 0/0.
    Does nothing to a scheduler that has no such table.
    """
    cached = getattr(noise_scheduler, "all_snr", None)
    if isinstance(cached, Tensor):
        table = noise_scheduler.alphas_cumprod
        every = torch.arange(len(table), device=table.device)
        snr = from_alphas_cumprod(table.double(), every).exp().clamp(min=_LEAST_SNR)
        noise_scheduler.all_snr = snr.to(cached.device, cached.dtype, non_blocking=True)


class AdaptiveLoss:
    """To be named before `NetworkTrainer`, or a subclass of it, in a class statement, with a `criterion`.

    The criterion's state is in `--save_state` and comes back with `--resume`; its statistics are logged with the
    trainer's numbers.

    Attributes:
        criterion: a `DiffusionLoss`. What the class has is what each trainer starts with a copy of: `trainer.criterion`
            is its own, and that of the class records nothing.
        log_every: optimiser steps from one record of the statistics to the next.
    """

    criterion: DiffusionLoss
    log_every: int = 100

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raises TypeError where the trainer is named first, whose methods would then run and these never."""
        super().__init_subclass__(**kwargs)
        for before in cls.__mro__[: cls.__mro__.index(AdaptiveLoss)]:
            if not issubclass(before, AdaptiveLoss) and hasattr(before, "post_process_loss"):
                raise TypeError(
                    f"{cls.__name__} has {before.__name__} before AdaptiveLoss, which then does nothing. Use "
                    f"class {cls.__name__}(AdaptiveLoss, {before.__name__})."
                )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        common = getattr(type(self), "criterion", None)
        if "criterion" not in vars(self) and isinstance(common, DiffusionLoss):
            self.criterion = copy.deepcopy(common)

    def post_process_network(self, args: Any, accelerator: Any, network: Any, text_encoders: Any, unet: Any) -> Any:
        """Called once, before a state is resumed: the criterion joins what is saved."""
        from .accelerate import prepare

        if not isinstance(getattr(self, "criterion", None), DiffusionLoss):
            raise TypeError(
                f"{type(self).__name__}.criterion is missing, expected a vadiff.DiffusionLoss. Use "
                "criterion = vadiff.DiffusionLoss.for_process(...) in the class."
            )
        if any(True for _ in self.criterion.parameters()):
            raise ValueError(
                "criterion has parameters (a learned weighting), and the trainer's optimizer takes its network's only. "
                "Use weighting='loss_level', what they converge to."
            )
        prepare(accelerator, self.criterion)
        return super().post_process_network(args, accelerator, network, text_encoders, unet)  # type: ignore[misc]

    def post_process_loss(self, loss: Tensor, args: Any, timesteps: Tensor, noise_scheduler: Any) -> Tensor:
        """The trainer's own, with the present schedule's SNR; then the weighting."""
        refresh_all_snr(noise_scheduler)
        loss = super().post_process_loss(loss, args, timesteps, noise_scheduler)  # type: ignore[misc]
        return post_process_loss(self.criterion, loss, args, timesteps, noise_scheduler)

    def step_logging(self, accelerator: Any, logs: dict[str, Any], global_step: int, epoch: int) -> None:
        """The trainer's numbers, now and then with the statistics of each noise level beside them."""
        if global_step % self.log_every == 0:
            self.criterion.log_to(lambda values, step: logs.update(values), global_step)
        super().step_logging(accelerator, logs, global_step, epoch)  # type: ignore[misc]
