"""What a network predicts, and how a denoiser D(x; sigma) is made of it: D = c_skip·x + c_out·F(c_in·x, c_noise).

x = x0 + sigma·eps in every case, the coordinates of a variance-exploding process, so that denoisers of all processes
are sampled, evaluated and compared in the same way. A process with x_t = alpha·x0 + s·eps has sigma = s/alpha and
x_t = alpha·x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .._validation import require_known
from ..log_snr import from_sigma
from ..process import (
    DiscreteVP,
    EDMPreconditioning,
    NoiseProcess,
    VPCosine,
    VPLinear,
    VPScaledLinear,
    edm_preconditioning,
)

VP = {"vp_linear": VPLinear, "vp_cosine": VPCosine, "vp_scaled_linear": VPScaledLinear}
PROCESSES = ("edm", "flow", *VP)
# The forms of the output that belong to each process, its usual one first.
PREDICTIONS = {"edm": ("edm",), "flow": ("flow",), **dict.fromkeys(VP, ("epsilon", "v_prediction", "sample"))}

_TIMESTEPS = 1000  # of DDPM: continuous times are told to the network on the same scale
_PER_C_NOISE = 100.0  # timesteps per unit of c_noise, so that 0 to 999 become 0 to 10


class Parameterisation(Protocol):
    """How a denoiser is made of a network."""

    @property
    def prediction(self) -> str:
        """What F stands for: one of `vadiff.process.PREDICTION_TYPES`."""
        ...

    def preconditioning(self, sigma: Tensor) -> EDMPreconditioning:
        """c_skip, c_out, c_in and c_noise at noise levels sigma, [B] each."""
        ...

    def network_input(self, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """c_in·(x0 + sigma·eps), also where sigma is infinite, [B, ...]."""
        ...


class EDMForm:
    """EDM's preconditioning (arXiv 2206.00364, eq. 7 and table 1)."""

    prediction = "edm"

    def __init__(self, sigma_data: float) -> None:
        self.sigma_data = sigma_data

    def preconditioning(self, sigma: Tensor) -> EDMPreconditioning:
        return edm_preconditioning(sigma, self.sigma_data)

    def network_input(self, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        return _each(self.preconditioning(sigma).c_in, x0) * (x0 + _each(sigma, x0) * eps)


class FlowForm:
    """F is the velocity eps - x0 on the straight path x_t = (1-t)·x0 + t·eps, with t = sigma/(1+sigma).

    As x0 = x_t - t·F and x_t = x/(1+sigma): c_skip = c_in = 1/(1+sigma), c_out = -t.
    """

    prediction = "flow"

    def preconditioning(self, sigma: Tensor) -> EDMPreconditioning:
        shrink = 1.0 / (1.0 + sigma)
        return EDMPreconditioning(shrink, -sigma * shrink, shrink, sigma.log() / 4)

    def network_input(self, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        return _each(self.preconditioning(sigma).c_in, x0) * (x0 + _each(sigma, x0) * eps)


class VPForm:
    """eps, v or x0 of a variance-preserving process; c_noise is the timestep / 100.

    With alpha² = 1/(1+sigma²) and s = alpha·sigma: x0 = x - sigma·eps; x0 = alpha²·x - s·v; or the output itself.

    Args:
        process: continuous, or a `DiscreteVP`, between whose timesteps sigma is interpolated.
        prediction: "epsilon", "v_prediction" or "sample".

    Raises:
        ValueError: "epsilon" with zero terminal SNR, where eps says nothing of x0.
    """

    def __init__(self, process: NoiseProcess, prediction: str) -> None:
        self.process, self.prediction = process, prediction
        if prediction == "epsilon" and isinstance(process, DiscreteVP) and not process.alphas_cumprod[-1] > 0:
            raise ValueError(
                "prediction is epsilon, expected v_prediction or sample with zero terminal SNR: the last timestep is "
                "pure noise, which is eps itself, so predicting it teaches nothing"
            )

    def preconditioning(self, sigma: Tensor) -> EDMPreconditioning:
        log_snr = from_sigma(sigma)
        alpha, noise = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        if self.prediction == "epsilon":
            c_skip, c_out = torch.ones_like(sigma), -sigma
        elif self.prediction == "sample":
            c_skip, c_out = torch.zeros_like(sigma), torch.ones_like(sigma)
        else:
            c_skip, c_out = alpha.square(), -noise
        return EDMPreconditioning(c_skip, c_out, alpha, self._c_noise(log_snr))

    def network_input(self, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        log_snr = from_sigma(sigma)
        return _each(log_snr.sigmoid().sqrt(), x0) * x0 + _each((-log_snr).sigmoid().sqrt(), x0) * eps

    def _c_noise(self, log_snr: Tensor) -> Tensor:
        """The timestep / 100; of levels with more noise than the process has, that of its last time."""
        time = self.process.time(log_snr).clamp(max=_last_time(self.process))
        timestep = time if isinstance(self.process, DiscreteVP) else _TIMESTEPS * time - 1.0
        return timestep / _PER_C_NOISE


def parameterisation(
    process: str,
    prediction: str | None = None,
    *,
    sigma_data: float = 0.5,
    timesteps: int | None = None,
    zero_terminal_snr: bool = False,
) -> Parameterisation:
    """The parameterisation of a process by name.

    Args:
        process: one of `PROCESSES`.
        prediction: one of `PREDICTIONS[process]`; None is the first.
        sigma_data: standard deviation of the data, for "edm".
        timesteps: of a discrete process; None is continuous time. Only for the variance-preserving processes.
        zero_terminal_snr: make the last timestep pure noise.

    Raises:
        ValueError: an unknown name, a pair that does not belong together, or zero terminal SNR without timesteps.
    """
    require_known("process", process, PROCESSES)
    prediction = PREDICTIONS[process][0] if prediction is None else prediction
    if prediction not in PREDICTIONS[process]:
        raise ValueError(
            f"prediction is {prediction!r}, expected {' or '.join(PREDICTIONS[process])}: process is {process!r}"
        )
    if zero_terminal_snr and (process not in VP or timesteps is None):
        raise ValueError(
            f"zero_terminal_snr is true, expected false for process {process!r} with timesteps {timesteps}: it changes "
            "the table of timesteps of a discrete variance-preserving process"
        )
    if process == "edm":
        return EDMForm(sigma_data)
    if process == "flow":
        return FlowForm()
    return VPForm(vp_process(process, timesteps, zero_terminal_snr), prediction)


def vp_process(name: str, timesteps: int | None = None, zero_terminal_snr: bool = False) -> NoiseProcess:
    """A variance-preserving process, with `timesteps` or, if that is None, in continuous time."""
    if timesteps is None:
        continuous: NoiseProcess = VP[name]()
        return continuous
    tables: dict[str, Callable[[int], DiscreteVP]] = {
        "vp_linear": DiscreteVP.linear,
        "vp_cosine": DiscreteVP.cosine,
        "vp_scaled_linear": DiscreteVP.scaled_linear,
    }
    table = tables[name](timesteps)
    return table.with_zero_terminal_snr() if zero_terminal_snr else table


def sigma_range(form: Parameterisation) -> tuple[float, float]:
    """The lowest and the highest noise level sigma of the process, 0 and infinite for edm and flow.

    Beyond them a network knows no time. Stable Diffusion's betas end at 14.6: their last timestep still has some
    signal, and so a sample that starts there from noise alone is not exact. With zero terminal SNR the highest is
    infinite.
    """
    if not isinstance(form, VPForm):
        return 0.0, math.inf
    ends = torch.tensor([0.0, _last_time(form.process)], dtype=torch.float64)
    lowest, highest = (-0.5 * form.process.log_snr(ends)).exp().tolist()
    return lowest, highest


def _last_time(process: NoiseProcess) -> float:
    return process.timesteps - 1.0 if isinstance(process, DiscreteVP) else process.t_range[1]


def _each(values: Tensor, like: Tensor) -> Tensor:
    """One value per sample, [B], in the shape [B, 1, ...]."""
    return values.view(-1, *(1,) * (like.dim() - 1))
