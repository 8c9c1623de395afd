"""Mixins for the `NetworkTrainer` of sd-scripts and that of musubi-tuner, and their subclasses."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...schedulers import is_flow, loss_form_of
from .arguments import option
from .base import Adaptive
from .loss import post_process_loss, refresh_all_snr

_UNIT_TIMES = "AnimaNetworkTrainer"  # passes sigma, where the others pass 1000*sigma
_LOSS_OF_DATA = "Sd3NetworkTrainer"  # compares x0, where the other flows compare velocities
_CHECKED_SAMPLES = 64  # whose timesteps are looked at, for which the host waits for a GPU


class AdaptiveLoss(Adaptive):
    """Mixin to list before `NetworkTrainer`, or a subclass of it.

    The criterion's state is saved by `--save_state` and restored by `--resume`; its statistics are logged with the
    trainer's metrics.

    Attributes:
        criterion: a `DiffusionLoss`. Each trainer copies that of the class: `trainer.criterion` is the copy, and the
            criterion of the class records nothing. Without one the trainer makes it when training starts, from the
            options of `add_arguments` and the noise scheduler.
        log_every: optimiser steps between records of the statistics.
        fresh_statistics: whether `--resume` leaves the statistics empty: for a state that was saved without vadiff, or
            to start them anew. They are saved again from then on.
        refresh_snr: whether `--min_snr_gamma` and similar flags use the SNR of the schedule that `--zero_terminal_snr`
            has changed (`refresh_all_snr`). False leaves the trainer's loss what it is.
        unit_times: whether the trainer passes the times of a flow from 0 to 1 in place of 0 to 1000; None: those of
            `AnimaNetworkTrainer` alone. The first batches are checked.
        loss_form: form of the trainer's loss for a fixed weighting, one of `vadiff.process.PREDICTION_TYPES`; None:
            "sample" for `Sd3NetworkTrainer`, else that of the scheduler and `--v_parameterization`.
    """

    refresh_snr: bool = False
    unit_times: bool | None = None
    loss_form: str | None = None
    _samples_checked = 0
    _largest_time = 0.0  # of these samples
    _hook = "post_process_loss"

    def post_process_network(self, args: Any, accelerator: Any, network: Any, text_encoders: Any, unet: Any) -> Any:
        """Register the criterion for saving; called once, before a state is resumed."""
        self._register(accelerator)
        return super().post_process_network(args, accelerator, network, text_encoders, unet)  # type: ignore[misc]

    def _read_options(self, args: Any) -> None:
        super()._read_options(args)
        self.refresh_snr = self.refresh_snr or bool(option(args, "refresh_snr"))

    def _process_and_form(self, args: Any) -> tuple[Any, str]:
        scheduler = self.get_noise_scheduler(args, torch.device("cpu"))  # type: ignore[attr-defined]
        return "flow" if is_flow(scheduler) else scheduler, self._form(args, scheduler)

    def post_process_loss(self, loss: Tensor, args: Any, timesteps: Tensor, noise_scheduler: Any) -> Tensor:
        """Apply the trainer's own hook, then the criterion.

        Raises:
            ValueError: timesteps of a flow that are not of the kind `unit_times` says, in the first batches; or as
                `vadiff.integrations.kohya.post_process_loss`.
        """
        if self.refresh_snr:
            refresh_all_snr(noise_scheduler)
        loss = super().post_process_loss(loss, args, timesteps, noise_scheduler)  # type: ignore[misc]
        if not loss.requires_grad:
            return loss  # validation: neither weighted nor recorded
        if timesteps.is_floating_point() and is_flow(noise_scheduler):
            timesteps = self._flow_timesteps(timesteps, noise_scheduler.config.num_train_timesteps)
        return post_process_loss(
            self.criterion, loss, args, timesteps, noise_scheduler, loss_form=self._form(args, noise_scheduler)
        )

    def _form(self, args: Any, noise_scheduler: Any) -> str:
        if self.loss_form is not None:
            return self.loss_form
        if self._is(_LOSS_OF_DATA):
            return "sample"
        return "v_prediction" if getattr(args, "v_parameterization", False) else loss_form_of(noise_scheduler)

    def _flow_timesteps(self, timesteps: Tensor, steps: int) -> Tensor:
        """Times from 0 to `steps`, [B]; raises ValueError where they are of another kind than `unit_times` says."""
        unit = self._is(_UNIT_TIMES) if self.unit_times is None else self.unit_times
        if self._samples_checked < _CHECKED_SAMPLES:
            self._samples_checked += len(timesteps)
            self._largest_time = max(self._largest_time, timesteps.max().item())
            # One or two timesteps below 1 may be drawn, by chance; three are once in 10⁹ runs.
            if self._largest_time > 1 if unit else self._largest_time <= 1 and self._samples_checked >= 3:
                raise ValueError(
                    f"timesteps are at most {self._largest_time:g}, expected times from 0 to {1 if unit else steps}: "
                    f"{type(self).__name__} does not pass what unit_times={unit} says. Set unit_times = {not unit} in "
                    "the class."
                )
        return timesteps.float() * steps if unit else timesteps

    def _is(self, name: str) -> bool:
        return any(base.__name__ == name for base in type(self).__mro__)

    def step_logging(self, accelerator: Any, logs: dict[str, Any], global_step: int, epoch: int) -> None:
        """Log the trainer's metrics, once every `log_every` steps with the statistics of each noise level."""
        logs.update(self._statistics_at(global_step))
        super().step_logging(accelerator, logs, global_step, epoch)  # type: ignore[misc]


class MusubiAdaptiveLoss(Adaptive):
    """Mixin to list before a `NetworkTrainer` of musubi-tuner, or a subclass of it.

    Attributes `criterion`, `log_every` and `fresh_statistics` as of `AdaptiveLoss`. The trainer's own `compute_loss` is
    called for each sample, and so stays in effect with `--weighting_scheme` and whatever a subclass adds.
    """

    _hook = "compute_loss"
    _step = 0

    def _process_and_form(self, args: Any) -> tuple[Any, str]:
        return "flow", "flow"

    def resume_from_local_or_hf_if_specified(self, accelerator: Any, args: Any) -> Any:
        """Register the criterion for saving, then resume."""
        self._register(accelerator)
        return super().resume_from_local_or_hf_if_specified(accelerator, args)  # type: ignore[misc]

    def compute_loss(
        self,
        args: Any,
        output: Any,
        timesteps: Tensor,
        noise_scheduler: Any,
        dit_dtype: Any,
        network_dtype: Any,
        global_step: int,
    ) -> tuple[Tensor, dict[str, float]]:
        """Apply the trainer's own method to each sample, then the criterion.

        Args:
            output: `DiTOutput` of a batch; `extra` is the same for all samples.
            timesteps: [B], 1000·t, or with the samplings of t (all but "sigma") 1000·t + 1.

        Returns:
            The mean loss, and the means of the trainer's metrics.
        """
        self._step = global_step + 1  # as `extra_step_logs` counts
        losses, metrics = [], []
        for i in range(len(timesteps)):
            one = dataclasses.replace(output, pred=output.pred[i : i + 1], target=output.target[i : i + 1])
            loss, named = super().compute_loss(  # type: ignore[misc]
                args, one, timesteps[i : i + 1], noise_scheduler, dit_dtype, network_dtype, global_step
            )
            losses.append(loss.float())
            metrics.append(named)
        t = timesteps if args.timestep_sampling == "sigma" else timesteps - 1
        weighted = post_process_loss(self.criterion, torch.stack(losses), args, t, noise_scheduler)
        return weighted.mean(), {key: sum(named[key] for named in metrics) / len(metrics) for key in metrics[0]}

    def extra_step_logs(self, args: Any, logs: dict[str, Any]) -> dict[str, Any]:
        """Add the statistics of each noise level, once every `log_every` steps."""
        return {**super().extra_step_logs(args, logs), **self._statistics_at(self._step)}  # type: ignore[misc]
