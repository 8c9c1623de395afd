"""Distributions of the noise share t of a flow (sigma = t, alpha = 1 - t), for which ln(sigma/alpha) = logit(t)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .._validation import require_number
from .fixed import EVERYWHERE
from .sampler import LevelSampler

_LEAST, _MOST = 0.25, 100.0  # a and b of Beta
_TAIL, _STEP = 30.0, 0.01  # the table of Beta's CDF: it ends where u is about e^-30; its step in logit(t)


class LogLogistic(LevelSampler):
    """ln(sigma/alpha) logistic with a mean and a scale: sigma/alpha is log-logistic, logit(t) of a flow logistic.

    Mean 0 and scale 1 are uniform t. Of Gaussian data with standard deviation s, the information of a noise level under
    EDM's weight is distributed so, with mean ln(s) and scale 1/2 (see `Information`).

    Args:
        mean: of ln(sigma/alpha).
        scale: √3/π = 0.55 standard deviations; at most 2, above which some draws have no finite float32 sigma.
        log_snr_range: (low, high) to which the distribution is truncated.

    Raises:
        ValueError: an argument out of bounds.
    """

    def __init__(self, mean: float = 0.0, scale: float = 1.0, log_snr_range: tuple[float, float] = EVERYWHERE) -> None:
        super().__init__()
        self.mean = require_number("mean", mean)
        self.scale = require_number("scale", scale, above=0.0)
        if self.scale > 2.0:
            raise ValueError(f"scale is {scale!r}, expected at most 2")
        self._restrict(log_snr_range)

    def _quantile(self, u: Tensor) -> Tensor:
        return -2.0 * (self.mean + self.scale * u.logit())

    def _cdf(self, log_snr: Tensor) -> Tensor:
        return ((-0.5 * log_snr - self.mean) / self.scale).sigmoid()

    def _log_density(self, log_snr: Tensor) -> Tensor:
        z = (-0.5 * log_snr - self.mean) / self.scale
        return -torch.logaddexp(0.5 * z, -0.5 * z) * 2.0 - math.log(2.0 * self.scale)

    def extra_repr(self) -> str:
        return f"mean={self.mean:g}, scale={self.scale:g}"


class Beta(LevelSampler):
    """t ~ Beta(a, b), t the noise share of a flow: p(t) ∝ t^(a-1)·(1 - t)^(b-1).

    a = b = 1 is uniform t; a > b draws more where there is more noise. CDF and quantile are interpolated in a
    table that the constructor computes; the density is exact.

    Args:
        a, b: from 0.25, below which some draws have no finite float32 sigma, to 100.
        log_snr_range: (low, high) to which the distribution is truncated.

    Raises:
        ValueError: an argument out of bounds.
    """

    # Bits of float64 in integers: `module.half()` casts every float buffer.
    nodes: Tensor  # int64 [3, N]: logit(t), logit(u), d logit(u)/d logit(t)

    def __init__(self, a: float = 2.0, b: float = 2.0, log_snr_range: tuple[float, float] = EVERYWHERE) -> None:
        super().__init__()
        self.a, self.b = (require_number(name, value, at_least=_LEAST) for name, value in (("a", a), ("b", b)))
        if max(self.a, self.b) > _MOST:
            raise ValueError(f"a and b are {self.a:g} and {self.b:g}, expected at most {_MOST:g}")
        self._log_beta = math.lgamma(self.a) + math.lgamma(self.b) - math.lgamma(self.a + self.b)
        self.register_buffer("nodes", self._table().view(torch.int64), persistent=False)
        self._restrict(log_snr_range)

    def _log_density_of_logit(self, x: Tensor) -> Tensor:
        """ln of the density over x = logit(t): t^a·(1 - t)^b / B(a, b)."""
        log_t, log_rest = torch.nn.functional.logsigmoid(x), torch.nn.functional.logsigmoid(-x)
        return self.a * log_t + self.b * log_rest - self._log_beta

    def _table(self) -> Tensor:
        """Nodes of the interpolation, [3, N] float64: Gauss-Legendre between them, the exact power laws beyond."""
        cells = round(_TAIL / min(self.a, self.b, 1.0) / _STEP)  # on each side
        x = torch.arange(-cells, cells + 1, dtype=torch.float64) * _STEP
        places, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(5))
        at = (x[:-1] + 0.5 * _STEP)[:, None] + 0.5 * _STEP * places
        inside = (self._log_density_of_logit(at) + (0.5 * _STEP * weights).log()).logsumexp(1)
        density = self._log_density_of_logit(x)
        below = torch.cat([density[:1] - math.log(self.a), inside]).logcumsumexp(0)
        above = torch.cat([density[-1:] - math.log(self.b), inside.flip(0)]).logcumsumexp(0).flip(0)
        # With y = ln(u/(1 - u)), dy/dx = p/(u·(1 - u)).
        return torch.stack([x, below - above, (density - below - above).exp()])

    def _quantile(self, u: Tensor) -> Tensor:
        x, y, slope = self.nodes.view(torch.float64)
        return -2.0 * _interpolated(u.logit(), y, x, 1.0 / slope)

    def _cdf(self, log_snr: Tensor) -> Tensor:
        x, y, slope = self.nodes.view(torch.float64)
        return _interpolated(-0.5 * log_snr, x, y, slope).sigmoid()

    def _log_density(self, log_snr: Tensor) -> Tensor:
        return self._log_density_of_logit(-0.5 * log_snr) - math.log(2.0)

    def extra_repr(self) -> str:
        return f"a={self.a:g}, b={self.b:g}"


def _interpolated(at: Tensor, nodes: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
    """Cubic Hermite interpolation between rising nodes, linear beyond them. Arguments after `at`: [N]."""
    right = torch.searchsorted(nodes, at).clamp(1, len(nodes) - 1)
    left = right - 1
    width = nodes[right] - nodes[left]
    part = ((at - nodes[left]) / width).clamp(0.0, 1.0)
    rest = 1.0 - part
    inside = (
        rest.square() * ((1.0 + 2.0 * part) * values[left] + part * width * slopes[left])
        + part.square() * ((1.0 + 2.0 * rest) * values[right] - rest * width * slopes[right])
    )  # fmt: skip
    beyond = (at - nodes[-1]).clamp(min=0.0) * slopes[-1] + (at - nodes[0]).clamp(max=0.0) * slopes[0]
    return inside + beyond
