"""The loss as a careful user would write it: per-sample mean, bucketize and index_add_, Chan's formula, smoothing."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HandWrittenLoss(nn.Module):
    """The variance-aware loss with the defaults of `vadiff.DiffusionLoss`, in plain eager PyTorch."""

    def __init__(self, bins: int = 128, low: float = -16.0, high: float = 16.0, half_life: float = 256.0) -> None:
        super().__init__()
        self.half_life = half_life
        self.width = (high - low) / bins
        self.register_buffer("edges", torch.linspace(low, high, bins + 1)[1:-1])
        self.register_buffer("centers", low + (torch.arange(bins) + 0.5) * self.width)
        for name in ("n", "mean", "m2", "mass"):
            self.register_buffer(name, torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("log_weights", torch.zeros(bins, dtype=torch.float64))
        distance = (self.centers[None] - self.centers[:, None]).double()
        self.register_buffer("distance", distance)
        self.register_buffer("kernel", (-distance.square() / 0.5).exp() * (distance.abs() <= 1.5))

    def forward(self, prediction: Tensor, target: Tensor, log_snr: Tensor) -> Tensor:
        loss = F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)
        weights = self.weight_at(log_snr)
        with torch.no_grad():
            self.fold(loss.detach().double(), log_snr)
        return (weights * loss).mean()

    def weight_at(self, log_snr: Tensor) -> Tensor:
        position = ((log_snr - self.centers[0]) / self.width).clamp(0, len(self.centers) - 1)
        left = position.floor().clamp(max=len(self.centers) - 2).long()
        return torch.lerp(self.log_weights[left], self.log_weights[left + 1], (position - left).double()).exp().float()

    def fold(self, loss: Tensor, log_snr: Tensor) -> None:
        index = torch.bucketize(log_snr, self.edges, right=True)
        zeros = torch.zeros_like(self.n)
        n = zeros.index_add(0, index, torch.ones_like(loss))
        mean = zeros.index_add(0, index, loss) / n.clamp(min=1)
        m2 = zeros.index_add(0, index, (loss - mean[index]).square())
        rho = 2.0 ** (-len(loss) / (self.half_life * len(self.n)))
        total = rho * self.n + n
        delta = torch.where(n > 0, mean - self.mean, 0.0)
        share = torch.where(total > 0, n / total, 0.0)
        self.m2.mul_(rho).add_(m2 + delta.square() * rho * self.n * share)
        self.mean.add_(delta * share)
        self.n.copy_(total)
        self.mass.mul_(rho).add_(n)
        self.log_weights.copy_(self.table())

    def table(self) -> Tensor:
        std = (self.m2 / torch.maximum(self.n - 1, self.n / 2)).sqrt()
        valid = (self.n >= 2**-20) & (std > 1e-6 * self.mean.abs())
        a = torch.where(valid, -std.log(), 0.0)
        q = self.kernel * torch.where(valid, self.n, 0.0)
        total = q.sum(1)
        safe = torch.where(total > 0, total, 1.0)
        d_mean, a_mean = (q * self.distance).sum(1) / safe, (q @ a) / safe
        centred = self.distance - d_mean[:, None]
        slope = (q * centred * (a - a_mean[:, None])).sum(1) / ((q * centred.square()).sum(1) + 8.0)
        low = torch.where(q > 0, a, math.inf).amin(1)
        high = torch.where(q > 0, a, -math.inf).amax(1)
        fit = torch.where(total > 0, (a_mean - d_mean * slope).clamp(low, high), 0.0)
        share = torch.where(valid, self.mass, 0.0)
        fit = (fit - (share * fit).sum() / share.sum().clamp(min=1e-30)).clamp(-math.log(10), math.log(10))
        fit = torch.where(total > 0, fit * total / (total + 32), 0.0)
        c = (self.mass * self.mean).sum() / (self.mass * fit.exp() * self.mean).sum()
        return fit + torch.where((c > 0) & c.isfinite(), c, 1.0).log()
