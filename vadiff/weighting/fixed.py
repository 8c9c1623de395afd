"""Fixed weightings: exact functions of log-SNR, evaluated per sample, never normalised."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..process import PREDICTION_TYPES, loss_ratio


class FixedWeighting:
    """A weight that depends on log-SNR only. Call it with log-SNR [B] float to get weights [B] float32."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(FixedWeighting):
    """w = 1: the trainer's own objective, with statistics recorded."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.ones_like(log_snr, dtype=torch.float32)


@dataclass(frozen=True)
class MinSNR(FixedWeighting):
    """Min-SNR-gamma (arXiv 2303.09556): min(S, gamma) on the x0 loss, S = e**log_snr = alpha**2/sigma**2.

    For another prediction type it is divided by that type's k(S): epsilon min(S, gamma)/S, v min(S, gamma)/(S + 1), ...
    At log_snr = +-inf the limit is returned (epsilon at zero SNR: 1, v: 0). For EDM, S = 1/sigma**2, without
    sigma_data.

    Args:
        gamma: where the SNR is cut off.
        prediction_type: what the loss is written in: "epsilon", "sample", "v_prediction", "flow" or "edm" (the raw
            network output F; sigma_data as below).
        sigma_data: standard deviation of the data, used by "edm" only.

    Raises:
        ValueError: gamma not positive, or no such prediction type.
    """

    gamma: float = 5.0
    prediction_type: str = "epsilon"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        for name in ("gamma", "sigma_data"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a positive finite number")
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type is {self.prediction_type!r}, expected one of {', '.join(PREDICTION_TYPES)}"
            )

    def __call__(self, log_snr: Tensor) -> Tensor:
        # In logs: S/S at infinite or zero SNR is a limit there, and NaN in plain arithmetic.
        log_snr = log_snr.double()
        tiny = log_snr.clamp(-700.0, 700.0)  # e**700 is still a float64
        log_weight = (
            tiny.clamp(max=math.log(self.gamma))
            - loss_ratio(self.prediction_type, tiny, sigma_data=self.sigma_data).log()
        )
        return log_weight.exp().float().where(~log_snr.isnan(), math.nan)


@dataclass(frozen=True)
class Cauchy(FixedWeighting):
    """w = 1 / (1 + alpha*(log_snr - center)**2): less weight far from the noise levels that are drawn most.

    What the code of "Variance-Aware Adaptive Weighting for Diffusion Model Training" (arXiv 2603.10391, algorithm 1)
    runs, on EDM's loss. There the centre is the mean log-SNR of the batch, which at batch 128 scatters by 0.2 about
    that of the noise levels; here it is the latter.

    Args:
        alpha: the authors report 0.01, 0.05 and 0.1.
        center: mean log-SNR of the noise levels drawn; 2.4 for EDM's, ln sigma ~ N(-1.2, 1.2**2).

    Raises:
        ValueError: alpha negative or not finite, or center not finite.
    """

    alpha: float = 0.05
    center: float = 2.4

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha!r}, expected a finite number of at least 0")
        if not math.isfinite(self.center):
            raise ValueError(f"center is {self.center!r}, expected a finite log-SNR")

    def __call__(self, log_snr: Tensor) -> Tensor:
        return 1.0 / (1.0 + self.alpha * (log_snr.float() - self.center).square())
