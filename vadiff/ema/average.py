"""Power-function averages of a network's weights, updated during training."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.problem import compute_dtype
from .profile import decay, gamma_from_sigma_rel
from .snapshots import Snapshot, write_snapshot


class PowerFunctionEMA:
    """Running averages of a module's weights with power-function profiles, several widths at once.

        averages = PowerFunctionEMA(network)
        for step in range(1, steps + 1):
            ...
            averages.update(step)
            if step % 100 == 0:
                averages.save("snapshots")

    `ema.reconstruct("snapshots", [0.13])` then gives the weights of any other width, after training.

    An update is one fused operation per width and does not synchronise with the device. Averages are on the module's
    device, in float32 or, for float64 weights, in float64. Buffers are not averaged: a snapshot has their values then.

    With `trainable_only` only the parameters that require a gradient when the object is made are averaged, and nothing
    else is written: snapshots of LoRA adapters are as small as the adapters. What is reconstructed from them is loaded
    with `module.load_state_dict(state, strict=False)`.

    Args:
        module: the module to average, already on its final device; its parameters must stay the same objects.
        sigma_rel: widths relative to the training time; with two or more, other widths are reconstructed precisely.
        trainable_only: leave out frozen parameters and all buffers.

    Raises:
        ValueError: no width, a repeated one, or one not above 0 and below 0.2887; or `trainable_only`, and no parameter
            requires a gradient.

    Attributes:
        run: name of this training run, restored by `load_state_dict`; snapshots of different runs cannot be mixed.
        time: of the last update, 0 before the first.
    """

    def __init__(
        self, module: nn.Module, sigma_rel: Sequence[float] = (0.05, 0.10), *, trainable_only: bool = False
    ) -> None:
        self.sigma_rel = tuple(float(width) for width in sigma_rel)
        if not self.sigma_rel or len(set(self.sigma_rel)) < len(self.sigma_rel):
            raise ValueError(f"sigma_rel is {self.sigma_rel}, expected at least one width, each once")
        self._gammas = [gamma_from_sigma_rel(width) for width in self.sigma_rel]
        self._module = module
        self._trainable_only = trainable_only
        self._parameters = [
            parameter
            for parameter in module.parameters()
            if parameter.is_floating_point() and (parameter.requires_grad or not trainable_only)
        ]
        if trainable_only and not self._parameters:
            raise ValueError(
                "trainable_only is true, but no parameter of the module requires a gradient: unfreeze what is trained, "
                "or add the adapters, before the averages are made"
            )
        self._averages = [
            [parameter.detach().to(compute_dtype(parameter), copy=True) for parameter in self._parameters]
            for _ in self._gammas
        ]
        self.run = uuid.uuid4().hex
        self.time = 0.0

    @torch.no_grad()
    def update(self, time: float) -> None:
        """Fold the module's current weights into every average; call it after the optimiser's step.

        Args:
            time: steps or images so far; the intervals between updates may vary.

        Raises:
            ValueError: `time` is not later than the last update.
        """
        if not self.time < time < math.inf:
            raise ValueError(f"time is {time}, expected later than the last update's {self.time:g}")
        parameters: list[Tensor] = [
            parameter.to(average.dtype) for parameter, average in zip(self._parameters, self._averages[0], strict=True)
        ]
        for gamma, averages in zip(self._gammas, self._averages, strict=True):
            torch._foreach_lerp_(averages, parameters, 1.0 - decay(gamma, time, time - self.time))
        self.time = float(time)

    def module_state(self, sigma_rel: float) -> dict[str, Any]:
        """State dict of the module with the average of one width; its tensors are not copies.

        With `trainable_only` it has the averaged parameters alone.

        Raises:
            ValueError: that width is not averaged.
        """
        if sigma_rel not in self.sigma_rel:
            kept = ", ".join(map(str, self.sigma_rel))
            raise ValueError(f"sigma_rel is {sigma_rel}, expected one of {kept}. For other widths use reconstruct")
        averages = self._averages[self.sigma_rel.index(sigma_rel)]
        return {**self._rest(), **self._named(averages)}

    def save(self, folder: str | Path, precision: str = "fp16") -> Path:
        """Write the current averages to `<folder>/<time>.pt`, atomically.

        Args:
            folder: created if missing.
            precision: of the averages: "fp16", "bf16" or "fp32". A reconstruction multiplies the rounding error
                (2^-11, 2^-8 or 2^-24 of a value) by its coefficients: by about 1 between the stored widths, by up to 34
                at sigma_rel 0.015. fp16 holds values of 6e-8 to 65504.

        Raises:
            ValueError: no update yet, an unknown precision, or a finite average that overflows it; nothing is written
                then.
            CheckpointError: the file cannot be written, as on a full disk; an existing file is unchanged.
        """
        if self.time == 0.0:
            raise ValueError("there was no update yet, expected one before a snapshot: call update(time)")
        parameters = [self._named(averages) for averages in self._averages]
        snapshot = Snapshot(self.run, self.time, self.sigma_rel, parameters, self._rest())
        return write_snapshot(Path(folder), snapshot, precision)

    def state_dict(self) -> dict[str, Any]:
        """State needed to resume; its tensors are not copies."""
        return {
            "run": self.run,
            "time": self.time,
            "sigma_rel": list(self.sigma_rel),
            "averages": [self._named(averages) for averages in self._averages],
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, bit for bit.

        Raises:
            ValueError: other widths, or averages of another module; nothing is changed then.
        """
        if tuple(state["sigma_rel"]) != self.sigma_rel:
            raise ValueError(f"sigma_rel is {self.sigma_rel}, the state was saved with {tuple(state['sigma_rel'])}")
        for averages, saved in zip(self._averages, state["averages"], strict=True):
            own = {name: value.shape for name, value in self._named(averages).items()}
            if own != {name: value.shape for name, value in saved.items()}:
                raise ValueError("the state is of a module with other parameters")
        for averages, saved in zip(self._averages, state["averages"], strict=True):
            for name, average in self._named(averages).items():
                average.copy_(saved[name])
        self.run, self.time = state["run"], state["time"]

    def _rest(self) -> dict[str, Any]:
        """The module's state that is not averaged; none of it with `trainable_only`."""
        if self._trainable_only:
            return {}
        averaged = self._named(self._averages[0])
        return {name: value for name, value in self._module.state_dict().items() if name not in averaged}

    def _named(self, averages: list[Tensor]) -> dict[str, Tensor]:
        """Averages by parameter name in the module's state; a shared parameter has several names."""
        places = {id(parameter): place for place, parameter in enumerate(self._parameters)}
        return {
            name: averages[places[id(parameter)]]
            for name, parameter in self._module.named_parameters(remove_duplicate=False)
            if id(parameter) in places
        }
