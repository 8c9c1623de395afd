"""The steps of the solvers, and the noise that EDM's stochastic sampler adds."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..information import Profile
from ..process import DiscreteVP

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # EDM's (arXiv 2206.00364, table 1)
FLOW_SIGMA_MAX = 1000.0  # in place of pure noise: at t = 1 sigma is infinite, which a denoiser cannot take
_GRID = 8192  # points between sigma_min and sigma_max; from 0.002 to 80 the steps are 0.0013 in ln σ


def noise_levels(
    steps: int = 18,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float | None = None,
    profile: Profile | None = None,
) -> Tensor:
    """Noise levels from sigma_max down to sigma_min, then 0.

    Without a profile sigma_i = (sigma_max^(1/ρ) + i/(N-1)·(sigma_min^(1/ρ) - sigma_max^(1/ρ)))^ρ for i < N, and
    sigma_N = 0. Source: EDM (arXiv 2206.00364), eq. 5.

    With one, the levels are equally far apart in the rescaled entropic time τ(σ) = ∫_0^σ min(m(s)/s², 1) ds, where m is
    the profile's x0 error per element: τ(sigma_i) = τ(sigma_max) + i/(N-1)·(τ(sigma_min) - τ(sigma_max)). Source: arXiv
    2504.13612. Meant for `euler`, a solver of first order; for Gaussian data of standard deviation s, τ is
    s·arctan(σ/s).

    Args:
        steps: N, at least 2.
        sigma_min: lowest level before 0, > 0.
        sigma_max: highest level.
        rho: larger values put more of the steps at low noise; None is 7. Not with a profile.
        profile: x0 errors of the network by noise level, as `vadiff.information.Profile.of_criterion` makes of the
            statistics of its training.

    Returns:
        [N + 1] float64, falling.

    Raises:
        ValueError: fewer than 2 steps, not 0 < sigma_min < sigma_max, rho not a positive number, or rho with a profile.

    Example:
        >>> noise_levels(3, sigma_min=1.0, sigma_max=9.0, rho=1.0)
        tensor([9., 5., 1., 0.], dtype=torch.float64)
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}, expected at least 2.")
    if not 0.0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min is {sigma_min} and sigma_max {sigma_max}, expected 0 < sigma_min < sigma_max.")
    if profile is not None:
        if rho is not None:
            raise ValueError(f"rho is {rho}, expected None with a profile: the profile places the levels.")
        return _by_information(steps, sigma_min, sigma_max, profile)
    rho = RHO if rho is None else rho
    if not 0.0 < rho < math.inf:
        raise ValueError(f"rho is {rho}, expected a positive number.")
    roots = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps, dtype=torch.float64)
    return torch.cat([roots**rho, roots.new_zeros(1)])


def _by_information(steps: int, sigma_min: float, sigma_max: float, profile: Profile) -> Tensor:
    """Levels at equal steps of ∫ rate dσ = ∫ rate·σ d ln σ, by the trapezium rule on a grid that is even in ln σ."""
    log_sigma = torch.linspace(math.log(sigma_min), math.log(sigma_max), _GRID, dtype=torch.float64)
    density = profile.rate_at(-2.0 * log_sigma) * log_sigma.exp()
    time = torch.cat([density.new_zeros(1), torch.cumulative_trapezoid(density, log_sigma)])  # rising
    wanted = torch.linspace(float(time[-1]), 0.0, steps, dtype=torch.float64)[1:-1]
    above = torch.searchsorted(time, wanted).clamp(1, _GRID - 1)
    share = (wanted - time[above - 1]) / (time[above] - time[above - 1])
    between = log_sigma[above - 1] + share * (log_sigma[above] - log_sigma[above - 1])
    ends = between.new_tensor([sigma_max, sigma_min, 0.0])
    return torch.cat([ends[:1], between.exp(), ends[1:]])


def flow_levels(steps: int = 50, sigma_max: float = FLOW_SIGMA_MAX) -> Tensor:
    """Noise levels at evenly spaced times of a flow, down to 0.

    sigma = t/(1 - t) for N + 1 times t from sigma_max/(1 + sigma_max) to 0: on the straight path
    x_t = (1 - t)·x0 + t·eps of flow matching (arXiv 2210.02747), x_t/(1 - t) = x0 + sigma·eps.

    Args:
        steps: N, at least 1.
        sigma_max: highest level.

    Returns:
        [N + 1] float64, falling, the last 0.

    Raises:
        ValueError: no step, or sigma_max not a positive number.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1.")
    if not 0.0 < sigma_max < math.inf:
        raise ValueError(f"sigma_max is {sigma_max}, expected a positive number.")
    times = torch.linspace(sigma_max / (1.0 + sigma_max), 0.0, steps + 1, dtype=torch.float64)
    return times / (1.0 - times)


def timestep_levels(process: DiscreteVP, steps: int = 50) -> Tensor:
    """Noise levels at timesteps of a discrete process, then 0.

    N numbers evenly spaced from the last timestep to the first, both included, and rounded: the stride of Improved DDPM
    (arXiv 2102.09672, section 4), "linspace" in diffusers. A last timestep of pure noise (zero terminal SNR), where
    sigma is infinite, is left out.

    Args:
        process: with its table of T timesteps.
        steps: N, from 1 to T.

    Returns:
        [N + 1] float64, falling, the last 0.

    Raises:
        ValueError: steps out of bounds.
    """
    last = process.timesteps - (1 if process.alphas_cumprod[-1] > 0 else 2)
    if not 1 <= steps <= last + 1:
        raise ValueError(f"steps is {steps}, expected 1 to {last + 1}: the process has no more timesteps to sample at")
    timesteps = torch.linspace(last, 0.0, steps, dtype=torch.float64).round()
    sigmas = (-0.5 * process.log_snr(timesteps)).exp()
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def network_calls(solver: str, steps: int) -> int:
    """Evaluations of D for one image: 2·steps - 1 for "heun", steps for every other solver; guidance doubles them."""
    return 2 * steps - 1 if solver == "heun" else steps


def steps_for_calls(solver: str, calls: int) -> int:
    """The most steps that a solver takes with at most `calls` evaluations of D: 25 for "heun" and 50 calls.

    Raises:
        ValueError: calls is not positive.
    """
    if calls < 1:
        raise ValueError(f"calls is {calls}, expected at least 1.")
    return (calls + 1) // 2 if solver == "heun" else calls


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
