"""Running statistics of the base loss per log-SNR bin: the buffers of a criterion, and properties to read them."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn

from ._validation import is_number
from .ops.problem import Bins, State
from .ops.reference import moments_of, variance


class LogSNRStatistics(nn.Module):
    """Per-bin count, mean, variance and mass of the base loss g = u*ell, with forgetting.

    The numbers are float64, kept in integer buffers so that `module.half()` and `.to(torch.bfloat16)` leave them alone;
    they move between devices, and into `state_dict`, like any buffer. `DiffusionLoss` updates them; reading returns
    copies. Their bits cannot be averaged: keep `use_buffers=False` in `AveragedModel` around a criterion.

    Args:
        bins: number K of equal-width intervals of log-SNR, 2 to 1024.
        log_snr_range: (low, high) of the intervals; samples outside fall in the end bins.
        half_life: mean number of samples per bin after which a sample counts half; `inf` forgets nothing.

    Raises:
        ValueError: bins, range or half-life out of bounds.
        RuntimeError: from `load_state_dict`, when the saved bins or range differ from these; nothing is loaded then.
    """

    state: Tensor  # int64 [4K + 2]: bits of float64 n, mean, M2, mass; skipped samples; the kernels' ticket
    log_weights: Tensor  # int32 [K]: bits of float32 ln w
    log_snr_range: Tensor  # int64 [2]: bits of float64 low, high

    def __init__(
        self, bins: int = 128, log_snr_range: tuple[float, float] = (-16.0, 16.0), half_life: float = 256.0
    ) -> None:
        super().__init__()
        self.bins = checked_bins(bins, log_snr_range)
        if not is_number(half_life) or not half_life > 0:
            raise ValueError(
                f"half_life is {half_life!r}, expected a positive number of samples per bin "
                f"(float('inf') forgets nothing)"
            )
        self.half_life = float(half_life)
        self.register_buffer("state", torch.zeros(4 * self.bins.size + 2, dtype=torch.int64))
        self.register_buffer("log_weights", torch.zeros(self.bins.size, dtype=torch.int32))
        self.register_buffer("log_snr_range", torch.zeros(2, dtype=torch.int64))
        self.reset_parameters()

    def _moments(self) -> Tensor:
        return moments_of(self.state, self.bins)

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
        """Number of samples with a NaN log-SNR or a non-finite loss or weight, over all ranks. int64 scalar."""
        return self.state[4 * self.bins.size].clone()

    def reset(self) -> None:
        """Forget everything: empty bins, weights of 1."""
        self.state.zero_()
        self.log_weights.zero_()

    def reset_parameters(self) -> None:
        """Initialise the buffers, as after `to_empty` on a module made on the meta device."""
        self.reset()
        limits = torch.tensor([self.bins.low, self.bins.high], dtype=torch.float64, device="cpu")
        self.log_snr_range.copy_(limits.view(torch.int64))

    def checked_state(self, name: str, tensor: Tensor) -> State:
        """The buffers that a call on `tensor` reads and updates, checked because kernels write into them.

        Raises:
            ValueError: the buffers are on another device than `tensor`, the argument `name`.
            RuntimeError: the buffers have another dtype or size than `bins` needs.
        """
        buffers, size = self._buffers, self.bins.size  # as attributes they take 0.7 µs
        state, log_weights = buffers["state"], buffers["log_weights"]
        assert state is not None
        assert log_weights is not None
        if state.device != tensor.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but the criterion is on {state.device}. "
                f"Use criterion.to({str(tensor.device)!r})."
            )
        if (
            state.dtype is not torch.int64
            or log_weights.dtype is not torch.int32
            or state.numel() != 4 * size + 2
            or log_weights.numel() != size
        ):
            raise RuntimeError(
                f"the criterion's statistics are {state.dtype} {tuple(state.shape)} and {log_weights.dtype} "
                f"{tuple(log_weights.shape)}, expected torch.int64 ({4 * size + 2},) and torch.int32 ({size},): bits "
                "of floats, which module.type(...) destroys and module.to(...) keeps. Make a new criterion"
            )
        return State(state, log_weights)

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
        for name, buffer in self.named_buffers(recurse=False):
            found = state_dict.get(prefix + name)
            if isinstance(found, Tensor):
                reason = self._mismatch(name, found, buffer)
                if reason:
                    error_msgs.append(f"{prefix}{name} {reason}")
                    return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.state[-1] = 0  # the kernels' ticket, nonzero if the state was saved while a kernel ran

    def _mismatch(self, name: str, found: Tensor, buffer: Tensor) -> str | None:
        """Why a saved buffer cannot be loaded; None if it can."""
        if found.dtype != buffer.dtype:
            return f"has dtype {found.dtype}, expected {buffer.dtype}: bits of floats, which a cast destroys"
        if found.shape != buffer.shape:
            bins = (found.numel() - 2) // 4 if name == "state" else found.numel()
            return (
                f"holds statistics of {bins} bins, expected {self.bins.size}: make the criterion with bins={bins}, "
                "or start with fresh statistics"
            )
        if name == "log_snr_range":
            low, high = found.cpu().view(torch.float64).tolist()
            if (low, high) != (self.bins.low, self.bins.high):
                return (
                    f"is ({low:g}, {high:g}), expected ({self.bins.low:g}, {self.bins.high:g}): make the criterion "
                    f"with log_snr_range=({low:g}, {high:g}), or start with fresh statistics"
                )
        return None


def checked_bins(bins: int, log_snr_range: tuple[float, float]) -> Bins:
    """The arguments as `Bins`; raises ValueError if they are out of bounds."""
    if not (is_number(bins) and isinstance(bins, numbers.Integral) and 2 <= bins <= 1024):
        raise ValueError(f"bins is {bins!r}, expected an integer from 2 to 1024")
    try:
        low, high = (float(limit) for limit in log_snr_range)
    except (TypeError, ValueError):
        raise ValueError(f"log_snr_range is {log_snr_range!r}, expected two numbers (low, high) of log-SNR") from None
    if not (low < high and math.isfinite(high - low) and high - low > 1e-6 * max(abs(low), abs(high))):
        raise ValueError(
            f"log_snr_range is ({low}, {high}), expected finite low < high: natural log of alpha**2/sigma**2"
        )
    return Bins(int(bins), low, high)
