"""How much of the x0 error a posterior-mean target takes out, per noise level: J*_M, estimated while training."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._ranks import number_of_ranks

_BINS, _LOW, _HIGH = 128, -16.0, 16.0  # of log-SNR
_WIDTH = (_HIGH - _LOW) / _BINS
_ENOUGH = 64.0  # draws near a level before it is judged


class RemovedError(nn.Module):
    """Mean posterior variance per element over the draws at each noise level, which does not depend on the network.

    Args:
        threshold: share of the data's variance below which a level counts as without any.
        sync: add up the draws of all ranks of the default process group.
    """

    sums: Tensor  # int64 [2, bins]: bits of float64 number of draws, and sum of their variances; survives `.half()`
    limit: Tensor  # int64 scalar: bits of float64, threshold times the variance of the data per element

    def __init__(self, threshold: float, sync: bool = False) -> None:
        super().__init__()
        self.threshold, self.sync = threshold, sync
        self.register_buffer("sums", torch.zeros(2, _BINS, dtype=torch.int64))
        self.register_buffer("limit", torch.zeros((), dtype=torch.int64))

    def set_variance(self, variance: Tensor) -> None:
        """Set the variance of the data, per element, scalar float64; 0: no level is judged.

        Does not synchronise with a GPU, as nothing here does."""
        self.limit.view(torch.float64).copy_(self.threshold * variance)

    def forget_where(self, when: Tensor) -> None:
        """Forget all draws if `when`, a bool scalar, is true."""
        self.sums.mul_(~when)

    def record(self, log_snr: Tensor, variance: Tensor, taken: Tensor) -> None:
        """Add the draws that are `taken` (bool [B]). log_snr, variance: [B]."""
        place = ((log_snr.double() - _LOW) / _WIDTH).floor().clamp(0, _BINS - 1)
        taken = taken & variance.isfinite() & ~log_snr.isnan()
        # A product, because adding up by index has no fixed order on a GPU.
        here = (place == torch.arange(_BINS, device=place.device)[:, None]).double()  # [bins, B]
        values = torch.stack([taken.double(), torch.where(taken, variance, 0.0).double()], dim=1)
        found = here @ values
        if self.sync and number_of_ranks() > 1:
            dist.all_reduce(found)
        self.sums.view(torch.float64).add_(found.T)

    def at(self, log_snr: Tensor) -> Tensor:
        """J*_M per element at each log-SNR, 0 where the draws keep their own target. [N] → [N] float64."""
        draws, variance = self._near(log_snr)
        return torch.where(self._negligible(draws, variance), 0.0, variance)

    def keeps_own(self, log_snr: Tensor) -> Tensor:
        """Whether J*_M is known to be below the threshold there. [N] → bool [N]."""
        return self._negligible(*self._near(log_snr))

    def _negligible(self, draws: Tensor, variance: Tensor) -> Tensor:
        return (draws >= _ENOUGH) & (variance < self.limit.view(torch.float64))

    def _near(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """Number of draws near each level, and the mean of their variances, weighted by a Gaussian of one bin."""
        sums = self.sums.view(torch.float64)
        centers = _LOW + (torch.arange(_BINS, device=sums.device) + 0.5) * _WIDTH
        at = log_snr.double().clamp(_LOW, _HIGH).nan_to_num()
        weights = torch.exp(-0.5 * ((at[:, None] - centers) / _WIDTH).square())  # [N, bins]
        draws, total = (weights @ sums.T).unbind(1)
        return draws, torch.where(draws > 0, total / draws, 0.0)
