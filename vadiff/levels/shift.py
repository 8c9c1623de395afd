"""Noise levels shifted by a factor of sigma, and the published rules for that factor."""

from __future__ import annotations

import math

from torch import Tensor

from .._validation import require_number
from .adaptive import require_not_adaptive
from .fixed import EVERYWHERE
from .sampler import LevelSampler, NoiseLevels

SHIFT_RULES = ("flux", "rae", "sd3")
_SD3_PIXELS = 256**2  # of the resolution without a shift
_RAE_DIMENSION = 4096  # of the latent without a shift
_FLUX_MOST = 65_536  # tokens: 4096 × 4096 pixels, alpha 3e4
_FLUX_MU = ((256, 0.5), (4096, 1.15))  # (image tokens, mu), on a straight line


class Shift(LevelSampler):
    """A sampler with alpha times the noise: sigma' = alpha·sigma, log_snr' = log_snr - 2·ln(alpha).

    For the noise share t of a flow this is SD3's t' = alpha·t/(1 + (alpha - 1)·t). Averaging n noisy values lowers the
    noise by √n: data of the same content in n times as many dimensions is as noisy at √n times the sigma.
    Sources: Simple diffusion (arXiv 2301.11093, section 3.1); SD3 (arXiv 2403.03206, section 5.3.2).

    Sample weights of a base that corrects its draws stay those of the base's levels: the objective is then that of the
    shifted base.

    Args:
        base: any sampler that does not adapt. An adaptive one reads its bins at the levels it draws: shift its base.
        alpha: above 0; above 1 for more noise. See `shift_alpha`.
        log_snr_range: (low, high) to which the shifted distribution is truncated: the levels that the process has.

    Raises:
        TypeError: base is not a `LevelSampler`, or is an adaptive one.
        ValueError: an argument out of bounds, or a range for a base that corrects its draws.

    Example:
        >>> Shift(vadiff.levels.LogitNormal(), alpha=3.0)
        Shift(LogitNormal(mean=0, std=1), alpha=3)
    """

    def __init__(self, base: LevelSampler, alpha: float, log_snr_range: tuple[float, float] = EVERYWHERE) -> None:
        super().__init__()
        self.base = require_not_adaptive("base", base)
        self.corrected = base.corrected
        self.alpha = require_number("alpha", alpha, above=0.0)
        self._by = 2.0 * math.log(self.alpha)
        self._restrict(log_snr_range)
        if self.corrected and self.log_snr_range != EVERYWHERE:
            raise ValueError(
                f"log_snr_range is {self.log_snr_range}, expected none for a base that corrects its draws: the sample "
                "weights would not average to 1. Give the base a range"
            )
        low, high = (limit - self._by for limit in base.log_snr_range)
        self.log_snr_range = (max(low, self.log_snr_range[0]), min(high, self.log_snr_range[1]))

    def forward(self, u: Tensor) -> NoiseLevels:
        if not self.corrected:
            return super().forward(u)
        drawn = self.base(u)
        return NoiseLevels((drawn.log_snr.double() - self._by).float(), drawn.sample_weight)

    def _quantile(self, u: Tensor) -> Tensor:
        return self.base._levels(u) - self._by

    def _cdf(self, log_snr: Tensor) -> Tensor:
        return self.base.cdf(log_snr + self._by)

    def _log_density(self, log_snr: Tensor) -> Tensor:
        return self.base.log_density(log_snr + self._by)

    def __repr__(self) -> str:
        return f"Shift({self.base}, alpha={self.alpha:g})"


def shift_alpha(rule: str, dimension: float) -> float:
    """The factor of `Shift` by a published rule, from the size of an image.

    The rules suppose the levels and the data of their papers: they say how a distribution that suits one size moves
    with size, and not whether it suits other data.

    Args:
        rule: "sd3", √(dimension / 256²) (SD3, arXiv 2403.03206, section 5.3.2, with 256 × 256 as the size without a
            shift); "rae", √(dimension / 4096) (RAE, arXiv 2510.11690); "flux", e^mu with mu on a line from 0.5 at 256
            to 1.15 at 4096 tokens (Flux's code).
        dimension: pixels, height times width, for "sd3"; numbers of the latent, tokens times channels, for "rae"; image
            tokens for "flux".

    Raises:
        ValueError: an unknown rule, or a dimension that is not above 0.
    """
    dimension = require_number("dimension", dimension, above=0.0)
    if rule == "sd3":
        return math.sqrt(dimension / _SD3_PIXELS)
    if rule == "rae":
        return math.sqrt(dimension / _RAE_DIMENSION)
    if rule == "flux":
        (tokens, mu), (more_tokens, more_mu) = _FLUX_MU
        if dimension > _FLUX_MOST:
            raise ValueError(
                f"dimension is {dimension:g}, expected at most {_FLUX_MOST:,} image tokens: the rule was fitted "
                "to 256 to 4096 tokens, and rises too steeply far beyond"
            )
        return math.exp(mu + (more_mu - mu) * (dimension - tokens) / (more_tokens - tokens))
    raise ValueError(f"rule is {rule!r}, expected one of {', '.join(SHIFT_RULES)}")
