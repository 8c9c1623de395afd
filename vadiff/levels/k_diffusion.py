"""Densities of noise levels that k-diffusion's configs name "split-lognormal" and "cosine-interpolated"."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._validation import require_number
from .fixed import EVERYWHERE
from .sampler import LevelSampler


class SplitLogNormal(LevelSampler):
    """ln(sigma) normal with one width below its mode and another above: k-diffusion's "split-lognormal".

    The density of ln(sigma) is 2/(scale_1 + scale_2)·φ((ln(sigma) - loc)/scale), φ the standard normal density, scale_1
    below loc and scale_2 above: it is continuous, and scale_1/(scale_1 + scale_2) of the draws are below loc.

    Args:
        loc: mode of ln(sigma).
        scale_1, scale_2: > 0; standard deviations of the normal density below and above loc.
        log_snr_range: (low, high) to which the distribution is truncated.

    Raises:
        ValueError: an argument out of bounds.

    Example:
        >>> SplitLogNormal(loc=-1.2, scale_1=0.8, scale_2=1.6)
        SplitLogNormal(loc=-1.2, scale_1=0.8, scale_2=1.6)
    """

    def __init__(
        self,
        loc: float = -1.2,
        scale_1: float = 1.2,
        scale_2: float = 1.2,
        log_snr_range: tuple[float, float] = EVERYWHERE,
    ) -> None:
        super().__init__()
        self.loc = require_number("loc", loc)
        self.scale_1 = require_number("scale_1", scale_1, above=0.0)
        self.scale_2 = require_number("scale_2", scale_2, above=0.0)
        self._below = self.scale_1 / (self.scale_1 + self.scale_2)  # share of the draws
        self._restrict(log_snr_range)

    def _quantile(self, u: Tensor) -> Tensor:
        below, above = 0.5 / self._below, 0.5 / (1.0 - self._below)
        z = torch.where(
            u < self._below,
            self.scale_1 * torch.special.ndtri((below * u).clamp(max=0.5)),
            -self.scale_2 * torch.special.ndtri((above * (1.0 - u)).clamp(max=0.5)),
        )
        return -2.0 * (self.loc + z)

    def _cdf(self, log_snr: Tensor) -> Tensor:
        z = -0.5 * log_snr - self.loc
        below = 2.0 * self._below * torch.special.ndtr(z / self.scale_1)
        above = 1.0 - 2.0 * (1.0 - self._below) * torch.special.ndtr(-z / self.scale_2)
        return torch.where(z < 0.0, below, above)

    def _log_density(self, log_snr: Tensor) -> Tensor:
        z = -0.5 * log_snr - self.loc
        z = torch.where(z < 0.0, z / self.scale_1, z / self.scale_2)
        return -0.5 * z.square() - math.log((self.scale_1 + self.scale_2) * math.sqrt(2.0 * math.pi))

    def extra_repr(self) -> str:
        return f"loc={self.loc:g}, scale_1={self.scale_1:g}, scale_2={self.scale_2:g}"


class CosineInterpolated(LevelSampler):
    """Cosine schedule of simple diffusion, shifted for the resolution: k-diffusion's "cosine-interpolated".

    A cosine schedule with the shift d = noise_d/image_d has sigma(u) = sigma_data/d·tan(x), x evenly spaced between
    atan(d·sigma_min/sigma_data) and atan(d·sigma_max/sigma_data). ln(sigma) is (1 - u)·that of noise_d_high +
    u·that of noise_d_low, u uniform: low noise as for noise_d_high pixels, high noise as for noise_d_low. Source:
    Hoogeboom et al., Simple diffusion (arXiv 2301.11093), section 3.1; k-diffusion for sigma_data and both ends.

    Args:
        image_d: height of the images in pixels.
        noise_d_low, noise_d_high: heights of the images whose cosine schedules are interpolated,
            noise_d_low <= noise_d_high; both image_d is the cosine schedule itself.
        sigma_data: standard deviation of the data, 1 in k-diffusion unless its config says otherwise.
        sigma_min, sigma_max: the range of sigma, k-diffusion's `min_value` and `max_value`.

    Raises:
        ValueError: an argument out of bounds.

    Example:
        >>> CosineInterpolated(image_d=256, noise_d_low=32, noise_d_high=256, sigma_data=0.5)
        CosineInterpolated(image_d=256, noise_d_low=32, noise_d_high=256, sigma_data=0.5)
    """

    def __init__(
        self,
        image_d: float = 64.0,
        noise_d_low: float = 32.0,
        noise_d_high: float = 64.0,
        sigma_data: float = 1.0,
        sigma_min: float = 1e-3,
        sigma_max: float = 1e3,
    ) -> None:
        super().__init__()
        self.image_d = require_number("image_d", image_d, above=0.0)
        self.noise_d_low = require_number("noise_d_low", noise_d_low, above=0.0)
        self.noise_d_high = require_number("noise_d_high", noise_d_high, at_least=self.noise_d_low)
        self.sigma_data = require_number("sigma_data", sigma_data, above=0.0)
        self.sigma_min = require_number("sigma_min", sigma_min, above=0.0)
        self.sigma_max = require_number("sigma_max", sigma_max, above=self.sigma_min)
        self._restrict((-2.0 * math.log(self.sigma_max), -2.0 * math.log(self.sigma_min)))

    def _curve(self, noise_d: float, u: Tensor) -> tuple[Tensor, Tensor]:
        """ln(sigma) of one shifted cosine schedule at u, and its derivative by u."""
        scale = noise_d / (self.image_d * self.sigma_data)
        first, last = math.atan(scale * self.sigma_min), math.atan(scale * self.sigma_max)
        angle = first + (last - first) * u
        return angle.tan().log() - math.log(scale), 2.0 * (last - first) / (2.0 * angle).sin()

    def _quantile(self, u: Tensor) -> Tensor:
        low, high = self._curve(self.noise_d_low, u)[0], self._curve(self.noise_d_high, u)[0]
        return -2.0 * torch.lerp(high, low, u)

    def _log_density(self, log_snr: Tensor) -> Tensor:
        u = self._cdf(log_snr)
        (low, low_slope), (high, high_slope) = (self._curve(d, u) for d in (self.noise_d_low, self.noise_d_high))
        return -(2.0 * (low - high + torch.lerp(high_slope, low_slope, u))).log()  # 1/|dλ/du|

    def extra_repr(self) -> str:
        text = f"image_d={self.image_d:g}, noise_d_low={self.noise_d_low:g}, noise_d_high={self.noise_d_high:g}"
        text += f", sigma_data={self.sigma_data:g}"
        limits = (self.sigma_min, self.sigma_max)
        return text if limits == (1e-3, 1e3) else f"{text}, sigma_min={limits[0]:g}, sigma_max={limits[1]:g}"
