"""Fixed weightings: exact functions of log-SNR, evaluated per sample, never normalised.

Each is a weight of the x0 loss, a function of S = e**log_snr = alpha**2/sigma**2, which does not include sigma_data
(EDM: S = 1/sigma**2; for formulas in S = sigma_data**2/sigma**2 multiply gamma by 1/sigma_data**2). For a loss in
another form the weight is divided by that form's k (`vadiff.process.loss_ratio`), so that the objective is the same in
every form. At log_snr = +-inf the weight is its limit, or `max_weight` if the limit diverges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._validation import check_log_snr, require_known, require_number
from ..ops.problem import Bins
from ..process import PREDICTION_TYPES, loss_ratio
from .base import Weighting

MAX_WEIGHT = 1e6  # the EDM weight of sigma = 0.001


class FixedWeighting(Weighting):
    """A weight that depends on log-SNR only. Call it with log-SNR [B] float to get weights [B] float32.

    Those of this package raise TypeError unless log-SNR is a float tensor: integers would be timesteps.
    """

    def __call__(self, log_snr: Tensor) -> Tensor:
        raise NotImplementedError

    def for_batch(self, log_snr: Tensor, sync: bool) -> Tensor | None:
        return self(log_snr)

    def weight_at(self, log_snr: Tensor, log_weights: Tensor, bins: Bins) -> Tensor:
        return self(log_snr) if self.pointwise else super().weight_at(log_snr, log_weights, bins)


@dataclass(frozen=True)
class Constant(FixedWeighting):
    """w = 1: the trainer's own objective, with statistics recorded."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        check_log_snr(log_snr)
        return torch.ones_like(log_snr, dtype=torch.float32).where(~log_snr.isnan(), math.nan)

    def for_batch(self, log_snr: Tensor, sync: bool) -> None:
        return None


class SNRWeighting(FixedWeighting):
    """A weight of the x0 loss that is a function of the SNR, converted to the prediction type's form by its k.

    Arguments of every such weighting:
        prediction_type: form of the loss: "epsilon", "sample", "v_prediction", "flow" or "edm" (the raw
            network output F, or D with EDM's lambda(sigma) as base weight; sigma_data as below).
        sigma_data: standard deviation of the data, for "edm" and for weightings that contain EDM's weight.
        max_weight: upper bound of the weight, where the formula diverges.
    They raise ValueError for an argument out of bounds.
    """

    prediction_type: str
    sigma_data: float
    max_weight: float

    _positive: ClassVar[tuple[str, ...]] = ()  # further arguments that must be positive

    def __post_init__(self) -> None:
        for name in (*self._positive, "sigma_data", "max_weight"):
            require_number(name, getattr(self, name), above=0.0)
        require_known("prediction_type", self.prediction_type, PREDICTION_TYPES)

    def log_x0_weight(self, log_snr: Tensor) -> Tensor:
        """ln of the weight of the x0 loss at finite log-SNR, [B] float64."""
        raise NotImplementedError

    def __call__(self, log_snr: Tensor) -> Tensor:
        check_log_snr(log_snr)
        # In logs, because a ratio such as S/S at infinite or zero SNR is NaN in plain arithmetic.
        finite = log_snr.double().clamp(-700.0, 700.0)  # e**700 is finite in float64
        log_k = loss_ratio(self.prediction_type, finite, sigma_data=self.sigma_data).log()
        log_weight = self.log_x0_weight(finite) - log_k
        return log_weight.clamp(max=math.log(self.max_weight)).exp().float().where(~log_snr.isnan(), math.nan)


@dataclass(frozen=True)
class _WithoutConstants(SNRWeighting):
    """A weighting whose formula has no constants of its own."""

    prediction_type: str = "epsilon"
    sigma_data: float = 0.5
    max_weight: float = MAX_WEIGHT


@dataclass(frozen=True)
class ConstantX0(_WithoutConstants):
    """1 on the x0 loss: the squared error of the image has the same weight at every noise level."""

    def log_x0_weight(self, log_snr: Tensor) -> Tensor:
        return torch.zeros_like(log_snr)


@dataclass(frozen=True)
class SNR(_WithoutConstants):
    """S on the x0 loss: 1 on the epsilon loss, DDPM's simple objective (arXiv 2006.11239, eq. 14) in every form."""

    def log_x0_weight(self, log_snr: Tensor) -> Tensor:
        return log_snr


@dataclass(frozen=True)
class MinSNR(SNRWeighting):
    """Min-SNR-gamma (arXiv 2303.09556): min(S, gamma) on the x0 loss.

    For another prediction type it is divided by that type's k(S): epsilon min(S, gamma)/S, v min(S, gamma)/(S + 1), ...
    At zero SNR the weight is 1 for epsilon and, as a limit, 0 for v and x0: unless `terminal` says otherwise, the last
    timestep of a process with zero terminal SNR is not trained. For EDM, S = 1/sigma**2, without sigma_data.

    Args:
        gamma: SNR at which the weight is capped.
        terminal: weight at zero SNR, the last timestep of a process with zero terminal SNR; None: the formula's. The
            paper's code gives 1.
        prediction_type, sigma_data, max_weight: see `SNRWeighting`.
    """

    gamma: float = 5.0
    prediction_type: str = "epsilon"
    sigma_data: float = 0.5
    max_weight: float = MAX_WEIGHT
    terminal: float | None = None

    _positive: ClassVar[tuple[str, ...]] = ("gamma",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.terminal is not None:
            require_number("terminal", self.terminal, at_least=0.0, otherwise=", or None")

    def log_x0_weight(self, log_snr: Tensor) -> Tensor:
        return log_snr.clamp(max=math.log(self.gamma))

    def __call__(self, log_snr: Tensor) -> Tensor:
        weight = super().__call__(log_snr)
        return weight if self.terminal is None else weight.masked_fill(log_snr == -math.inf, self.terminal)


@dataclass(frozen=True)
class InverseSNR(_WithoutConstants):
    """1/S on the x0 loss, `inv_snr` of the code of Min-SNR (arXiv 2303.09556): high noise counts most."""

    def log_x0_weight(self, log_snr: Tensor) -> Tensor:
        return -log_snr


@dataclass(frozen=True)
class SoftMinSNR(SNRWeighting):
    """S·gamma/(S + gamma) on the x0 loss (Hourglass Diffusion Transformers, arXiv 2401.11605, section 3.4).

    Args:
        gamma: upper bound of the weight; 1/sigma_data**2, 4 for sigma_data 0.5, gives k-diffusion's weight
            1/(sigma**2 + sigma_data**2).
        prediction_type, sigma_data, max_weight: see `SNRWeighting`.
    """

    gamma: float = 4.0
    prediction_type: str = "epsilon"
    sigma_data: float = 0.5
    max_weight: float = MAX_WEIGHT

    _positive: ClassVar[tuple[str, ...]] = ("gamma",)

    def log_x0_weight(self, log_snr: Tensor) -> Tensor:
        return log_snr + math.log(self.gamma) - _log_add(log_snr, math.log(self.gamma))


@dataclass(frozen=True)
class TruncatedSNR(SNRWeighting):
    """max(S, gamma) on the x0 loss: truncated or max SNR (Salimans & Ho, arXiv 2202.00512, section 4, gamma = 1).

    Args:
        gamma: lower bound of the weight.
        prediction_type, sigma_data, max_weight: see `SNRWeighting`.
    """

    gamma: float = 1.0
    prediction_type: str = "epsilon"
    sigma_data: float = 0.5
    max_weight: float = MAX_WEIGHT

    _positive: ClassVar[tuple[str, ...]] = ("gamma",)

    def log_x0_weight(self, log_snr: Tensor) -> Tensor:
        return log_snr.clamp(min=math.log(self.gamma))


@dataclass(frozen=True)
class EDM(_WithoutConstants):
    """S + 1/sigma_data**2 on the x0 loss: 1 on the F loss (arXiv 2206.00364, table 1)."""

    def log_x0_weight(self, log_snr: Tensor) -> Tensor:
        return loss_ratio("edm", log_snr, sigma_data=self.sigma_data).log()


@dataclass(frozen=True)
class P2(SNRWeighting):
    """1/(k + S)**gamma on the epsilon loss: Choi et al., P2 weighting (arXiv 2204.00227, eq. 8).

    Args:
        k: the weight is at most 1/k**gamma, at high noise.
        gamma: 0 is the epsilon loss itself; the paper uses 0.5 and 1.
        prediction_type, sigma_data, max_weight: see `SNRWeighting`.
    """

    k: float = 1.0
    gamma: float = 1.0
    prediction_type: str = "epsilon"
    sigma_data: float = 0.5
    max_weight: float = MAX_WEIGHT

    _positive: ClassVar[tuple[str, ...]] = ("k",)

    def __post_init__(self) -> None:
        require_number("gamma", self.gamma, at_least=0.0)
        super().__post_init__()

    def log_x0_weight(self, log_snr: Tensor) -> Tensor:
        return log_snr - self.gamma * _log_add(log_snr, math.log(self.k))


@dataclass(frozen=True)
class Debiased(_WithoutConstants):
    """1/sqrt(S) on the epsilon loss: debiased estimation (Yu et al., arXiv 2310.08442)."""

    def log_x0_weight(self, log_snr: Tensor) -> Tensor:
        return 0.5 * log_snr


@dataclass(frozen=True)
class Sigmoid(SNRWeighting):
    """sigmoid(bias - log_snr) on the epsilon loss: Kingma & Gao, VDM++ (arXiv 2303.00848); SiD2 (arXiv 2410.19324).

    In these papers the weight is per unit of log-SNR, whatever the density of the levels: pass
    `sample_weight=(-sampler.log_density(log_snr)).exp()` for that objective; otherwise it multiplies the density.

    Args:
        bias: log-SNR at which the weight is 1/2.
        prediction_type, sigma_data, max_weight: see `SNRWeighting`.
    """

    bias: float = 2.0
    prediction_type: str = "epsilon"
    sigma_data: float = 0.5
    max_weight: float = MAX_WEIGHT

    def __post_init__(self) -> None:
        require_number("bias", self.bias)
        super().__post_init__()

    def log_x0_weight(self, log_snr: Tensor) -> Tensor:
        return log_snr + torch.nn.functional.logsigmoid(self.bias - log_snr)


@dataclass(frozen=True)
class MonotonicEDM(SNRWeighting):
    """EDM's weight and density as one weight of log-SNR, flat beyond its peak: Kingma & Gao (arXiv 2303.00848).

    The weight of the epsilon loss is h(log_snr) = N(log_snr; -2·p_mean, (2·p_std)**2) · (1 + 1/(S·sigma_data**2)) at
    lower noise than the peak of h, and the peak value at higher noise; divided by the peak value, so that the largest
    weight is 1. Meant for levels uniform in log-SNR (`levels.LogUniform`); for others see `Sigmoid`.

    Args:
        p_mean, p_std: EDM's, of ln(sigma).
        prediction_type, sigma_data, max_weight: see `SNRWeighting`.
    """

    p_mean: float = -1.2
    p_std: float = 1.2
    prediction_type: str = "epsilon"
    sigma_data: float = 0.5
    max_weight: float = MAX_WEIGHT

    _positive: ClassVar[tuple[str, ...]] = ("p_std",)

    def __post_init__(self) -> None:
        require_number("p_mean", self.p_mean)
        super().__post_init__()

    @property
    def peak(self) -> float:
        """Log-SNR of the peak: where h'/h = -(x - m)/s² - 1/(1 + sigma_data²·e**x) is 0, m = -2p_mean, s = 2p_std."""
        mean, variance = -2.0 * self.p_mean, 4.0 * self.p_std**2
        low, high = mean - variance, mean  # h rises at `low` and falls at `high`
        for _ in range(80):
            middle = 0.5 * (low + high)
            falling = 1.0 / (1.0 + self.sigma_data**2 * math.exp(min(middle, 700.0)))
            low, high = (middle, high) if -(middle - mean) / variance > falling else (low, middle)
        return 0.5 * (low + high)

    def _log_h(self, log_snr: Tensor) -> Tensor:
        density = -0.5 * ((log_snr + 2.0 * self.p_mean) / (2.0 * self.p_std)).square()
        return density + loss_ratio("edm", log_snr, sigma_data=self.sigma_data).log() - log_snr

    def log_x0_weight(self, log_snr: Tensor) -> Tensor:
        peak = self.peak
        return log_snr + self._log_h(log_snr.clamp(min=peak)) - self._log_h(torch.full_like(log_snr, peak))


@dataclass(frozen=True)
class _SD3Weighting(SNRWeighting):
    """A weight by the noise share t of a flow, t = sigma/(alpha + sigma), as diffusers' SD3 scripts write it."""

    form: str = "sample"
    prediction_type: str = "flow"
    sigma_data: float = 0.5
    max_weight: float = MAX_WEIGHT

    def __post_init__(self) -> None:
        require_known("form", self.form, PREDICTION_TYPES)
        super().__post_init__()

    def _log_weight(self, log_snr: Tensor) -> Tensor:
        raise NotImplementedError

    def log_x0_weight(self, log_snr: Tensor) -> Tensor:
        return self._log_weight(log_snr) + loss_ratio(self.form, log_snr, sigma_data=self.sigma_data).log()


@dataclass(frozen=True)
class SigmaSqrt(_SD3Weighting):
    """1/t**2, t the noise share of a flow: diffusers' "sigma_sqrt" for SD3.

    Args:
        form: form of the loss that this multiplies in diffusers: "sample" with --precondition_outputs (the default),
            which equals 1 on the flow loss; "flow" without.
        prediction_type, sigma_data, max_weight: see `SNRWeighting`.
    """

    def _log_weight(self, log_snr: Tensor) -> Tensor:
        return loss_ratio("flow", log_snr).log()  # 1/t = 1 + sqrt(S)


@dataclass(frozen=True)
class CosMap(_SD3Weighting):
    """2/(π·(1 - 2t + 2t**2)), t the noise share of a flow: "cosmap" of SD3 (arXiv 2403.03206, eq. 21).

    In SD3 it is a density of t; `levels.CosMap` draws from it.

    Args:
        form, prediction_type, sigma_data, max_weight: see `SigmaSqrt`.
    """

    def _log_weight(self, log_snr: Tensor) -> Tensor:
        t = (-0.5 * log_snr).sigmoid()
        return math.log(2.0 / math.pi) - (1.0 - 2.0 * t + 2.0 * t.square()).log()


def _log_add(log_snr: Tensor, log_constant: float) -> Tensor:
    """ln(S + constant)."""
    return torch.logaddexp(log_snr, torch.full_like(log_snr, log_constant))
