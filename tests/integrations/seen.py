"""What a trainer saw, kept beside it and put into bins by NumPy; distances in units of the last place."""

from __future__ import annotations

import numpy as np
import torch
from oracle import variance_error
from torch import Tensor


class Seen:
    """Base losses and log-SNR of every batch, in float64."""

    def __init__(self) -> None:
        self.losses: list[np.ndarray] = []
        self.levels: list[np.ndarray] = []

    def add(self, loss: Tensor, log_snr: Tensor) -> None:
        self.losses.append(loss.detach().double().numpy())
        self.levels.append(log_snr.detach().double().numpy())

    def check(self, criterion: torch.nn.Module, rtol: float = 1e-6) -> None:
        """That the criterion, which has to forget nothing, recorded these and nothing else."""
        statistics = criterion.statistics
        bins = statistics.bins
        losses, levels = np.concatenate(self.losses), np.concatenate(self.levels)
        place = np.clip(np.floor((levels - bins.low) / (bins.high - bins.low) * bins.size), 0, bins.size - 1).astype(
            int
        )
        assert float(statistics.count.sum()) == len(losses)
        for k in range(bins.size):
            here = losses[place == k]
            assert float(statistics.count[k]) == len(here)
            if len(here):
                np.testing.assert_allclose(float(statistics.mean[k]), here.mean(), rtol=rtol)
            if len(here) > 1:
                variance = here.var(ddof=1)
                off = variance_error(np.float64(len(here)), here.mean(), variance, rtol)
                assert abs(float(statistics.variance[k]) - variance) <= off


def ulps(found: Tensor, expected: Tensor) -> float:
    """The largest distance of two float32 tensors, in units of the last place of the expected numbers."""
    found, expected = found.detach().reshape(-1), expected.detach().float().reshape(-1)
    spacing = torch.from_numpy(np.spacing(expected.abs().numpy()))
    return float(((found.double() - expected.double()).abs() / spacing.double()).max())
