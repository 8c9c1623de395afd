"""Everything a run can be told."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from ..weighting import Weighting, from_name


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Runs with the same seeds start from the same weights and see the same data and noise.

    Args:
        weighting: a name from `vadiff.weighting.available()`, or an object from `vadiff.weighting`.
        steps: optimiser steps.
        batch_size: images per step.
        seed: of the network's initial weights, and of the data unless `data_seed` is given.
        data_seed: of the order of the images, the noise levels and the noise; None means `seed`.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        backend: of the criterion: "auto" or the name of one.
        half_life: of the statistics, in samples per log-SNR bin on average.
        bins, log_snr_range: of the statistics.
        p_mean, p_std: ln sigma ~ N(p_mean, p_std²), EDM's noise levels.
        channels: width of the U-Net at 8 × 8, 4 × 4, ...
        learning_rate: Adam's, reached after `warmup` steps, then falling linearly to 0.
        warmup: steps of rising learning rate.
        ema_decay: of the running average of the weights, which samples are drawn from.
        log_every: steps between two entries of the history.
        held_out_draws: noises per image and level in the final measurement.

    Raises:
        ValueError: an argument out of bounds, or a device that is not there.
    """

    weighting: str | Weighting = "variance_aware"
    steps: int = 450
    batch_size: int = 64
    seed: int = 0
    data_seed: int | None = None
    device: str = "auto"
    backend: str = "auto"
    half_life: float = 128.0
    bins: int = 128
    log_snr_range: tuple[float, float] = (-16.0, 16.0)
    p_mean: float = -1.2
    p_std: float = 1.2
    channels: tuple[int, ...] = (32, 48)
    learning_rate: float = 8e-3
    warmup: int = 50
    ema_decay: float = 0.99
    log_every: int = 20
    held_out_draws: int = 2

    def __post_init__(self) -> None:
        from_name(self.weighting)
        for name in ("steps", "batch_size", "warmup", "log_every", "held_out_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("learning_rate", "p_std"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay is {self.ema_decay}, expected a number from 0 to below 1")
        for name in ("seed", "data_seed"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        self.torch_device()

    @property
    def name(self) -> str:
        """The name of the weighting, for people."""
        return self.weighting if isinstance(self.weighting, str) else repr(self.weighting)

    def torch_device(self) -> torch.device:
        """The device that `device` names.

        Raises:
            ValueError: no such device on this machine.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise ValueError(f"device is {self.device!r}, expected auto, cpu, cuda or cuda:N") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device is {self.device!r}, but torch sees {torch.cuda.device_count()} CUDA devices; "
                "`vadiff doctor` says what this machine has"
            )
        return device

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain numbers, strings and lists; a weighting that is an object as its repr."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["weighting"] = self.name
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


PRESETS = {"digits": TrainConfig()}
