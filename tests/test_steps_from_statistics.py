"""vadiff.sampling.noise_levels with a profile: closed forms of simple data, scale, ends, and what Euler gains by it."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from vadiff.information import Profile
from vadiff.log_snr import from_sigma
from vadiff.sampling import euler, noise_levels


def profile_of(error: Tensor, sigma: Tensor) -> Profile:
    return Profile(from_sigma(sigma), error)


def log_spaced(low: float, high: float, levels: int) -> Tensor:
    return torch.logspace(math.log10(low), math.log10(high), levels, dtype=torch.float64)


def gaussian(spread: float, levels: int = 2000) -> Profile:
    """Data N(0, spread²): error s²σ²/(s² + σ²)."""
    sigma = spread * log_spaced(1e-4, 1e4, levels)
    return profile_of(spread**2 * sigma**2 / (spread**2 + sigma**2), sigma)


def arctan_levels(steps: int, spread: float, low: float = 0.002, high: float = 80.0) -> list[float]:
    """Equal steps of τ = s·arctan(σ/s)."""
    times = torch.linspace(math.atan(high / spread), math.atan(low / spread), steps, dtype=torch.float64)
    return [*(spread * times.tan()).tolist(), 0.0]


@pytest.mark.parametrize("spread", [0.05, 0.5, 20.0])
@pytest.mark.parametrize("steps", [2, 3, 18, 500])
def test_levels_of_gaussian_data_are_equally_spaced_in_arctan(steps: int, spread: float) -> None:
    levels = noise_levels(steps, profile=gaussian(spread))
    assert levels.dtype == torch.float64
    assert levels.tolist() == pytest.approx(arctan_levels(steps, spread), rel=1e-4)


def test_levels_hold_to_a_few_per_cent_with_the_bins_of_a_criterion() -> None:
    centers = torch.linspace(-15.875, 15.875, 128, dtype=torch.float64)
    sigma = (-0.5 * centers).exp()
    profile = Profile(centers, 0.25 * sigma**2 / (0.25 + sigma**2))
    assert noise_levels(18, profile=profile).tolist() == pytest.approx(arctan_levels(18, 0.5), rel=0.03)


def test_data_ten_times_as_large_shift_every_level_by_ten() -> None:
    sigma, error = log_spaced(0.01, 50.0, 60), log_spaced(3e-4, 0.2, 60)
    plain = noise_levels(12, 0.004, 30.0, profile=profile_of(error, sigma))
    larger = noise_levels(12, 0.04, 300.0, profile=profile_of(100.0 * error, 10.0 * sigma))
    assert larger.tolist() == pytest.approx((10.0 * plain).tolist(), rel=1e-9)


def test_levels_of_a_point_mass_are_equally_spaced_in_one_over_sigma() -> None:
    """All of the data is known at every level; what is left is the small error of the network."""
    sigma = log_spaced(1e-3, 1e3, 50)
    levels = noise_levels(9, 0.01, 100.0, profile=profile_of(torch.full_like(sigma, 1e-14), sigma))
    assert (1.0 / levels[:-1]).tolist() == pytest.approx(torch.linspace(0.01, 100.0, 9).tolist(), rel=1e-4)


def test_levels_of_two_points_lie_where_it_is_decided_which_of_them() -> None:
    """x0 = ±1: the posterior mean is tanh(x/σ²), its error E[1 - tanh((1 + σz)/σ²)], nothing once σ is small."""
    z = torch.linspace(-9.0, 9.0, 601, dtype=torch.float64)
    normal = (-0.5 * z**2).exp() / (-0.5 * z**2).exp().sum()

    def error(sigma: Tensor) -> Tensor:
        return ((1.0 - torch.tanh((1.0 + sigma[:, None] * z) / sigma[:, None] ** 2)) * normal).sum(1)

    sigma = log_spaced(0.15, 1e3, 800)
    levels = noise_levels(7, 0.01, 50.0, profile=profile_of(error(sigma), sigma))
    assert [levels[0], levels[-2], levels[-1]] == [50.0, 0.01, 0.0]
    assert 0.4 < levels[-3] < levels[1] < 6.0
    fine = log_spaced(0.15, 50.0, 4000)
    times = [float(torch.trapezoid((error(part) / part**2), part)) for part in _split(fine, levels[:-2])]
    assert times == pytest.approx([times[0]] * len(times), rel=2e-3)


def _split(fine: Tensor, levels: Tensor) -> list[Tensor]:
    """The points of a grid between each two neighbouring levels, with both of these."""
    return [
        torch.cat([low[None], fine[(fine > low) & (fine < high)], high[None]])
        for high, low in itertools.pairwise(levels)
    ]


def test_rate_is_constant_below_the_levels_of_the_profile_and_falls_as_the_square_above() -> None:
    """Rates 1/2 at σ 1 and 1/8 at σ 2: τ is σ/2 up to 1, and 1 - 1/(2σ) beyond; here .95, .65, .35 and .05."""
    profile = profile_of(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 2.0], dtype=torch.float64))
    levels = noise_levels(4, 0.1, 10.0, profile=profile)
    assert levels.tolist() == pytest.approx([10.0, 1.0 / 0.7, 0.7, 0.1, 0.0], rel=1e-5)


def test_a_network_worse_than_its_input_counts_as_one_that_returns_it() -> None:
    sigma = log_spaced(0.01, 100.0, 40)
    bad = noise_levels(6, 0.1, 10.0, profile=profile_of(7.0 * sigma**2, sigma))
    assert bad.tolist() == pytest.approx([10.0, 8.02, 6.04, 4.06, 2.08, 0.1, 0.0], rel=1e-5)


def test_first_order_steps_end_nearer_to_the_exact_flow_than_by_rho() -> None:
    """Gaussian data: the exact flow keeps x/√(σ² + s²), and Euler's error is one factor for all samples."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return x * (0.25 / (0.25 + sigma**2)).view(-1, 1)

    def error(levels: Tensor) -> float:
        drawn = euler(denoise, (1,), [0], levels=levels)
        noise = torch.randn(1, generator=torch.Generator().manual_seed(0))
        return abs((drawn / (80.0 * noise * 0.5 / math.sqrt(80.0**2 + 0.25))).log().item())

    for steps in (8, 16, 32):
        assert error(noise_levels(steps, profile=gaussian(0.5))) < 0.6 * error(noise_levels(steps))


def test_profile_and_rho_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"rho is 7\.0, expected None with a profile"):
        noise_levels(rho=7.0, profile=gaussian(0.5))
    with pytest.raises(ValueError, match="steps is 1, expected at least 2"):
        noise_levels(1, profile=gaussian(0.5))
    with pytest.raises(ValueError, match=r"sigma_min is 2\.0 and sigma_max 1\.0"):
        noise_levels(4, 2.0, 1.0, profile=gaussian(0.5))
