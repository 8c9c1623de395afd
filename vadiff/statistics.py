"""Running statistics of the base loss per log-SNR bin: the buffers a criterion owns, and how people read them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .reference import Bins, variance


class LogSNRStatistics(nn.Module):
    """Per-bin count, mean, variance and mass of the base loss g = u*ell, with forgetting.

    The numbers are float64, kept in integer buffers so that `module.half()` and `.to(torch.bfloat16)` leave them alone;
    they move between devices, and into `state_dict`, like any buffer. `DiffusionLoss` updates them; reading returns
    copies.

    Args:
        bins: number K of equal-width intervals of log-SNR, 2 to 1024.
        log_snr_range: (low, high) of the intervals; samples outside fall in the end bins.
        half_life: samples per bin, on average, after which a sample counts half; `inf` forgets nothing.

    Raises:
        ValueError: bins, range or half-life out of bounds.
        RuntimeError: from `load_state_dict`, when the saved bins or range differ from these; nothing is loaded then.
    """

    state: Tensor  # int64 [4K + 1]: bits of float64 n, mean, M2, mass; then the count of skipped samples
    log_weights: Tensor  # int32 [K]: bits of float32 ln w
    log_snr_range: Tensor  # int64 [2]: bits of float64 low, high

    def __init__(
        self, bins: int = 128, log_snr_range: tuple[float, float] = (-16.0, 16.0), half_life: float = 256.0
    ) -> None:
        super().__init__()
        self.bins = _checked_bins(bins, log_snr_range)
        if isinstance(half_life, bool) or not isinstance(half_life, (int, float)) or not half_life > 0:
            raise ValueError(
                f"half_life is {half_life!r}, expected a positive number of samples per bin "
                f"(float('inf') forgets nothing)"
            )
        self.half_life = float(half_life)
        self.register_buffer("state", torch.zeros(4 * self.bins.size + 1, dtype=torch.int64))
        self.register_buffer("log_weights", torch.zeros(self.bins.size, dtype=torch.int32))
        limits = torch.tensor([self.bins.low, self.bins.high], dtype=torch.float64)
        self.register_buffer("log_snr_range", limits.view(torch.int64))

    def _moments(self) -> Tensor:
        return self.state[:-1].view(torch.float64).view(4, self.bins.size)

    @property
    def count(self) -> Tensor:
        """Effective number of samples per bin, after forgetting. [K] float64."""
        return self._moments()[0].clone()

    @property
    def mean(self) -> Tensor:
        """Mean base loss per bin, NaN where a bin is empty. [K] float64."""
        n, mean, *_ = self._moments()
        return mean.where(n > 0, math.nan)

    @property
    def variance(self) -> Tensor:
        """Variance of the base loss per bin, M2 / max(n - 1, n/2), NaN where a bin is empty. [K] float64."""
        n, _, m2, _ = self._moments()
        return variance(n, m2)

    @property
    def relative_std(self) -> Tensor:
        """Standard deviation over mean of the base loss per bin, NaN where a bin is empty. [K] float64."""
        return self.variance.sqrt() / self.mean

    @property
    def mass(self) -> Tensor:
        """Sum of the sample weights per bin, after forgetting. [K] float64."""
        return self._moments()[3].clone()

    @property
    def skipped(self) -> Tensor:
        """How many samples were not recorded, for a NaN log-SNR or a non-finite loss or weight, over all ranks.
        int64 scalar."""
        return self.state[-1].clone()

    def reset(self) -> None:
        """Forget everything: empty bins, weights of 1."""
        self.state.zero_()
        self.log_weights.zero_()

    def extra_repr(self) -> str:
        low, high = self.bins.low, self.bins.high
        return f"bins={self.bins.size}, log_snr_range=({low:g}, {high:g}), half_life={self.half_life:g}"

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = state_dict.get(prefix + "state")
        limits = state_dict.get(prefix + "log_snr_range")
        if isinstance(found, Tensor) and found.shape != self.state.shape:
            error_msgs.append(
                f"{prefix}state holds statistics of {(found.numel() - 1) // 4} bins, expected {self.bins.size}: "
                f"make the criterion with bins={(found.numel() - 1) // 4}, or start with fresh statistics"
            )
            return
        if isinstance(limits, Tensor) and not torch.equal(limits.cpu(), self.log_snr_range.cpu()):
            low, high = limits.cpu().view(torch.float64).tolist()
            error_msgs.append(
                f"{prefix}log_snr_range is ({low:g}, {high:g}), expected ({self.bins.low:g}, {self.bins.high:g}): "
                f"make the criterion with log_snr_range=({low:g}, {high:g}), or start with fresh statistics"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _checked_bins(bins: int, log_snr_range: tuple[float, float]) -> Bins:
    if isinstance(bins, bool) or not isinstance(bins, int) or not 2 <= bins <= 1024:
        raise ValueError(f"bins is {bins!r}, expected an integer from 2 to 1024")
    try:
        low, high = (float(limit) for limit in log_snr_range)
    except (TypeError, ValueError):
        raise ValueError(f"log_snr_range is {log_snr_range!r}, expected two numbers (low, high) of log-SNR") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"log_snr_range is ({low}, {high}), expected finite low < high: natural log of alpha**2/sigma**2"
        )
    return Bins(bins, low, high)
