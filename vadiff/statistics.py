"""Running statistics of the base loss per log-SNR bin: the buffers of a criterion, and properties to read them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._validation import is_number
from .ops.problem import Bins, State, StateTotals, TableRule, check_state, state_size
from .ops.reference import levels_of, moments_of, totals_of, variance, weight_table

_SUMS = slice(StateTotals._fields.index("level_free"), StateTotals._fields.index("samples") + 1)
_SINCE_SHARES = StateTotals._fields.index("since_shares")
_LAST_READ = StateTotals._fields.index("last_read")

_NO_STATISTICS = "the saved state has no statistics of noise levels, as in a run begun without vadiff"
_START_AFRESH = "To start them afresh, once, make the criterion with fresh_statistics=True"


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

    state: Tensor  # int64 [6K + 14], see `ops.problem.State`
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
        self.register_buffer("state", torch.zeros(state_size(self.bins.size), dtype=torch.int64))
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

    @property
    def outside(self) -> Tensor:
        """Effective number of samples with log-SNR below and above the range, in the end bins too. [2] float64."""
        return totals_of(self.state, self.bins)[:2].clone()

    @property
    def samples_since_shares(self) -> Tensor:
        """Number of samples recorded since a sampler last set its shares, or since the start. float64 scalar."""
        return totals_of(self.state, self.bins)[_SINCE_SHARES].clone()

    def read_level_free_loss(self) -> Tensor:
        """See `DiffusionLoss.level_free_loss`. Starts a new mean; does not synchronise."""
        totals = totals_of(self.state, self.bins)
        loss, samples = totals[_SUMS]
        read = torch.where(samples > 0, loss / samples, totals[_LAST_READ])
        totals[_LAST_READ] = read
        totals[_SUMS] = 0.0
        return read.float()

    def use_level_shares(self, shares: Tensor | None, sample_weight: Tensor | None = None) -> None:
        """Set the distribution of the noise levels over which the level-free loss averages.

        Without it each bin has its running share of the samples. After a change of the sampler this lags by some
        half-lives, and the level-free loss is biased towards the old levels. Adaptive samplers call this at each
        update. Without another call the shares are followed for half_life * K samples.

        Args:
            shares: [K] share of the draws in each bin, of sum 1; None: the running shares. Copied, without
                synchronising.
            sample_weight: [K] mean sample weight that the sampler gives in each bin, base/p; None: 1. Factors of your
                own in `sample_weight` of the call are found from the calls.

        Raises:
            TypeError: an argument is not a tensor.
            ValueError: it is not [K]; or, on a CPU, where reading waits for nothing, it has negative or non-finite
                numbers, or the shares do not add up to 1.
        """
        if shares is None:
            levels_of(self.state, self.bins).zero_()
            return
        given = {"shares": shares} if sample_weight is None else {"shares": shares, "sample_weight": sample_weight}
        for name, values in given.items():
            self._check_per_bin(name, values)
        if shares.device.type == "cpu" and not math.isclose(shares.double().sum().item(), 1.0, abs_tol=1e-3):
            raise ValueError(f"shares has sum {shares.sum().item():g}, expected 1: the share of the draws in each bin")
        self.set_level_shares(shares, sample_weight)

    @torch.no_grad()
    def set_level_shares(self, shares: Tensor, sample_weight: Tensor | None) -> None:
        """`use_level_shares` without checks, for samplers: it also runs under torch.compile."""
        levels = levels_of(self.state, self.bins)
        levels[0].copy_(shares)
        levels[1].copy_(torch.ones_like(shares) if sample_weight is None else sample_weight)
        totals_of(self.state, self.bins)[_SINCE_SHARES] = 0.0

    def _check_per_bin(self, name: str, values: Tensor) -> None:
        if not isinstance(values, Tensor):
            raise TypeError(f"{name} is a {type(values).__name__}, expected a tensor of shape ({self.bins.size},)")
        if values.shape != (self.bins.size,):
            raise ValueError(f"{name} has shape {tuple(values.shape)}, expected ({self.bins.size},): one per bin")
        if values.device.type == "cpu" and not bool((values.isfinite() & (values >= 0)).all()):
            raise ValueError(f"{name} has a negative or non-finite number, expected numbers of at least 0")

    @torch.no_grad()
    def remake_table(self, rule: TableRule) -> None:
        """Make the weights of another rule from the statistics; without a table in the rule nothing reads them."""
        state = self.checked_state("weighting", self.state)
        if rule.statistic:
            table = weight_table(moments_of(state.state, self.bins), self.bins, rule)
            state.log_weights.view(torch.float32).copy_(table)

    def reset(self) -> None:
        """Forget everything: empty bins, weights of 1."""
        self.state.zero_()
        totals_of(self.state, self.bins)[_LAST_READ] = math.nan
        self.log_weights.zero_()

    def reset_parameters(self) -> None:
        """Initialise the buffers, as after `to_empty` on a module made on the meta device."""
        self.reset()
        limits = torch.tensor([self.bins.low, self.bins.high], dtype=torch.float64, device="cpu")
        self.log_snr_range.copy_(limits.view(torch.int64))

    def as_state(self) -> State:
        """The buffers that a call reads and updates, not checked."""
        buffers = self._buffers  # as attributes they take 0.7 µs
        return tuple.__new__(State, (buffers["state"], buffers["log_weights"]))

    def checked_state(self, name: str, tensor: Tensor) -> State:
        """The buffers, checked for a call on `tensor`, the argument `name`; raises as `check_state`."""
        return check_state(self.as_state(), self.bins, name, tensor)

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
        saved = state_dict.get(prefix + "state")
        if isinstance(saved, Tensor) and self._is_older(saved):
            state_dict[prefix + "state"] = self._of_now(saved)
        problem = self.problem_with_state(state_dict, prefix)
        if problem is not None and saved is not None:
            error_msgs.append(f"{problem}. {_START_AFRESH}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if saved is None:  # torch appends the names that are missing
            missing_keys[:] = [_Missing(key) if key == prefix + "state" else key for key in missing_keys]
        self.state[4 * self.bins.size + 1] = 0  # the kernels' ticket, nonzero if saved while a kernel ran

    def problem_with_state(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Why saved buffers cannot be loaded; None if they can."""
        if f"{prefix}state" not in state_dict:
            return _NO_STATISTICS
        for name, buffer in self.named_buffers(recurse=False):
            found = state_dict.get(prefix + name)
            if not isinstance(found, Tensor) or (name == "state" and self._is_older(found)):
                continue
            reason = self._mismatch(name, found, buffer, state_dict.get(prefix + "log_weights"))
            if reason:
                return f"{prefix}{name} {reason}"
        return None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._is_older(self.state):
            self._buffers["state"] = self._of_now(self.state)

    def _is_older(self, state: Tensor) -> bool:
        """Whether this is the state of vadiff 0.1, which ended at the ticket."""
        return state.dtype is torch.int64 and state.shape == (4 * self.bins.size + 2,)

    def _of_now(self, older: Tensor) -> Tensor:
        state = older.new_zeros(state_size(self.bins.size))
        state[: len(older)] = older
        totals_of(state, self.bins)[_LAST_READ] = math.nan
        return state

    def _mismatch(self, name: str, found: Tensor, buffer: Tensor, log_weights: Tensor | None) -> str | None:
        """Why a saved buffer cannot be loaded; None if it can. log_weights: the saved one, with an entry per bin."""
        if found.dtype != buffer.dtype:
            return f"has dtype {found.dtype}, expected {buffer.dtype}: bits of floats, which a cast destroys"
        if found.shape != buffer.shape:
            bins = found.numel() if log_weights is None else log_weights.numel()
            return f"holds statistics of {bins} bins, expected {self.bins.size}: make the criterion with bins={bins}"
        if name == "log_snr_range":
            low, high = found.cpu().view(torch.float64).tolist()
            if (low, high) != (self.bins.low, self.bins.high):
                return (
                    f"is ({low:g}, {high:g}), expected ({self.bins.low:g}, {self.bins.high:g}): make the criterion "
                    f"with log_snr_range=({low:g}, {high:g})"
                )
        return None


class _Missing(str):
    """Name of a missing buffer, which torch's error shows with what to do; it is no error with strict=False."""

    def __format__(self, spec: str) -> str:
        return f"{format(str(self), spec)} ({_NO_STATISTICS}. {_START_AFRESH})"


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
