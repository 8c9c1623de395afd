"""A mixin for sd-scripts' `NetworkTrainer` and its subclasses."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...loss import DiffusionLoss
from ...schedulers import is_flow, loss_form_of
from ..accelerate import prepare
from .arguments import criterion_for, given, option
from .loss import post_process_loss, refresh_all_snr

_UNIT_TIMES = "AnimaNetworkTrainer"  # passes sigma, where the others pass 1000*sigma
_LOSS_OF_DATA = "Sd3NetworkTrainer"  # compares x0, where the other flows compare velocities
_CHECKED_SAMPLES = 64  # whose timesteps are looked at, for which the host waits for a GPU


class AdaptiveLoss:
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

    criterion: DiffusionLoss
    log_every: int = 100
    fresh_statistics: bool = False
    refresh_snr: bool = False
    unit_times: bool | None = None
    loss_form: str | None = None
    _logged_at = 0  # optimiser step of the last record: the scripts log several times at a step
    _samples_checked = 0
    _largest_time = 0.0  # of these samples

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

    def train(self, args: Any) -> Any:
        """Read the options of `add_arguments`, then train.

        Raises:
            ValueError: options of the criterion with a criterion in the class, or as `DiffusionLoss`; a learned
                weighting, which the trainer's optimizer does not train.
            TypeError: the class's criterion is not a `DiffusionLoss`.
        """
        self._read_options(args)
        return super().train(args)  # type: ignore[misc]

    def post_process_network(self, args: Any, accelerator: Any, network: Any, text_encoders: Any, unet: Any) -> Any:
        """Register the criterion for saving; called once, before a state is resumed."""
        if self.fresh_statistics:
            _register_without_loading(accelerator, self.criterion)
        else:
            prepare(accelerator, self.criterion)
            accelerator.register_load_state_pre_hook(_require_statistics)
        bins = self.criterion.statistics.bins
        accelerator.print(
            f"vadiff: {self.criterion.weighting}, {bins.size} bins of log-SNR from {bins.low:g} to {bins.high:g}"
        )
        return super().post_process_network(args, accelerator, network, text_encoders, unet)  # type: ignore[misc]

    def _read_options(self, args: Any) -> None:
        """Make the criterion where there is none, and take the other options that were given."""
        criterion = getattr(self, "criterion", None)
        name = type(self).__name__
        if criterion is None:
            scheduler = self.get_noise_scheduler(args, torch.device("cpu"))  # type: ignore[attr-defined]
            self.criterion = criterion_for(args, scheduler, self._form(args, scheduler))
        elif not isinstance(criterion, DiffusionLoss):
            raise TypeError(f"{name}.criterion is a {type(criterion).__name__}, expected a vadiff.DiffusionLoss")
        elif given(args):
            raise ValueError(
                f"{', '.join(given(args))} given with {name}.criterion, expected one of them: leave out `criterion = "
                "...` in the class to choose on the command line"
            )
        if any(True for _ in self.criterion.parameters()):
            raise ValueError(
                "criterion has parameters (a learned weighting), but the trainer's optimizer takes its network's only. "
                "Use weighting='loss_level', to which they converge."
            )
        every = option(args, "log_every")
        self.log_every = self.log_every if every is None else every
        if self.log_every < 1:
            raise ValueError(f"log_every is {self.log_every!r}, expected a positive integer")
        self.fresh_statistics = self.fresh_statistics or bool(option(args, "fresh_statistics"))
        self.refresh_snr = self.refresh_snr or bool(option(args, "refresh_snr"))

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
        return timesteps * steps if unit else timesteps

    def _is(self, name: str) -> bool:
        return any(base.__name__ == name for base in type(self).__mro__)

    def step_logging(self, accelerator: Any, logs: dict[str, Any], global_step: int, epoch: int) -> None:
        """Log the trainer's metrics, once every `log_every` steps with the statistics of each noise level."""
        if global_step != self._logged_at and global_step % self.log_every == 0:
            self._logged_at = global_step
            self.criterion.log_to(lambda values, step: logs.update(values), global_step)
        super().step_logging(accelerator, logs, global_step, epoch)  # type: ignore[misc]


def _files_of_statistics(folder: str) -> list[str]:
    """Accelerate's files of registered objects in a state; the scripts register none of their own."""
    return [name for name in os.listdir(folder) if re.fullmatch(r"custom_checkpoint_\d+\.pkl", name)]


def _require_statistics(models: list[Any], folder: str) -> None:
    if not _files_of_statistics(folder):
        raise ValueError(
            f"the state {folder} holds no statistics: it was saved without vadiff. Start them afresh, with "
            "--vadiff_fresh_statistics or with fresh_statistics = True in the trainer's class"
        )


def _register_without_loading(accelerator: Any, criterion: DiffusionLoss) -> None:
    """`accelerate.prepare` with a criterion that a state does not change.

    Accelerate refuses states with more or fewer objects than are registered: the criterion is one from the first state
    that is saved, or that is loaded and has one.
    """
    criterion.to(accelerator.device)
    registered: list[_Kept] = []

    def register() -> None:
        if not registered:
            registered.append(_Kept(criterion.state_dict))
            accelerator.register_for_checkpointing(registered[0])

    def before_loading(models: list[Any], folder: str) -> None:
        if _files_of_statistics(folder):
            register()

    accelerator.register_load_state_pre_hook(before_loading)
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: register())


class _Kept:
    """What Accelerate saves of a criterion, and does not load."""

    def __init__(self, state_dict: Callable[[], dict[str, torch.Tensor]]) -> None:
        self.state_dict = state_dict

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        pass
