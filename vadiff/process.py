"""Noise processes x_t = alpha·x0 + sigma·eps, and the prediction types of networks.

A process turns a time per sample into alpha, sigma and log-SNR. A prediction type says what the network's
output F stands for: `coefficients` gives (a, b, c) of the residual r = a·F + b·x0 + c·eps, and `loss_ratio`
gives k, the factor between the squared error in that form and the squared error of x0. The formulas of k are
defined only here.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .log_snr import from_flow_time, from_sigma
from .ops.problem import Coefficient

__all__ = [
    "EDM",
    "PREDICTION_TYPES",
    "EDMPreconditioning",
    "Flow",
    "NoiseProcess",
    "VPCosine",
    "VPLinear",
    "coefficients",
    "edm_preconditioning",
    "loss_ratio",
]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow", "edm")


class NoiseProcess(ABC):
    """x_t = alpha(t)·x0 + sigma(t)·eps with eps ~ N(0, 1).

    Every method takes one value per sample, [B] of any floating dtype, computes in float64 and returns [B] float32
    (float64 for float64 input).
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data, [B]."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise, [B]."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """λ = ln(alpha² / sigma²), [B]; ±inf at the ends of the process."""

    @abstractmethod
    def time(self, log_snr: Tensor) -> Tensor:
        """The time t at which the process has this λ, [B]: the inverse of `log_snr`."""

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha·x0 + sigma·eps.

        Args:
            x0: [B, ...] clean samples.
            eps: noise of the same shape.
            t: [B] times of the process (for EDM the noise level sigma).

        Returns:
            The noisy samples, shape and dtype of `x0`.

        Raises:
            ValueError: `eps` or `t` has the wrong shape.
        """
        if eps.shape != x0.shape:
            raise ValueError(f"eps has shape {tuple(eps.shape)}, expected {tuple(x0.shape)}: the shape of x0.")
        if t.shape != x0.shape[:1]:
            raise ValueError(f"t has shape {tuple(t.shape)}, expected {tuple(x0.shape[:1])}: one value per sample.")
        per_sample = (-1,) + (1,) * (x0.dim() - 1)
        return (self.alpha(t).view(per_sample) * x0 + self.sigma(t).view(per_sample) * eps).to(x0.dtype)


@dataclass(frozen=True)
class VPCosine(NoiseProcess):
    """Cosine schedule, t in [0, 1]: ᾱ(t) = cos²(θ) / cos²(θ₀), θ = (t+s)/(1+s)·π/2, θ₀ = θ(0).

    Source: Nichol & Dhariwal, Improved DDPM (arXiv 2102.09672), eq. 17, without their cap on beta, so that
    t = 1 is pure noise (alpha = 0). cos(θ) is computed as sin(π/2 - θ), and 1 - ᾱ as
    sin(θ-θ₀)·sin(θ+θ₀)/cos²(θ₀), so that both ends are exact.
    """

    s: float = 0.008

    def alpha(self, t: Tensor) -> Tensor:
        remaining = (1.0 - t.double()) / (1.0 + self.s) * (math.pi / 2)  # π/2 - θ
        return _match(remaining.sin() / math.cos(self._theta0), t)

    def sigma(self, t: Tensor) -> Tensor:
        turned = t.double() / (1.0 + self.s) * (math.pi / 2)  # θ - θ₀
        variance = turned.sin() * (turned + 2 * self._theta0).sin()
        return _match(variance.sqrt() / math.cos(self._theta0), t)

    def log_snr(self, t: Tensor) -> Tensor:
        return _match(2.0 * (self.alpha(t.double()).log() - self.sigma(t.double()).log()), t)

    def time(self, log_snr: Tensor) -> Tensor:
        alpha = log_snr.double().sigmoid().sqrt()
        remaining = (alpha * math.cos(self._theta0)).asin()  # π/2 - θ
        return _match((1.0 - remaining * (1.0 + self.s) / (math.pi / 2)).clamp(min=0.0), log_snr)

    @property
    def _theta0(self) -> float:
        return self.s / (1.0 + self.s) * (math.pi / 2)


@dataclass(frozen=True)
class VPLinear(NoiseProcess):
    """DDPM's linear beta schedule, t in [0, 1]: ln alpha = -t²(β_max - β_min)/4 - t·β_min/2.

    Source: Song et al., Score-based generative modeling (arXiv 2011.13456), eq. 33. The defaults are the
    limit of DDPM's 1,000 betas from 1e-4 to 0.02.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def alpha(self, t: Tensor) -> Tensor:
        return _match(self._log_alpha(t).exp(), t)

    def sigma(self, t: Tensor) -> Tensor:
        return _match((-torch.expm1(2.0 * self._log_alpha(t))).sqrt(), t)

    def log_snr(self, t: Tensor) -> Tensor:
        log_alpha_bar = 2.0 * self._log_alpha(t)
        return _match(log_alpha_bar - (-torch.expm1(log_alpha_bar)).log(), t)

    def time(self, log_snr: Tensor) -> Tensor:
        drop = nn.functional.softplus(-log_snr.double())  # -ln ᾱ = t²(β_max - β_min)/2 + t·β_min
        root = (self.beta_min**2 + 2.0 * (self.beta_max - self.beta_min) * drop).sqrt()
        return _match(2.0 * drop / (self.beta_min + root), log_snr)

    def _log_alpha(self, t: Tensor) -> Tensor:
        time = t.double()
        return -0.25 * time.square() * (self.beta_max - self.beta_min) - 0.5 * time * self.beta_min


@dataclass(frozen=True)
class EDM(NoiseProcess):
    """Variance exploding: alpha = 1, and t is sigma itself, in [0, inf).

    Source: Karras et al., EDM (arXiv 2206.00364), table 1.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return _match(torch.ones_like(t), t)

    def sigma(self, t: Tensor) -> Tensor:
        return _match(t, t)

    def log_snr(self, t: Tensor) -> Tensor:
        return from_sigma(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return _match((-0.5 * log_snr.double()).exp(), log_snr)


@dataclass(frozen=True)
class Flow(NoiseProcess):
    """Straight path between data and noise, t in [0, 1] (flow matching, rectified flow).

    data_at = 0: alpha = 1 - t, sigma = t (SD3, diffusers). data_at = 1: alpha = t, sigma = 1 - t (torchcfm,
    flow_matching). Source: Lipman et al., Flow matching (arXiv 2210.02747), section 4.1, with sigma_min = 0.
    """

    data_at: int = 0

    def __post_init__(self) -> None:
        _require_direction(self.data_at)

    def alpha(self, t: Tensor) -> Tensor:
        return _match(t if self.data_at == 1 else 1.0 - t.double(), t)

    def sigma(self, t: Tensor) -> Tensor:
        return _match(1.0 - t.double() if self.data_at == 1 else t, t)

    def log_snr(self, t: Tensor) -> Tensor:
        return from_flow_time(t, data_at=self.data_at)

    def time(self, log_snr: Tensor) -> Tensor:
        half = 0.5 * log_snr.double()
        return _match((half if self.data_at == 1 else -half).sigmoid(), log_snr)


class EDMPreconditioning(NamedTuple):
    """The four factors of D(x; sigma) = c_skip·x + c_out·F(c_in·x; c_noise), each [B]."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def edm_preconditioning(sigma: Tensor, sigma_data: float = 0.5) -> EDMPreconditioning:
    """EDM's preconditioning (arXiv 2206.00364, table 1).

    With s² = sigma² + sigma_data²: c_skip = sigma_data²/s², c_out = sigma·sigma_data/s, c_in = 1/s,
    c_noise = ln(sigma)/4.

    Args:
        sigma: noise levels > 0, [B].
        sigma_data: standard deviation of the data.

    Returns:
        (c_skip, c_out, c_in, c_noise), each [B], dtype of `sigma`.
    """
    total = sigma.square() + sigma_data**2
    return EDMPreconditioning(
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data / total.sqrt(),
        c_in=total.rsqrt(),
        c_noise=sigma.log() / 4,
    )


def coefficients(
    prediction_type: str,
    alpha: Coefficient,
    sigma: Coefficient,
    *,
    sigma_data: float = 0.5,
    data_at: int = 0,
) -> tuple[Coefficient, Coefficient, Coefficient]:
    """(a, b, c) of the residual r = a·F + b·x0 + c·eps for a prediction type.

    | prediction type | the residual is the error of               | a     | b             | c            |
    |-----------------|--------------------------------------------|-------|---------------|--------------|
    | `epsilon`       | eps                                        | 1     | 0             | -1           |
    | `sample`        | x0                                         | 1     | -1            | 0            |
    | `v_prediction`  | v = alpha·eps - sigma·x0                   | 1     | sigma         | -alpha       |
    | `flow`          | v = eps - x0 (x0 - eps where data_at = 1)  | 1     | 1 (-1)        | -1 (1)       |
    | `edm`           | x0, by D = c_skip·x_t + c_out·F; alpha = 1 | c_out | c_skip - 1    | c_skip·sigma |

    c_skip - 1 is computed in closed form, -sigma² / (sigma² + sigma_data²).

    The kernels do not read a tensor whose coefficient is the number 0.0.

    Args:
        prediction_type: one of `PREDICTION_TYPES`.
        alpha: number or [B].
        sigma: number or [B].
        sigma_data: standard deviation of the data (`edm` only).
        data_at: time at which the path reaches data (`flow` only).

    Returns:
        (a, b, c), each a float, or [B] where it depends on a tensor.

    Raises:
        ValueError: an unknown prediction type or `data_at`, or `edm` with an alpha other than 1.

    Example:
        >>> coefficients("v_prediction", alpha=0.8, sigma=0.6)
        (1.0, 0.6, -0.8)
    """
    if prediction_type == "epsilon":
        return 1.0, 0.0, -1.0
    if prediction_type == "sample":
        return 1.0, -1.0, 0.0
    if prediction_type == "v_prediction":
        return 1.0, sigma, -alpha
    if prediction_type == "flow":
        _require_direction(data_at)
        return (1.0, 1.0, -1.0) if data_at == 0 else (1.0, -1.0, 1.0)
    if prediction_type == "edm":
        _require_variance_exploding(alpha)
        variance = sigma**2
        total = variance + sigma_data**2
        return sigma * sigma_data / total**0.5, -variance / total, sigma * sigma_data**2 / total
    raise _unknown(prediction_type)


def loss_ratio(prediction_type: str, log_snr: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """k(λ): squared error in the form of `prediction_type` = k(λ) × squared error of x0. With S = e^λ:

    `epsilon` S · `sample` 1 · `v_prediction` 1 + S · `flow` (1 + √S)² · `edm` S + 1/sigma_data² (the raw
    network output F; EDM's weight of the loss of D). A weight of the x0 loss is converted to another form by
    weight_P = weight_x0 / k_P.

    Args:
        prediction_type: one of `PREDICTION_TYPES`.
        log_snr: λ, [B]; ±inf gives the limit.
        sigma_data: standard deviation of the data (`edm` only).

    Returns:
        k, [B], dtype of `log_snr`.

    Raises:
        ValueError: an unknown prediction type.
    """
    if prediction_type == "epsilon":
        return log_snr.exp()
    if prediction_type == "sample":
        return torch.ones_like(log_snr)
    if prediction_type == "v_prediction":
        return 1.0 + log_snr.exp()
    if prediction_type == "flow":
        return (1.0 + (0.5 * log_snr).exp()).square()
    if prediction_type == "edm":
        return log_snr.exp() + 1.0 / sigma_data**2
    raise _unknown(prediction_type)


def _match(value: Tensor, t: Tensor) -> Tensor:
    return value.to(torch.float64 if t.dtype == torch.float64 else torch.float32)


def _unknown(prediction_type: str) -> ValueError:
    return ValueError(f"prediction_type is {prediction_type!r}, expected one of {', '.join(PREDICTION_TYPES)}.")


def _require_direction(data_at: int) -> None:
    if data_at not in (0, 1):
        raise ValueError(f"data_at is {data_at!r}, expected 0 (data at t = 0) or 1 (data at t = 1).")


def _require_variance_exploding(alpha: Coefficient) -> None:
    if isinstance(alpha, Tensor):
        if alpha.device.type != "cpu" or torch.compiler.is_compiling():
            return
        is_one = bool((alpha == 1).all())
    else:
        is_one = alpha == 1
    if not is_one:
        raise ValueError(
            "alpha is not 1, expected 1 for prediction_type 'edm': EDM's network sees x0 + sigma·eps. "
            "For x_t = alpha·x0 + sigma·eps pass x_t / alpha to the network and sigma / alpha as sigma."
        )
