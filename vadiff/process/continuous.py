"""Processes in continuous time."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..betas import cosine_alpha
from ..log_snr import from_flow_time, from_sigma
from .base import NoiseProcess, match, require_direction


@dataclass(frozen=True)
class VPCosine(NoiseProcess):
    """Cosine schedule, t in [0, 1]: ᾱ(t) = cos²(θ) / cos²(θ₀), θ = (t+s)/(1+s)·π/2, θ₀ = θ(0).

    Source: Nichol & Dhariwal, Improved DDPM (arXiv 2102.09672), eq. 17, without their cap on beta, so that
    t = 1 is pure noise (alpha = 0). cos(θ) is computed as sin(π/2 - θ), and 1 - ᾱ as
    sin(θ-θ₀)·sin(θ+θ₀)/cos²(θ₀), so that both ends are exact.
    """

    s: float = 0.008

    def alpha(self, t: Tensor) -> Tensor:
        return match(cosine_alpha(t, self.s), t)

    def sigma(self, t: Tensor) -> Tensor:
        turned = t.double() / (1.0 + self.s) * (math.pi / 2)  # θ - θ₀
        variance = turned.sin() * (turned + 2 * self._theta0).sin()
        return match(variance.sqrt() / math.cos(self._theta0), t)

    def log_snr(self, t: Tensor) -> Tensor:
        return match(2.0 * (self.alpha(t.double()).log() - self.sigma(t.double()).log()), t)

    def time(self, log_snr: Tensor) -> Tensor:
        alpha = log_snr.double().sigmoid().sqrt()
        remaining = (alpha * math.cos(self._theta0)).asin()  # π/2 - θ
        return match((1.0 - remaining * (1.0 + self.s) / (math.pi / 2)).clamp(min=0.0), log_snr)

    @property
    def _theta0(self) -> float:
        return self.s / (1.0 + self.s) * (math.pi / 2)


class _ByAlphaBar(NoiseProcess):
    """A variance-preserving process by ln ᾱ = 2 ln alpha: alpha = √ᾱ, sigma = √(1 - ᾱ)."""

    @abstractmethod
    def _log_alpha_bar(self, t: Tensor) -> Tensor:
        """ln ᾱ at times t, float64."""

    def alpha(self, t: Tensor) -> Tensor:
        return match((0.5 * self._log_alpha_bar(t)).exp(), t)

    def sigma(self, t: Tensor) -> Tensor:
        return match((-torch.expm1(self._log_alpha_bar(t))).sqrt(), t)

    def log_snr(self, t: Tensor) -> Tensor:
        log_alpha_bar = self._log_alpha_bar(t)
        return match(log_alpha_bar - (-torch.expm1(log_alpha_bar)).log(), t)


@dataclass(frozen=True)
class VPLinear(_ByAlphaBar):
    """DDPM's linear beta schedule, t in [0, 1]: ln ᾱ = -t²(β_max - β_min)/2 - t·β_min.

    Source: Song et al., Score-based generative modeling (arXiv 2011.13456), eq. 33. The defaults are the
    limit of DDPM's 1,000 betas from 1e-4 to 0.02.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def time(self, log_snr: Tensor) -> Tensor:
        drop = nn.functional.softplus(-log_snr.double())  # -ln ᾱ = t²(β_max - β_min)/2 + t·β_min
        root = (self.beta_min**2 + 2.0 * (self.beta_max - self.beta_min) * drop).sqrt()
        return match(2.0 * drop / (self.beta_min + root), log_snr)

    def _log_alpha_bar(self, t: Tensor) -> Tensor:
        time = t.double()
        return -0.5 * time.square() * (self.beta_max - self.beta_min) - time * self.beta_min


@dataclass(frozen=True)
class VPScaledLinear(_ByAlphaBar):
    """Betas with evenly spaced square roots, t in [0, 1]: ln ᾱ = -∫β = -(r(t)³ - r(0)³) / 3(r(1) - r(0)), r(t) = √β(t).

    Source: Rombach et al., latent diffusion (arXiv 2112.10752), whose code calls it linear; diffusers' "scaled_linear".
    The defaults are the limit of Stable Diffusion's 1,000 betas from 8.5e-4 to 0.012.
    """

    beta_min: float = 0.85
    beta_max: float = 12.0

    def time(self, log_snr: Tensor) -> Tensor:
        drop = nn.functional.softplus(-log_snr.double())  # -ln ᾱ
        first, span = self._roots
        return match(((first**3 + 3.0 * span * drop).pow(1.0 / 3.0) - first) / span, log_snr)

    def _log_alpha_bar(self, t: Tensor) -> Tensor:
        first, span = self._roots
        # The difference of the cubes, without its cancellation at t = 0.
        time = t.double()
        return -time * (first**2 + first * span * time + (span * time).square() / 3.0)

    @property
    def _roots(self) -> tuple[float, float]:
        first = math.sqrt(self.beta_min)
        return first, math.sqrt(self.beta_max) - first


@dataclass(frozen=True)
class EDM(NoiseProcess):
    """Variance exploding: alpha = 1, and t is sigma itself, in [0, inf).

    Source: Karras et al., EDM (arXiv 2206.00364), table 1.
    """

    t_range = (0.0, math.inf)

    def alpha(self, t: Tensor) -> Tensor:
        return match(torch.ones_like(t), t)

    def sigma(self, t: Tensor) -> Tensor:
        return match(t, t)

    def log_snr(self, t: Tensor) -> Tensor:
        return from_sigma(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return match((-0.5 * log_snr.double()).exp(), log_snr)


@dataclass(frozen=True)
class Flow(NoiseProcess):
    """Straight path between data and noise, t in [0, 1] (flow matching, rectified flow).

    data_at = 0: alpha = 1 - t, sigma = t (SD3, diffusers). data_at = 1: alpha = t, sigma = 1 - t (torchcfm,
    flow_matching). Source: Lipman et al., Flow matching (arXiv 2210.02747), section 4.1, with sigma_min = 0.
    """

    data_at: int = 0

    def __post_init__(self) -> None:
        require_direction(self.data_at)

    def alpha(self, t: Tensor) -> Tensor:
        return match(t if self.data_at == 1 else 1.0 - t.double(), t)

    def sigma(self, t: Tensor) -> Tensor:
        return match(1.0 - t.double() if self.data_at == 1 else t, t)

    def log_snr(self, t: Tensor) -> Tensor:
        return from_flow_time(t, data_at=self.data_at)

    def time(self, log_snr: Tensor) -> Tensor:
        half = 0.5 * log_snr.double()
        return match((half if self.data_at == 1 else -half).sigmoid(), log_snr)
