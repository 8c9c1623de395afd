"""Base class of noise-level samplers: an inverse CDF from uniform numbers to log-SNR, with its density."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._validation import require_count
from ..loss import DiffusionLoss

SMALLEST, LARGEST = 2.0**-54, 1.0 - 2.0**-53  # bounds of u, so that it is never 0 or 1


class NoiseLevels(NamedTuple):
    """The noise levels of a batch."""

    log_snr: Tensor  # [B] float32
    sample_weight: Tensor | None  # [B] float32: base/p, with expectation 1; None if not corrected

    @property
    def sigma(self) -> Tensor:
        """sigma/alpha = e**(-log_snr/2): the noise level of a variance-exploding process. [B] float32."""
        return (-0.5 * self.log_snr).exp()


def uniforms(samples: int, generator: torch.Generator, *, stratified: bool = False, antithetic: bool = False) -> Tensor:
    """Uniform numbers in (0, 1) for the levels of one global batch.

    With several ranks, every rank draws the whole global batch from the same seed and takes its own slice: 1 x 64 and
    2 x 32 then train on the same levels, and strata and pairs span the ranks.

    Args:
        samples: size of the global batch.
        generator: the result is on its device.
        stratified: one number in each of `samples` equal parts of (0, 1), in random order: every batch covers all
            noise levels, and means over a batch have less variance.
        antithetic: numbers in pairs u, 1 - u (in an odd batch one is unpaired). Both together: stratified pairs.

    Returns:
        [samples] float64.

    Raises:
        TypeError: generator is not a `torch.Generator`.
        ValueError: samples is not a positive integer.
    """
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {generator!r}, expected a torch.Generator: the same seed on every rank")
    require_count("samples", samples, 1)
    u = torch.rand(samples, generator=generator, dtype=torch.float64, device=generator.device)
    if antithetic:
        half = samples // 2
        u[samples - half :] = 1.0 - u[:half].flip(0)
    if stratified:
        u = (torch.arange(samples, dtype=torch.float64, device=u.device) + u) / samples
    if stratified or antithetic:
        u = u[torch.randperm(samples, generator=generator, device=u.device)]
    return u.clamp(SMALLEST, LARGEST)


class LevelSampler(nn.Module, ABC):
    """A distribution of noise levels. Call it with uniform numbers u, [B] float64 in (0, 1), to get `NoiseLevels`.

    Noise grows with u, so that stratified u give stratified noise levels. Nothing synchronises with the device.

    A subclass defines `_quantile` and `_log_density` of the whole distribution, in float64, `_cdf` where it has a
    closed form, and calls `_restrict` at the end of its constructor.
    """

    log_snr_range: tuple[float, float]
    corrected: bool = False  # whether calls return sample weights

    @abstractmethod
    def _quantile(self, u: Tensor) -> Tensor:
        """Log-SNR at each u; decreasing."""

    def _cdf(self, log_snr: Tensor) -> Tensor:
        """u at each log-SNR: the share of draws with less noise. Here by bisection."""
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(60):
            middle = 0.5 * (low + high)
            cleaner = self._quantile(middle) > log_snr
            low, high = torch.where(cleaner, middle, low), torch.where(cleaner, high, middle)
        return 0.5 * (low + high)

    @abstractmethod
    def _log_density(self, log_snr: Tensor) -> Tensor:
        """ln of the density over log-SNR."""

    def _restrict(self, log_snr_range: tuple[float, float]) -> None:
        """Truncate the distribution to the range and renormalise it."""
        try:
            low, high = (float(limit) for limit in log_snr_range)
        except (TypeError, ValueError):
            raise ValueError(
                f"log_snr_range is {log_snr_range!r}, expected two numbers (low, high) of log-SNR"
            ) from None
        if not low < high:
            raise ValueError(f"log_snr_range is ({low:g}, {high:g}), expected low < high: natural log of the SNR")
        ends = torch.tensor([high, low], dtype=torch.float64)
        first, last = self._cdf(ends).tolist() if math.isfinite(low) or math.isfinite(high) else (0.0, 1.0)
        # At an unbounded end u is exactly 0 or 1; a CDF may be inexact at infinity.
        self._first = 0.0 if high == math.inf else first
        self._share = (1.0 if low == -math.inf else last) - self._first
        if not self._share > 0.0:
            raise ValueError(f"log_snr_range is ({low:g}, {high:g}), where {type(self).__name__} has no noise levels")
        self.log_snr_range = (low, high)

    def forward(self, u: Tensor) -> NoiseLevels:
        """Noise levels at uniform numbers.

        Args:
            u: [B] floating, in (0, 1); float64, as from `uniforms`, keeps the tails exact.

        Raises:
            TypeError: u is not a floating-point tensor.
            ValueError: u is not one-dimensional.
        """
        return NoiseLevels(self._levels(checked_uniforms(u)).float(), None)

    def _levels(self, u: Tensor) -> Tensor:
        """Log-SNR at u in (0, 1), float64, inside the range."""
        return self._quantile(self._first + self._share * u).clamp(*self.log_snr_range)

    def cdf(self, log_snr: Tensor) -> Tensor:
        """Share of draws with less noise than at each log-SNR [B]: the u they would come from. [B] float64."""
        share = ((self._cdf(log_snr.double()) - self._first) / self._share).clamp(0.0, 1.0)
        return share.where(~log_snr.isnan(), math.nan)

    def log_density(self, log_snr: Tensor) -> Tensor:
        """ln p(log_snr), p the density over log-SNR, [B] float64; -inf outside the range.

        The density over ln(sigma) is 2·p, that over sigma is 2·p/sigma.
        """
        low, high = self.log_snr_range
        # In the dtype of log_snr: rounded to float32, levels that were drawn may be just beyond an end.
        inside = (log_snr >= low) & (log_snr <= high) & log_snr.isfinite()
        density = self._log_density(torch.where(inside, log_snr.double().clamp(low, high), 0.0))
        return torch.where(inside, density - math.log(self._share), -math.inf)

    def update(self, criterion: DiffusionLoss, log_snr: Tensor | None = None) -> None:
        """Adapt to the last training step; a fixed distribution does nothing.

        Args:
            criterion: the training loss.
            log_snr: [B] of this rank's last batch.
        """


def checked_uniforms(u: Tensor) -> Tensor:
    """Check u [B]; return it as float64."""
    if not isinstance(u, Tensor) or not u.is_floating_point():
        got = f"has dtype {u.dtype}" if isinstance(u, Tensor) else f"is a {type(u).__name__}"
        raise TypeError(f"u {got}, expected float64: uniform numbers in (0, 1), see vadiff.levels.uniforms")
    if u.dim() != 1:
        raise ValueError(f"u has shape {tuple(u.shape)}, expected (B,): one number per sample. Use u.flatten().")
    return u.double()
