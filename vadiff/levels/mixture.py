"""Mixture of two distributions of noise levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._validation import require_number
from .adaptive import require_not_adaptive
from .fixed import EVERYWHERE, UniformTime
from .sampler import LARGEST, SMALLEST, LevelSampler

_REACH, _STEP = 37.5, 1 / 64  # nodes of the quantile in logit(u), which ends at 53·ln 2 = 36.7
_FAR = 200.0  # log-SNR beyond which a level is pure noise (zero terminal SNR) or none
_ROUNDS_FOR_NODES, _ROUNDS = 80, 26  # two nodes are some hundredths apart in log-SNR, except across gaps


class Mixture(LevelSampler):
    """Draws from the first distribution, and a share of them from the second: p = (1 - share)·p1 + share·p2.

    One uniform number decides both and the level, so that noise still grows with u and stratified numbers give
    stratified levels. The usual second distribution is uniform in the time of a flow, which keeps every level trained
    under a narrow first one.

    Args:
        first: any sampler that neither adapts nor corrects its draws. For an adaptive one, mix its base.
        second: another; `UniformTime()` of a flow by default.
        share: of draws from the second, between 0 and 1.

    Raises:
        TypeError: not a `LevelSampler`, or an adaptive one.
        ValueError: a share out of bounds, or a sampler that corrects its draws.

    Example:
        >>> Mixture(vadiff.levels.LogitNormal(), vadiff.levels.LogNormal(), share=0.1)
        Mixture(LogitNormal(mean=0, std=1), LogNormal(p_mean=-1.2, p_std=1.2), share=0.1)
    """

    nodes: Tensor  # int64 [N], bits of float64: log-SNR at equal steps of logit(u)

    def __init__(self, first: LevelSampler, second: LevelSampler | None = None, share: float = 0.1) -> None:
        super().__init__()
        second = UniformTime() if second is None else second
        for name, sampler in (("first", first), ("second", second)):
            if require_not_adaptive(name, sampler).corrected:
                raise ValueError(
                    f"{name} is {sampler}, expected a sampler that does not correct its draws: its sample weights "
                    "belong to its own density. Mix its base"
                )
        self.first, self.second = first, second
        self.share = require_number("share", share, above=0.0)
        if self.share >= 1.0:
            raise ValueError(f"share is {share!r}, expected below 1: use the second sampler alone")
        count = round(2 * _REACH / _STEP) + 1
        u = torch.linspace(-_REACH, _REACH, count, dtype=torch.float64).sigmoid()
        self.register_buffer("nodes", self._bisected(u).view(torch.int64), persistent=False)
        self._restrict(EVERYWHERE)  # both have their own range
        ranges = (first.log_snr_range, second.log_snr_range)
        self.log_snr_range = (min(low for low, _ in ranges), max(high for _, high in ranges))

    def _bisected(self, u: Tensor) -> Tensor:
        """Log-SNR at u: it lies between the quantiles of the two."""
        u = u.clamp(SMALLEST, LARGEST)
        ends = torch.stack([self.first._levels(u), self.second._levels(u)])
        return self._halved(u, ends.amin(0), ends.amax(0), _ROUNDS_FOR_NODES)

    def _halved(self, u: Tensor, low: Tensor, high: Tensor, rounds: int) -> Tensor:
        """Log-SNR at u between low and high, by halving the interval; an infinite end where draws remain there."""
        less, more = low.clamp(min=-_FAR), high.clamp(max=_FAR)
        noisiest, cleanest = (low < less) & (self._cdf(less) < u), (high > more) & (self._cdf(more) > u)
        for _ in range(rounds):
            middle = 0.5 * (less + more)
            noisier = self._cdf(middle) > u  # than the level sought
            less, more = torch.where(noisier, middle, less), torch.where(noisier, more, middle)
        found = torch.where(noisiest, -math.inf, 0.5 * (less + more))
        return torch.where(cleanest, math.inf, found)

    def _quantile(self, u: Tensor) -> Tensor:
        nodes = self.nodes.view(torch.float64)
        place = ((u.logit() + _REACH) / _STEP).floor().clamp(0, len(nodes) - 2).long()
        return self._halved(u, nodes[place + 1], nodes[place], _ROUNDS)

    def _cdf(self, log_snr: Tensor) -> Tensor:
        return torch.lerp(self.first.cdf(log_snr), self.second.cdf(log_snr), self.share)

    def _log_density(self, log_snr: Tensor) -> Tensor:
        first = self.first.log_density(log_snr) + math.log1p(-self.share)
        return torch.logaddexp(first, self.second.log_density(log_snr) + math.log(self.share))

    def __repr__(self) -> str:
        return f"Mixture({self.first}, {self.second}, share={self.share:g})"
