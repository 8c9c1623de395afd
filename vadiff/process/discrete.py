"""Variance-preserving processes in discrete timesteps, as most trainers have them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import betas
from ..log_snr import from_alphas_cumprod
from .base import NoiseProcess, match


class DiscreteVP(NoiseProcess):
    """A table of ᾱ for the timesteps 0 to T - 1; log-SNR is linear in t between and half a step beyond them.

    Timestep i stands for the times i - 1/2 to i + 1/2, so that uniform times give uniform timesteps.

    Args:
        alphas_cumprod: ᾱ, [T], T >= 2, falling, above 0 but for a last one of 0 (zero terminal SNR), below 1.

    Raises:
        ValueError: not such a table.

    Example:
        >>> DiscreteVP.linear(1000).log_snr(torch.tensor([0.0, 999.0]))
        tensor([  9.2102, -10.1177])
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = alphas_cumprod.detach().double().cpu()
        if table.dim() != 1 or len(table) < 2:
            raise ValueError(f"alphas_cumprod has shape {tuple(table.shape)}, expected (T,) with at least 2 timesteps")
        if not bool((table.diff() < 0).all()) or not bool(table[0] < 1) or not bool(table[-1] >= 0):
            raise ValueError("alphas_cumprod does not fall from below 1 to 0 or above, as a noise process does")
        self.alphas_cumprod = table
        self.t_range = (-0.5, len(table) - 0.5)
        self._table = from_alphas_cumprod(table, torch.arange(len(table), device="cpu")).double()  # falling
        self._on: dict[torch.device, Tensor] = {}

    @classmethod
    def linear(cls, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteVP:
        """Evenly spaced betas: DDPM (arXiv 2006.11239, section 4)."""
        return cls._of_betas(betas.linear(timesteps, beta_start, beta_end))

    @classmethod
    def scaled_linear(cls, timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> DiscreteVP:
        """Betas with evenly spaced square roots: latent diffusion (arXiv 2112.10752) and Stable Diffusion."""
        return cls._of_betas(betas.scaled_linear(timesteps, beta_start, beta_end))

    @classmethod
    def cosine(cls, timesteps: int = 1000, s: float = 0.008) -> DiscreteVP:
        """ᾱ of the cosine schedule, with betas of at most 0.999: Improved DDPM (arXiv 2102.09672, eq. 17)."""
        return cls._of_betas(betas.cosine(timesteps, s))

    @classmethod
    def _of_betas(cls, beta: Tensor) -> DiscreteVP:
        return cls((1.0 - beta).cumprod(0))

    def with_zero_terminal_snr(self) -> DiscreteVP:
        """Shifted and scaled so that the last timestep is pure noise: Lin et al. (arXiv 2305.08891, algorithm 1)."""
        return DiscreteVP(betas.with_zero_terminal_snr(self.alphas_cumprod))

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def alpha(self, t: Tensor) -> Tensor:
        return match(self.log_snr(t.double()).sigmoid().sqrt(), t)

    def sigma(self, t: Tensor) -> Tensor:
        return match((-self.log_snr(t.double())).sigmoid().sqrt(), t)

    def log_snr(self, t: Tensor) -> Tensor:
        table, position = self._table_on(t.device), t.double()
        below = position.floor().clamp(0, self.timesteps - 2).long()
        share = position - below
        lower, upper = table[below], table[below + 1]
        between = lower + share * (upper - lower)  # NaN at infinite ends
        between = torch.where(share == 0.0, lower, torch.where(share == 1.0, upper, between))
        return match(between, t)

    def time(self, log_snr: Tensor) -> Tensor:
        table, value = self._table_on(log_snr.device), log_snr.double()
        # The last entry that is not below: the table falls.
        below = (torch.searchsorted(-table, -value, right=True) - 1).clamp(0, self.timesteps - 2)
        lower, upper = table[below], table[below + 1]
        share = ((value - lower) / (upper - lower)).clamp(-0.5, 1.5)
        share = torch.where(value == upper, 1.0, torch.where(upper.isinf(), 0.0, share))
        low, high = self.t_range
        return match((below + share).clamp(low, high), log_snr)

    def timestep(self, log_snr: Tensor) -> Tensor:
        """The nearest timestep of each log-SNR. [B] int64."""
        return self.time(log_snr.double()).round().clamp(0, self.timesteps - 1).long()

    def _table_on(self, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = self._table.to(device)
        return self._on[device]

    def __repr__(self) -> str:
        high, low = self._table[0].item(), self._table[-1].item()
        return f"DiscreteVP(timesteps={self.timesteps}, log_snr={high:.4g} to {low:.4g})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DiscreteVP) and torch.equal(self.alphas_cumprod, other.alphas_cumprod)

    def __hash__(self) -> int:
        return hash(tuple(self.alphas_cumprod.tolist()))
