"""vadiff.levels.shift: levels with alpha times the noise, and the published rules for alpha."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from vadiff.levels import (
    Information,
    LevelSampler,
    LogitNormal,
    LogNormal,
    SecondMoment,
    Shift,
    Table,
    UniformTime,
    shift_alpha,
)

U = (torch.arange(501, dtype=torch.float64) + 0.5) / 501


@pytest.mark.parametrize("base", [LogitNormal(), UniformTime(), LogNormal(-1.2, 1.2)])
@pytest.mark.parametrize("alpha", [3.0, 0.2])
def test_noise_shares_are_those_of_sd3s_formula(base: LevelSampler, alpha: float) -> None:
    """t' = alpha·t/(1 + (alpha - 1)·t), arXiv 2403.03206."""
    t = (-0.5 * base(U).log_snr.double()).sigmoid()
    expected = alpha * t / (1.0 + (alpha - 1.0) * t)
    found = (-0.5 * Shift(base, alpha)(U).log_snr.double()).sigmoid()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_shifted_logit_normal_is_the_logit_normal_of_another_mean() -> None:
    shifted, expected = Shift(LogitNormal(0.0, 1.0), 3.0), LogitNormal(math.log(3.0), 1.0)
    at = torch.linspace(-9.0, 5.0, 29, dtype=torch.float64)
    torch.testing.assert_close(shifted.log_density(at), expected.log_density(at))
    torch.testing.assert_close(shifted.cdf(at), expected.cdf(at))
    torch.testing.assert_close(shifted(U).log_snr, expected(U).log_snr)


def test_two_shifts_multiply_and_a_shift_by_one_changes_nothing() -> None:
    twice = Shift(Shift(LogNormal(), 2.0), 1.5)
    torch.testing.assert_close(twice(U).log_snr, Shift(LogNormal(), 3.0)(U).log_snr)
    assert torch.equal(Shift(LogNormal(), 1.0)(U).log_snr, LogNormal()(U).log_snr)


def test_range_of_the_base_moves_with_it() -> None:
    shifted = Shift(LogNormal(log_snr_range=(-1.0, 4.0)), math.e)
    assert shifted.log_snr_range == (-3.0, 2.0)
    assert shifted.log_density(torch.tensor([-3.1, 2.1])).eq(-math.inf).all()


@pytest.mark.parametrize("wrap", [lambda base: Shift(base, 2.0), lambda base: Shift(Shift(base, 4.0), 0.5)])
def test_sample_weights_of_a_base_that_corrects_its_draws_are_kept(
    wrap: Callable[[LevelSampler], LevelSampler],
) -> None:
    base = Table([1.0, 3.0, 0.5], (-4.0, 4.0), base=LogNormal(), corrected=True)
    drawn, shifted = base(U), wrap(base)(U)
    assert shifted.sample_weight is not None
    assert torch.equal(shifted.sample_weight, drawn.sample_weight)
    torch.testing.assert_close(shifted.log_snr, drawn.log_snr - 2.0 * math.log(2.0))
    with pytest.raises(ValueError, match=r"log_snr_range is .*expected none for a base that corrects its draws"):
        Shift(base, 2.0, log_snr_range=(-5.0, 5.0))


@pytest.mark.parametrize("adaptive", [SecondMoment(), Information(), Table([1.0, 2.0], base=SecondMoment())])
def test_adaptive_levels_are_refused_as_their_bins_would_be_read_elsewhere(adaptive: LevelSampler) -> None:
    with pytest.raises(
        TypeError, match=r"base is adaptive .*make the changed one the base of (SecondMoment|Information)"
    ):
        Shift(adaptive, 2.0)
    with pytest.raises(TypeError, match="base is a str, expected an object from"):
        Shift("log_normal", 2.0)


def test_an_adaptive_sampler_can_tilt_a_shifted_base() -> None:
    adaptive = SecondMoment(Shift(LogNormal(), 3.0), bins=16)
    torch.testing.assert_close(adaptive(U).log_snr, Shift(LogNormal(), 3.0)(U).log_snr, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_a_factor_that_is_none_is_named(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha is .*expected a finite number above 0"):
        Shift(LogNormal(), alpha)


@pytest.mark.parametrize(
    ("rule", "dimension", "alpha"),
    [
        ("sd3", 256**2, 1.0),
        ("sd3", 1024**2, 4.0),
        ("rae", 4096, 1.0),
        ("rae", 256 * 768, math.sqrt(48.0)),  # DINOv2-B's tokens and channels
        ("flux", 256, math.exp(0.5)),
        ("flux", 4096, math.exp(1.15)),
        ("flux", 2176, math.exp(0.825)),
    ],
)
def test_rules_for_the_factor(rule: str, dimension: float, alpha: float) -> None:
    assert shift_alpha(rule, dimension) == pytest.approx(alpha)


def test_unknown_rules_and_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="rule is 'sd2', expected one of flux, rae, sd3"):
        shift_alpha("sd2", 64)
    with pytest.raises(ValueError, match="dimension is 0, expected a finite number above 0"):
        shift_alpha("sd3", 0)
