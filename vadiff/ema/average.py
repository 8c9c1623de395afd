"""Power-function averages of a network's weights, kept while it trains."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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

    An update is one fused operation per width and never waits for the device. Averages are on the module's device, in
    float32 or, for float64 weights, in float64. Buffers are not averaged: they are saved as they are at that time.

    Args:
        module: what is averaged, on the device it will stay on; its parameters stay the same objects throughout.
        sigma_rel: the widths, relative to the time trained; two or more make the reconstruction of others precise.

    Raises:
        ValueError: no width, the same twice, or one not above 0 and below 0.2887.

    Attributes:
        run: a name of this training run, kept by `load_state_dict`; snapshots of two runs do not mix.
        time: of the last update, 0 before the first.
    """

    def __init__(self, module: nn.Module, sigma_rel: Sequence[float] = (0.05, 0.10)) -> None:
        self.sigma_rel = tuple(float(width) for width in sigma_rel)
        if not self.sigma_rel or len(set(self.sigma_rel)) < len(self.sigma_rel):
            raise ValueError(f"sigma_rel is {self.sigma_rel}, expected at least one width, each once")
        self._gammas = [gamma_from_sigma_rel(width) for width in self.sigma_rel]
        self._module = module
        self._parameters = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
        self._averages = [[_average_of(parameter) for parameter in self._parameters] for _ in self._gammas]
        self.run = uuid.uuid4().hex
        self.time = 0.0

    @torch.no_grad()
    def update(self, time: float) -> None:
        """Take the module's weights of now into every average, after the optimiser's step.

        Args:
            time: steps or images so far; any interval since the last update is right, also a changing one.

        Raises:
            ValueError: not later than the last update.
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
        """What `module.load_state_dict` takes, with the average of one width; tensors are those kept here, not copies.

        Raises:
            ValueError: no such width is kept.
        """
        if sigma_rel not in self.sigma_rel:
            kept = ", ".join(map(str, self.sigma_rel))
            raise ValueError(f"sigma_rel is {sigma_rel}, expected one that is kept: {kept}. reconstruct gives others")
        averages = self._averages[self.sigma_rel.index(sigma_rel)]
        return {**self._module.state_dict(), **self._named(averages)}

    def save(self, folder: str | Path, precision: str = "fp16") -> Path:
        """Write the averages of now to `<folder>/<time>.pt`. The file appears whole or not at all.

        Args:
            folder: made if it is not there.
            precision: of the averages: "fp16", "bf16" or "fp32". A reconstruction multiplies its rounding (2^-11,
                2^-8 or 2^-24 of a value) by the coefficients: by about 1 between the stored widths, by up to 34 at
                sigma_rel 0.015. fp16 holds values of 6e-8 to 65504.

        Raises:
            ValueError: no update yet, no such precision, or a finite average that is infinite in it; nothing is
                written then.
            CheckpointError: it cannot be written, as on a full disk; what was there stays as it was.
        """
        if self.time == 0.0:
            raise ValueError("there was no update yet, expected one before a snapshot: call update(time)")
        parameters = [self._named(averages) for averages in self._averages]
        state = self._module.state_dict()
        rest = {name: value for name, value in state.items() if name not in parameters[0]}
        return write_snapshot(Path(folder), Snapshot(self.run, self.time, self.sigma_rel, parameters, rest), precision)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on; tensors are those kept here, not copies."""
        return {
            "run": self.run,
            "time": self.time,
            "sigma_rel": list(self.sigma_rel),
            "averages": [self._named(averages) for averages in self._averages],
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, to the bit.

        Raises:
            ValueError: other widths, or averages of another module; nothing is changed then.
        """
        if tuple(state["sigma_rel"]) != self.sigma_rel:
            raise ValueError(f"sigma_rel is {self.sigma_rel}, the state was saved with {tuple(state['sigma_rel'])}")
        for averages, saved in zip(self._averages, state["averages"], strict=True):
            own = {name: value.shape for name, value in self._named(averages).items()}
            if own != {name: value.shape for name, value in saved.items()}:
                raise ValueError("the state was saved of a module with other parameters")
        for averages, saved in zip(self._averages, state["averages"], strict=True):
            for name, average in self._named(averages).items():
                average.copy_(saved[name])
        self.run, self.time = state["run"], state["time"]

    def _named(self, averages: list[Tensor]) -> dict[str, Tensor]:
        """By the names of the parameters in the module's state; one that is shared has several."""
        places = {id(parameter): place for place, parameter in enumerate(self._parameters)}
        return {
            name: averages[places[id(parameter)]]
            for name, parameter in self._module.named_parameters(remove_duplicate=False)
            if id(parameter) in places
        }


def _average_of(parameter: nn.Parameter) -> Tensor:
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return parameter.detach().to(dtype, copy=True)
