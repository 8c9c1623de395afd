"""A weighting given by a table over log-SNR bins, for example the final weights of another run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._validation import check_log_snr, is_number
from ..ops.problem import Bins
from ..ops.reference import log_weight_at
from ..statistics import checked_bins
from .fixed import FixedWeighting


@dataclass(frozen=True)
class WeightTable(FixedWeighting):
    """w(λ) by linear interpolation of ln w between bin centres, flat beyond the outer ones, as in adaptive tables.

    Args:
        weights: w at the centre of each bin, K positive numbers.
        log_snr_range: (low, high) of the bins.

    Raises:
        ValueError: fewer than two weights, one that is not positive and finite, or an invalid range.
    """

    weights: tuple[float, ...]
    log_snr_range: tuple[float, float] = (-16.0, 16.0)
    # ln w per device, cached because a copy at every step would synchronise.
    _log_weights: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.weights) < 2 or not all(is_number(weight) and 0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"weights is {self.weights!r}, expected two positive finite numbers or more")
        checked_bins(len(self.weights), self.log_snr_range)

    def __call__(self, log_snr: Tensor) -> Tensor:
        check_log_snr(log_snr)
        low, high = self.log_snr_range
        if log_snr.device not in self._log_weights:
            table = torch.tensor(self.weights, dtype=torch.float32, device=log_snr.device)
            self._log_weights[log_snr.device] = table.log()
        bins = Bins(len(self.weights), low, high)
        return log_weight_at(self._log_weights[log_snr.device], log_snr.float(), bins).exp()
