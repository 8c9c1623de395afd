"""Noise-level distributions of the literature. u in (0, 1) is uniform, and noise grows with u."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._validation import require_number
from ..process import DiscreteVP, Flow, NoiseProcess, VPCosine, VPLinear, VPScaledLinear
from .sampler import LevelSampler

EVERYWHERE = (-math.inf, math.inf)

_PROCESSES = {"flow": Flow, "vp_cosine": VPCosine, "vp_linear": VPLinear, "vp_scaled_linear": VPScaledLinear}


class UniformTime(LevelSampler):
    """t uniform on [t_min, t_max] of a process: the choice of DDPM and flow matching.

    Args:
        process: an object from `vadiff.process`, or "flow", "vp_cosine", "vp_linear", "vp_scaled_linear". For a
            `process.DiscreteVP`, whose times are timesteps, see `UniformTimesteps`.
        t_min, t_max: ends of the interval, inside the process; for `process.EDM` these are noise levels sigma.
        log_snr_range: (low, high) to which the distribution is truncated.

    Raises:
        ValueError: an argument out of bounds, or no such process.
    """

    def __init__(
        self,
        process: NoiseProcess | str = "flow",
        t_min: float = 0.0,
        t_max: float = 1.0,
        log_snr_range: tuple[float, float] = EVERYWHERE,
    ) -> None:
        super().__init__()
        if isinstance(process, str):
            if process not in _PROCESSES:
                raise ValueError(
                    f"process is {process!r}, expected an object from vadiff.process or one of {', '.join(_PROCESSES)}"
                )
            process = _PROCESSES[process]()
        if isinstance(process, DiscreteVP):
            raise ValueError(
                f"process is {process}, expected one in continuous time: for timesteps use UniformTimesteps"
            )
        self.process = process
        self.t_min = require_number("t_min", t_min, at_least=0.0)
        self.t_max = require_number("t_max", t_max, above=self.t_min)
        if self.t_max > 1.0 and isinstance(process, tuple(_PROCESSES.values())):
            raise ValueError(
                f"t_max is {t_max!r}, expected at most 1, where {process} ends: divide timesteps by their number"
            )
        at_ends = process.log_snr(torch.tensor([self.t_min, self.t_max], dtype=torch.float64))
        self._noise_grows = bool(at_ends[0] > at_ends[1])
        self._restrict(log_snr_range)

    def _quantile(self, u: Tensor) -> Tensor:
        share = u if self._noise_grows else 1.0 - u
        return self.process.log_snr(self.t_min + (self.t_max - self.t_min) * share)

    def _cdf(self, log_snr: Tensor) -> Tensor:
        share = (self.process.time(log_snr) - self.t_min) / (self.t_max - self.t_min)
        return (share if self._noise_grows else 1.0 - share).clamp(0.0, 1.0)

    def _log_density(self, log_snr: Tensor) -> Tensor:
        time, slope = _time_and_slope(self.process, log_snr)
        rounding = slope.abs() * log_snr.abs() * 2.0**-23  # of a log-SNR in float32, in time
        inside = (time >= self.t_min - rounding) & (time <= self.t_max + rounding)
        return torch.where(inside, slope.abs().log() - math.log(self.t_max - self.t_min), -math.inf)

    def extra_repr(self) -> str:
        return f"{self.process}, t_min={self.t_min:g}, t_max={self.t_max:g}"


class UniformTimesteps(LevelSampler):
    """Every timestep of a discrete process with the same probability: DDPM (arXiv 2006.11239, algorithm 1).

    For densities, as adaptive levels need them, each timestep is spread evenly over the times around it.

    Args:
        process: with a table of T timesteps, for example `process.DiscreteVP.linear(1000)`.
        t_min, t_max: ends of the interval of timesteps, as shares of T: 0.5 and 1 are the upper half.

    Raises:
        TypeError: another process.
        ValueError: not 0 <= t_min < t_max <= 1.
    """

    def __init__(self, process: DiscreteVP, t_min: float = 0.0, t_max: float = 1.0) -> None:
        super().__init__()
        if not isinstance(process, DiscreteVP):
            raise TypeError(f"process is {process!r}, expected a vadiff.process.DiscreteVP; see UniformTime for others")
        self.process = process
        self.t_min = require_number("t_min", t_min, at_least=0.0)
        self.t_max = require_number("t_max", t_max, above=self.t_min)
        if self.t_max > 1.0:
            raise ValueError(f"t_max is {t_max!r}, expected at most 1: a share of the {process.timesteps} timesteps")
        self._restrict(EVERYWHERE)

    def _quantile(self, u: Tensor) -> Tensor:
        last = self.process.timesteps - 1
        share = self.t_min + (self.t_max - self.t_min) * u
        return self.process.log_snr((share * self.process.timesteps).floor().clamp(0, last))

    def _place(self, log_snr: Tensor) -> Tensor:
        return (self.process.time(log_snr) + 0.5) / self.process.timesteps

    def _cdf(self, log_snr: Tensor) -> Tensor:
        return ((self._place(log_snr) - self.t_min) / (self.t_max - self.t_min)).clamp(0.0, 1.0)

    def _log_density(self, log_snr: Tensor) -> Tensor:
        _, slope = _time_and_slope(self.process, log_snr)
        share = self._place(log_snr)
        inside = (share >= self.t_min) & (share <= self.t_max)
        density = slope.abs().log() - math.log(self.process.timesteps * (self.t_max - self.t_min))
        return torch.where(inside, density, -math.inf)

    def extra_repr(self) -> str:
        return f"{self.process}, t_min={self.t_min:g}, t_max={self.t_max:g}"


def _time_and_slope(process: NoiseProcess, log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """The times of a process at each log-SNR, and their derivative by it."""
    with torch.inference_mode(False), torch.enable_grad():
        at = log_snr.detach().clone().requires_grad_()
        time = process.time(at)
        (slope,) = torch.autograd.grad(time.sum(), at)
    return time.detach(), slope


class LogNormal(LevelSampler):
    """ln(sigma) ~ N(p_mean, p_std²), sigma of a variance-exploding process: EDM (arXiv 2206.00364, table 1).

    EDM2 uses (-0.4, 1.0) on ImageNet-512 latents and (-0.8, 1.6) on ImageNet-64 pixels.

    Args:
        p_mean, p_std: of ln(sigma).
        log_snr_range: (low, high) to which the distribution is truncated.

    Raises:
        ValueError: an argument out of bounds.
    """

    def __init__(
        self, p_mean: float = -1.2, p_std: float = 1.2, log_snr_range: tuple[float, float] = EVERYWHERE
    ) -> None:
        super().__init__()
        self.p_mean = require_number("p_mean", p_mean)
        self.p_std = require_number("p_std", p_std, above=0.0)
        self._restrict(log_snr_range)

    def _quantile(self, u: Tensor) -> Tensor:
        return -2.0 * (self.p_mean + self.p_std * torch.special.ndtri(u))

    def _cdf(self, log_snr: Tensor) -> Tensor:
        return torch.special.ndtr((-0.5 * log_snr - self.p_mean) / self.p_std)

    def _log_density(self, log_snr: Tensor) -> Tensor:
        z = (-0.5 * log_snr - self.p_mean) / self.p_std
        return -0.5 * z.square() - math.log(2.0 * self.p_std * math.sqrt(2.0 * math.pi))

    def extra_repr(self) -> str:
        return f"p_mean={self.p_mean:g}, p_std={self.p_std:g}"


class LogitNormal(LogNormal):
    """logit(t) ~ N(mean, std²) for the noise share t of a flow (sigma = t, alpha = 1 - t): SD3 (arXiv 2403.03206).

    As sigma/alpha = t/(1 - t), this is ln(sigma/alpha) ~ N(mean, std²): the log-normal with other defaults.

    Args:
        mean, std: of logit(t).
        log_snr_range: (low, high) to which the distribution is truncated.

    Raises:
        ValueError: an argument out of bounds.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, log_snr_range: tuple[float, float] = EVERYWHERE) -> None:
        super().__init__(require_number("mean", mean), require_number("std", std, above=0.0), log_snr_range)

    def extra_repr(self) -> str:
        return f"mean={self.p_mean:g}, std={self.p_std:g}"


class Mode(LevelSampler):
    """SD3's mode sampling with heavy tails: t = f(u) = u - scale·(sin²(πu/2) - u), t the noise share of a flow.

    Source: arXiv 2403.03206, eq. 20, with u for the paper's 1 - u. scale > 0 favours the middle, scale < 0 the ends.

    Args:
        scale: from -1 to 2/(π - 2) = 1.75, where f is increasing.
        log_snr_range: (low, high) to which the distribution is truncated.

    Raises:
        ValueError: an argument out of bounds.
    """

    def __init__(self, scale: float = 1.29, log_snr_range: tuple[float, float] = EVERYWHERE) -> None:
        super().__init__()
        self.scale = require_number("scale", scale, at_least=-1.0)
        if self.scale > 2.0 / (math.pi - 2.0):
            raise ValueError(
                f"scale is {scale!r}, expected at most 2/(π - 2) = 1.752: above it t is not monotonic in u"
            )
        self._restrict(log_snr_range)

    def _time(self, u: Tensor) -> Tensor:
        return (1.0 + self.scale) * u - self.scale * (0.5 * math.pi * u).sin().square()

    def _quantile(self, u: Tensor) -> Tensor:
        return 2.0 * (self._time(1.0 - u).log() - self._time(u).log())  # 1 - f(u) = f(1 - u)

    def _log_density(self, log_snr: Tensor) -> Tensor:
        time = (-0.5 * log_snr).sigmoid()
        slope = 1.0 + self.scale - 0.5 * math.pi * self.scale * (math.pi * self._cdf(log_snr)).sin()  # dt/du
        return (0.5 * time * (1.0 - time) / slope).log()

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


class CosMap(LevelSampler):
    """SD3's cosmap (arXiv 2403.03206, eq. 21): sigma/alpha = tan(πu/2), the log-SNR of a cosine schedule on a flow.

    Args:
        log_snr_range: (low, high) to which the distribution is truncated.

    Raises:
        ValueError: an argument out of bounds.
    """

    def __init__(self, log_snr_range: tuple[float, float] = EVERYWHERE) -> None:
        super().__init__()
        self._restrict(log_snr_range)

    def _quantile(self, u: Tensor) -> Tensor:
        return -2.0 * (0.5 * math.pi * u).tan().log()

    def _cdf(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr).exp().atan() / (0.5 * math.pi)

    def _log_density(self, log_snr: Tensor) -> Tensor:
        half = 0.5 * log_snr
        return -torch.logaddexp(half, -half) - math.log(math.pi)


class Laplace(LevelSampler):
    """log-SNR ~ Laplace(mean, scale): Hang & Gu, Improved Noise Schedule (arXiv 2407.03297, table 1).

    Args:
        mean: of log-SNR.
        scale: b > 0 in e**(-|log_snr - mean|/b) / 2b.
        log_snr_range: (low, high) to which the distribution is truncated.

    Raises:
        ValueError: an argument out of bounds.
    """

    def __init__(self, mean: float = 0.0, scale: float = 0.5, log_snr_range: tuple[float, float] = EVERYWHERE) -> None:
        super().__init__()
        self.mean = require_number("mean", mean)
        self.scale = require_number("scale", scale, above=0.0)
        self._restrict(log_snr_range)

    def _quantile(self, u: Tensor) -> Tensor:
        return self.mean - self.scale * (0.5 - u).sign() * torch.log1p(-(1.0 - 2.0 * u).abs())

    def _cdf(self, log_snr: Tensor) -> Tensor:
        z = (self.mean - log_snr) / self.scale
        tail = 0.5 * (-z.abs()).exp()
        return torch.where(z < 0, tail, 1.0 - tail)

    def _log_density(self, log_snr: Tensor) -> Tensor:
        return -(log_snr - self.mean).abs() / self.scale - math.log(2.0 * self.scale)

    def extra_repr(self) -> str:
        return f"mean={self.mean:g}, scale={self.scale:g}"


class Cauchy(LevelSampler):
    """log-SNR ~ Cauchy(mean, scale): Hang & Gu (arXiv 2407.03297, table 1). Truncated, because its tails are heavy.

    Args:
        mean: median of log-SNR.
        scale: half its interquartile range.
        log_snr_range: (low, high) to which the distribution is truncated.

    Raises:
        ValueError: an argument out of bounds.
    """

    def __init__(
        self, mean: float = 0.0, scale: float = 1.0, log_snr_range: tuple[float, float] = (-16.0, 16.0)
    ) -> None:
        super().__init__()
        self.mean = require_number("mean", mean)
        self.scale = require_number("scale", scale, above=0.0)
        self._restrict(log_snr_range)

    def _quantile(self, u: Tensor) -> Tensor:
        return self.mean + self.scale * (math.pi * (0.5 - u)).tan()

    def _cdf(self, log_snr: Tensor) -> Tensor:
        return 0.5 - ((log_snr - self.mean) / self.scale).atan() / math.pi

    def _log_density(self, log_snr: Tensor) -> Tensor:
        return -torch.log1p(((log_snr - self.mean) / self.scale).square()) - math.log(math.pi * self.scale)

    def extra_repr(self) -> str:
        return f"mean={self.mean:g}, scale={self.scale:g}, log_snr_range={self.log_snr_range}"


class LogUniform(LevelSampler):
    """ln(sigma), and so log-SNR, uniform over a range (NCSN, VE).

    Args:
        sigma_min, sigma_max: the range of sigma/alpha.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        super().__init__()
        self.sigma_min = require_number("sigma_min", sigma_min, above=0.0)
        self.sigma_max = require_number("sigma_max", sigma_max, above=self.sigma_min)
        self._low, self._high = -2.0 * math.log(self.sigma_max), -2.0 * math.log(self.sigma_min)
        self._restrict((self._low, self._high))

    def _quantile(self, u: Tensor) -> Tensor:
        return self._high + (self._low - self._high) * u

    def _cdf(self, log_snr: Tensor) -> Tensor:
        return (self._high - log_snr) / (self._high - self._low)

    def _log_density(self, log_snr: Tensor) -> Tensor:
        return torch.full_like(log_snr, -math.log(self._high - self._low))

    def extra_repr(self) -> str:
        return f"sigma_min={self.sigma_min:g}, sigma_max={self.sigma_max:g}"
