"""vadiff.levels.mixture: two distributions of noise levels from one uniform number."""

from __future__ import annotations

import math

import pytest
import torch

from vadiff.levels import (
    Information,
    LogitNormal,
    LogNormal,
    LogUniform,
    Mixture,
    Table,
    UniformTime,
    UniformTimesteps,
    uniforms,
)
from vadiff.process import DiscreteVP

U = (torch.arange(4001, dtype=torch.float64) + 0.5) / 4001


def test_density_and_cdf_are_the_weighted_means() -> None:
    first, second = LogNormal(-1.2, 0.5), LogUniform(0.01, 10.0)
    mixed, at = Mixture(first, second, share=0.3), torch.linspace(-6.0, 10.0, 33, dtype=torch.float64)
    expected = 0.7 * first.log_density(at).exp() + 0.3 * second.log_density(at).exp()
    torch.testing.assert_close(mixed.log_density(at).exp(), expected)
    torch.testing.assert_close(mixed.cdf(at), 0.7 * first.cdf(at) + 0.3 * second.cdf(at))


def test_second_distribution_is_uniform_in_the_time_of_a_flow_by_default() -> None:
    at = torch.tensor([-20.0, 0.0, 20.0], dtype=torch.float64)
    floor = UniformTime().log_density(at) + torch.tensor(0.05).double().log()
    density = Mixture(LogitNormal(0.0, 0.2), share=0.05).log_density(at)
    torch.testing.assert_close(density[[0, 2]], floor[[0, 2]])
    assert density[1] > floor[1]


def test_draws_are_exact_in_tails_bends_and_gaps() -> None:
    """Of distributions that lie far apart, between which the CDF is flat, and of one with steps."""
    ends = torch.tensor([1e-14, 1e-9, 1.0 - 1e-9, 1.0 - 1e-14], dtype=torch.float64)
    for mixed in (
        Mixture(LogNormal(-8.0, 0.1), LogNormal(8.0, 0.1), 0.3),
        Mixture(Table([1.0, 0.0, 3.0, 2.0], (-4.0, 4.0)), LogUniform(), 0.2),
        Mixture(Mixture(LogNormal()), LogUniform(), 0.2),
    ):
        u = torch.cat([U, ends])
        torch.testing.assert_close(mixed.cdf(mixed._levels(u)), u, rtol=0, atol=1e-4)
        typical = (mixed.cdf(mixed._levels(u)) - u).abs().quantile(0.99)
        assert typical < 1e-9


def test_noise_grows_with_u_and_strata_stay_strata() -> None:
    mixed = Mixture(LogitNormal(0.0, 0.3), share=0.2)
    assert (mixed(U).log_snr.diff() <= 0).all()
    u = uniforms(64, torch.Generator().manual_seed(0), stratified=True)
    strata = (mixed.cdf(mixed(u).log_snr) * 64).floor().sort().values
    assert strata.tolist() == list(range(64))


def test_adaptive_samplers_and_those_that_correct_their_draws_are_refused() -> None:
    with pytest.raises(TypeError, match=r"first is adaptive .*base of Information"):
        Mixture(Information())
    with pytest.raises(ValueError, match=r"second is Table(?s:.*)expected a sampler that does not correct its draws"):
        Mixture(LogNormal(), Table([1.0, 2.0], corrected=True))


@pytest.mark.parametrize(("share", "message"), [(0.0, "above 0"), (1.0, "below 1"), (2.0, "below 1")])
def test_a_share_that_leaves_one_distribution_out_is_refused(share: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"share is {share}, expected .*{message}"):
        Mixture(LogNormal(), share=share)


def test_state_and_float_casts_leave_the_draws_alone() -> None:
    mixed = Mixture(LogNormal())
    before = mixed(U).log_snr
    assert torch.equal(mixed.half()(U).log_snr, before)
    assert not mixed.state_dict()


@pytest.mark.parametrize("timesteps", [10, 1000])
def test_pure_noise_is_drawn_at_zero_terminal_snr_about_as_often_as_its_share(timesteps: int) -> None:
    last = UniformTimesteps(DiscreteVP.cosine(timesteps).with_zero_terminal_snr())
    drawn = Mixture(LogNormal(), last, 0.1)((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000).log_snr
    share = float((drawn == -math.inf).double().mean())
    # A timestep of a discrete process is spread over half a step to each side in its CDF.
    assert 0.1 / timesteps - 1e-5 <= share <= 0.15 / timesteps + 1e-5
