"""The steps of the solvers, and the noise that EDM's stochastic sampler adds."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def noise_levels(steps: int = 18, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Noise levels from sigma_max down to sigma_min, then 0.

    sigma_i = (sigma_max^(1/ρ) + i/(N-1)·(sigma_min^(1/ρ) - sigma_max^(1/ρ)))^ρ for i < N, and sigma_N = 0.
    Source: EDM (arXiv 2206.00364), eq. 5.

    Args:
        steps: N, at least 2.
        sigma_min: lowest level before 0, > 0.
        sigma_max: highest level.
        rho: larger values put more of the steps at low noise.

    Returns:
        [N + 1] float64, falling.

    Raises:
        ValueError: fewer than 2 steps, or not 0 < sigma_min < sigma_max.
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}, expected at least 2.")
    if not 0.0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min is {sigma_min} and sigma_max {sigma_max}, expected 0 < sigma_min < sigma_max.")
    roots = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps, dtype=torch.float64)
    return torch.cat([roots**rho, roots.new_zeros(1)])


def flow_times(steps: int = 50, sigma_max: float = 1000.0) -> Tensor:
    """Times t = sigma/(1 + sigma) of the straight path x_t = (1 - t)·x0 + t·eps, evenly spaced down to 0.

    Args:
        steps: N, at least 1.
        sigma_max: the highest level, in place of pure noise: at t = 1 sigma is infinite, which a denoiser cannot take.

    Returns:
        [N + 1] float64, falling, the last 0.

    Raises:
        ValueError: no step, or sigma_max not a positive number.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1.")
    if not 0.0 < sigma_max < math.inf:
        raise ValueError(f"sigma_max is {sigma_max}, expected a positive number.")
    return torch.linspace(sigma_max / (1.0 + sigma_max), 0.0, steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class Churn:
    """How much new noise EDM's stochastic sampler adds before each step (arXiv 2206.00364, algorithm 2).

    Args:
        amount: S_churn; each step raises sigma by the factor 1 + min(amount / N, √2 - 1). 0 is deterministic.
        sigma_min: S_tmin, below which nothing is added.
        sigma_max: S_tmax, above which nothing is added.
        noise: S_noise, the standard deviation of the added noise, slightly above 1 to restore lost detail.

    Raises:
        ValueError: a negative or non-finite amount or noise, or sigma_min above sigma_max.
    """

    amount: float
    sigma_min: float = 0.0
    sigma_max: float = math.inf
    noise: float = 1.0

    def __post_init__(self) -> None:
        for name in ("amount", "noise"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"churn {name} is {getattr(self, name)}, expected 0 or a positive number.")
        if not 0.0 <= self.sigma_min <= self.sigma_max:
            raise ValueError(
                f"churn sigma_min is {self.sigma_min} and sigma_max {self.sigma_max}, "
                "expected 0 <= sigma_min <= sigma_max."
            )

    def raised(self, sigma: float, steps: int) -> float:
        """The noise level after noise is added at `sigma`, with N = `steps`."""
        inside = self.sigma_min <= sigma <= self.sigma_max
        return sigma * (1.0 + min(self.amount / steps, math.sqrt(2.0) - 1.0)) if inside else sigma
