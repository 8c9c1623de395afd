"""Levels that follow information: closed forms, the failures that others met, state; and suggestions of levels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import vadiff
from vadiff.information import Profile
from vadiff.levels import Information, LogNormal, LogUniform, UniformTime, information_density, suggest, uniforms
from vadiff.log_snr import from_sigma
from vadiff.process import loss_ratio

BINS = {"bins": 80, "log_snr_range": (-10.0, 10.0)}
Error = Callable[[Tensor], Tensor]  # x0 error of a network at each log-SNR


def gaussian(spread: float) -> Error:
    """The optimal denoiser of Gaussian data: s²σ²/(s² + σ²)."""
    return lambda log_snr: 1.0 / (spread**-2 + log_snr.exp())


def profile_of(error: Error, low: float = 1e-3, high: float = 1e3) -> Profile:
    log_snr = from_sigma(torch.logspace(math.log10(low), math.log10(high), 121, dtype=torch.float64))
    return Profile(log_snr, error(log_snr))


def criterion_of(weighting: object = "constant", half_life: float = 64.0) -> vadiff.DiffusionLoss:
    return vadiff.DiffusionLoss(weighting, half_life=half_life, **BINS)


def train(
    sampler: Information,
    criterion: vadiff.DiffusionLoss,
    error: Error,
    steps: int,
    form: str = "edm",
    every: int = 1,
    batch: int = 512,
    sigma_data: float = 0.5,
) -> None:
    """Steps of a training whose network has this error, with noise of 20 % on each loss."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        log_snr = sampler(uniforms(batch, generator, stratified=True)).log_snr
        noise = 1.0 + 0.2 * torch.randn(batch, generator=generator)
        scale = loss_ratio(form, log_snr, sigma_data=sigma_data)
        criterion.reweight((error(log_snr) * scale * noise).abs(), log_snr)
        if step % every == every - 1:
            sampler.update(criterion)


def moments(sampler: Information) -> tuple[float, float]:
    """Mean and standard deviation of ln sigma over the draws."""
    drawn = sampler((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000).sigma.double().log()
    return float(drawn.mean()), float(drawn.std())


def share_below(sampler: Information, sigma: float) -> float:
    return float(sampler.cdf(from_sigma(torch.tensor([sigma], dtype=torch.float64))))


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_gaussian_data_give_the_logistic_density_of_their_standard_deviation(spread: float) -> None:
    base = LogUniform(1e-3 * spread, 1e3 * spread)
    sampler = Information(
        base, 320, (-16, 16), floor=1e-9, gate=False, sigma_data=spread, profile=profile_of(gaussian(spread))
    )
    mean, std = moments(sampler)
    assert mean == pytest.approx(math.log(spread), abs=0.01)
    assert std == pytest.approx(math.pi / (2 * math.sqrt(3)), rel=0.01)
    at = torch.linspace(-3, 3, 13, dtype=torch.float64)  # ln(sigma/s)
    density = 2.0 * sampler.log_density(-2.0 * (at + math.log(spread))).exp()
    assert torch.allclose(density, 0.5 / at.cosh().square(), rtol=0.06, atol=2e-3)  # constant within a bin


def test_a_criterion_in_training_gives_the_same_levels_as_the_closed_form() -> None:
    sampler = Information(LogNormal(-1.2, 1.6), floor=0.02, gate=False, sigma_data=1.0, half_life=8.0, **BINS)
    train(sampler, criterion_of(half_life=math.inf), gaussian(1.0), 200, sigma_data=1.0)
    mean, std = moments(sampler)
    assert mean == pytest.approx(-0.02 * 1.2, abs=0.05)  # 2 % of the draws are the base's
    assert std == pytest.approx(math.sqrt(0.98 * 0.907**2 + 0.02 * (1.6**2 + 1.2**2)), abs=0.05)


def test_the_density_integrates_to_one_and_is_that_of_the_draws() -> None:
    sampler = Information(LogNormal(), profile=profile_of(gaussian(0.5)), **BINS)
    at = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    assert float(torch.trapezoid(sampler.log_density(at).exp(), at)) == pytest.approx(1.0, abs=1e-3)
    drawn = sampler((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000).log_snr
    counts = torch.histc(drawn, 40, -10, 10) / len(drawn)
    edges = torch.linspace(10, -10, 41, dtype=torch.float64)
    expected = sampler.cdf(edges).diff().flip(0)
    assert torch.allclose(counts.double(), expected, atol=1e-4)


@pytest.mark.parametrize("form", ["epsilon", "sample", "v_prediction", "flow", "edm"])
def test_what_a_level_contributes_does_not_depend_on_form_or_weight(form: str) -> None:
    """p·w·u·k is the information, whatever the loss is: by the definition of p."""

    def base_weight(log_snr: Tensor) -> Tensor:
        return (0.2 * log_snr).exp()

    allocations = []
    for weighting in (vadiff.weighting.Constant(), vadiff.weighting.MinSNR(prediction_type=form)):
        sampler = Information(
            LogUniform(0.02, 50), floor=1e-15, prediction_type=form, base_weight=base_weight,
            profile=profile_of(gaussian(1.0)), **BINS,
        )  # fmt: skip
        criterion = criterion_of(weighting)
        sampler.update(criterion)
        at = sampler.bin_centers[(sampler.bin_centers > -7) & (sampler.bin_centers < 7)]
        weight = criterion.weight_at(at).double() * loss_ratio(form, at.double()) * base_weight(at)
        allocation = sampler.log_density(at).exp() * weight
        allocations.append(allocation / allocation.sum())
    assert torch.allclose(allocations[0], allocations[1], rtol=1e-5)
    within = sampler.bin_centers[sampler.bin_centers.abs() < 7.9].double()  # of the base
    sigma = (-0.5 * within).exp()
    pivot = math.exp(sampler.progress.view(torch.float64)[1])
    assert pivot == pytest.approx(1.0, rel=0.13)  # a bin's centre
    wanted = 1 / (1 + sigma**2) * sigma**3 / (sigma**3 + pivot**3)
    share = wanted.cumsum(0) / wanted.sum()
    wanted = (wanted * share / (share + 0.01))[within.abs() < 7]
    assert torch.allclose(allocations[0], wanted / wanted.sum(), rtol=0.03)


def test_weights_that_balance_cancel() -> None:
    """An adaptive weighting moves the draws, and leaves p·w where it was."""
    plain, balanced = (Information(LogNormal(), floor=1e-6, half_life=4.0, gate=False, **BINS) for _ in range(2))
    criteria = criterion_of(half_life=math.inf), criterion_of("variance_aware", half_life=math.inf)
    for sampler, criterion in zip((plain, balanced), criteria, strict=True):
        train(sampler, criterion, gaussian(3.0), 150)
    at = torch.linspace(-4, 6, 11)
    contributed = [
        sampler.log_density(at).exp() * criterion.weight_at(at)
        for sampler, criterion in zip((plain, balanced), criteria, strict=True)
    ]
    shares = [values / values.sum() for values in contributed]
    assert torch.allclose(shares[0], shares[1], rtol=0.35, atol=0.01)  # floor, smoothing, confidence
    assert moments(plain) != pytest.approx(moments(balanced), abs=0.05)


# the failures that others met


def test_a_network_far_from_optimal_at_low_noise_does_not_draw_all_levels_there() -> None:
    """An x0 network leaves an error of 0.003 at every level: m/σ³ would send 99 % of the draws to the lowest σ."""

    def error(log_snr: Tensor) -> Tensor:
        return gaussian(1.0)(log_snr) + 0.003

    base = LogUniform(0.008, 80.0)
    gated, open_ = (
        Information(base, gate=gate, prediction_type="sample", floor=0.05, half_life=4.0, **BINS)
        for gate in (True, False)
    )
    for sampler in (gated, open_):
        train(sampler, criterion_of(), error, 60, form="sample")
    quarter = 0.008 * (80.0 / 0.008) ** 0.25
    assert share_below(gated, quarter) < 0.03
    assert share_below(open_, quarter) < 0.5  # σ̃² bounds the information


def test_eps_networks_do_not_draw_all_levels_at_high_noise() -> None:
    """An error of 0.005 in eps is an x0 error of 50 at σ 100, where the mean of the data leaves 0.25."""

    def error(log_snr: Tensor) -> Tensor:
        return gaussian(0.5)(log_snr) + 0.005 * (-log_snr).exp()

    base = UniformTime("vp_linear", t_min=1e-3)
    known, bounded, unbounded = (
        Information(base, prediction_type="epsilon", half_life=4.0, largest_error=limit, **BINS)
        for limit in (0.25, None, 1e9)
    )
    for sampler in (known, bounded, unbounded):
        train(sampler, criterion_of(), error, 60, form="epsilon")
    best = Information(base, prediction_type="epsilon", profile=profile_of(gaussian(0.5)), **BINS)
    assert 1.0 - share_below(unbounded, 20.0) > 0.7
    assert 1.0 - share_below(bounded, 20.0) < 0.6
    assert share_below(known, 20.0) == pytest.approx(share_below(best, 20.0), abs=0.1)


def test_an_untrained_network_leaves_the_levels_on_their_base_and_says_so() -> None:
    base = LogNormal(-1.2, 1.2)
    sampler = Information(base, prediction_type="epsilon", half_life=4.0, **BINS)
    assert sampler.state == "on its base LogNormal(p_mean=-1.2, p_std=1.2): no update yet"
    criterion = criterion_of()
    sampler.update(criterion)
    assert "the criterion has no samples" in sampler.state
    train(sampler, criterion, lambda log_snr: (-log_snr).exp(), 30, form="epsilon")  # eps = 0: x0 error σ²
    assert sampler.moved == pytest.approx(0.0, abs=1e-9)
    assert "on its base" in repr(sampler)
    assert "the x0 error falls no faster than the noise" in sampler.state
    train(sampler, criterion_of(), gaussian(0.5), 60, form="epsilon")
    assert "of the draws moved from its base" in sampler.state
    assert "gate at sigma" in sampler.state


def test_a_point_mass_has_no_information_and_stays_on_the_base() -> None:
    sampler = Information(LogNormal(), half_life=4.0, **BINS)
    train(sampler, criterion_of(), lambda log_snr: 1e-6 * (-log_snr).exp(), 20)
    assert sampler.moved == pytest.approx(0.0, abs=1e-9)


def test_two_points_are_told_apart_at_noise_of_their_distance() -> None:
    """x0 = ±1: the information is where σ is about 1, and vanishes at low noise faster than any power."""
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    gauss = (-0.5 * x**2).exp() / math.sqrt(2 * math.pi)

    def error(log_snr: Tensor) -> Tensor:
        snr = log_snr.double().exp()[:, None]
        return 1.0 - torch.trapezoid(gauss * torch.tanh(snr + snr.sqrt() * x), x, dim=1)

    levels = torch.linspace(-7, 3.5, 60, dtype=torch.float64)
    profile = Profile(levels, error(levels).clamp(min=1e-12))
    assert profile.pivot == pytest.approx(1.75, rel=0.1)  # half of the highest rate, which is .4
    sampler = Information(
        LogUniform(0.05, 50), floor=1e-9, gate=False, prediction_type="epsilon", profile=profile, **BINS
    )
    allocated = sampler.log_density(levels).exp() * levels.exp()
    assert abs(float(-0.5 * levels[allocated.argmax()])) < 0.5
    found = suggest(profile.log_snr, profile.x0_error)
    assert found.sigma_data == pytest.approx(1.0, rel=0.03)
    assert -0.1 < found.p_mean < 0.7
    assert found.p_std < 0.907  # of a Gaussian


def test_the_levels_follow_slowly_in_the_right_direction_and_by_samples_not_updates() -> None:
    """After a change of the network the levels go from the old profile to the new one, and do not jump."""
    means = []
    for every in (1, 2):
        sampler = Information(LogUniform(0.01, 100), floor=0.05, sigma_data=0.5, half_life=16.0, **BINS)
        criterion = criterion_of(half_life=16.0)
        train(sampler, criterion, gaussian(0.3), 48)
        path = [moments(sampler)[0]]
        for _ in range(6):
            train(sampler, criterion, gaussian(3.0), 2, every=every)
            path.append(moments(sampler)[0])
        assert all(before < after for before, after in pairwise(path))
        assert path[1] - path[0] < 0.6 * (path[-1] - path[0])
        means.append(path[-1])
    assert means[0] == pytest.approx(means[1], abs=0.12)


def test_bins_that_do_not_fill_keep_the_base_and_show_in_the_confidence() -> None:
    sampler = Information(LogNormal(), bins=1024, log_snr_range=(-16, 16), smoothing=0.0, half_life=1e-3)
    criterion = vadiff.DiffusionLoss("constant", bins=1024)
    train(sampler, criterion, gaussian(0.5), 4, batch=256)
    assert sampler.moved < 0.15
    assert "on its base" in sampler.state or "confidence 1" in sampler.state


def test_levels_that_were_starved_come_back() -> None:
    """First nothing is to be learned at high noise, then much is: the floor goes on looking there."""
    sampler = Information(LogUniform(0.01, 100), floor=0.1, sigma_data=0.5, half_life=4.0, **BINS)
    criterion = criterion_of()
    train(sampler, criterion, lambda log_snr: 0.01 * gaussian(0.1)(log_snr) + 1e-9, 60)
    train(sampler, criterion, gaussian(0.1), 20)
    starved = 1.0 - share_below(sampler, 3.0)
    assert starved < 0.1
    assert starved > 0.02  # the floor
    train(sampler, criterion, gaussian(10.0), 150)
    assert 1.0 - share_below(sampler, 3.0) > 0.5


def test_no_level_is_ever_drawn_less_than_the_floor() -> None:
    sampler = Information(LogUniform(0.01, 100), floor=0.2, profile=profile_of(gaussian(0.1)), **BINS)
    at = torch.linspace(-9, 9, 50)
    assert bool((sampler.log_density(at) >= sampler.base.log_density(at) + math.log(0.2) - 1e-9).all())


@pytest.mark.parametrize("share", [1 / 3, 0.1])
def test_redundant_data_keep_their_gate_when_the_network_gets_better(share: float) -> None:
    """Grey images in three channels leave at most a third of the noise: the highest rate counts, not 1."""
    sampler = Information(LogNormal(), sigma_data=0.5, half_life=8.0, **BINS)
    criterion = criterion_of()
    for excess in (1.0, 0.1, 0.0):  # of the network's error over the best, with σ² as its bound

        def error(log_snr: Tensor, excess: float = excess) -> Tensor:
            return gaussian(0.5)(log_snr) * (share + (1 - share) * excess)

        train(sampler, criterion, error, 60)
    assert sampler.moved > 0.1
    assert "gate at sigma" in sampler.state
    pivot = math.exp(sampler.progress.view(torch.float64)[1])
    assert pivot == pytest.approx(0.5, rel=0.3)


def test_samples_from_outside_the_range_say_nothing_of_its_end_bins() -> None:
    """Converted at the centre of a bin, they are far from it; end bins with many take their neighbours' error."""
    criterion = vadiff.DiffusionLoss("constant", bins=32, log_snr_range=(-4, 4), half_life=math.inf)
    log_snr = torch.linspace(-10, 12, 4000)
    criterion.reweight(gaussian(0.5)(log_snr) * loss_ratio("epsilon", log_snr), log_snr)
    profile = Profile.of_criterion(criterion, "epsilon")
    inside = profile.log_snr.abs() < 3.5
    assert torch.allclose(profile.x0_error[inside], gaussian(0.5)(profile.log_snr[inside]), rtol=0.05)
    # Of end bins the neighbours' error is taken, a bin's width of e^0.25 away.
    assert torch.allclose(profile.x0_error, gaussian(0.5)(profile.log_snr), rtol=0.3)


def test_confidence_is_the_weight_of_the_profile_in_the_logarithm_of_the_tilt() -> None:
    """With n samples in each bin and prior n, the tilt is the square root of the one with a prior near 0."""
    criterion = vadiff.DiffusionLoss("constant", half_life=math.inf, **BINS)
    criterion.reweight(gaussian(1.0)(log_snr := criterion.bin_centers.repeat(40)), log_snr)
    base = LogUniform(math.exp(-5.0), math.exp(5.0))
    tilts = []
    for prior in (1e-9, 40.0):
        sampler = Information(
            base, floor=1e-9, gate=False, prediction_type="sample", smoothing=0.0, prior=prior, half_life=1e-6, **BINS
        )
        sampler.update(copy.deepcopy(criterion))
        tilt = sampler.log_density(sampler.bin_centers) - base.log_density(sampler.bin_centers)
        tilts.append(tilt - tilt[40])
    torch.testing.assert_close(tilts[1], 0.5 * tilts[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("error", "high"), [(lambda log_snr: (-log_snr).exp(), 80.0), (gaussian(2.0), 1.0)])
def test_a_profile_whose_rate_does_not_fall_within_its_levels_has_no_pivot(error: Error, high: float) -> None:
    """Beyond the levels errors are extrapolated, as constant: no pivot may be read from there."""
    sampler = Information(LogNormal(), profile=profile_of(error, 2e-3, high), **BINS)
    assert sampler.moved == 0.0
    assert "on its base" in sampler.state


# state


def test_levels_that_return_to_their_base_say_so() -> None:
    sampler, criterion = Information(LogNormal(), half_life=8.0, **BINS), criterion_of()
    train(sampler, criterion, gaussian(2.0), 60)
    criterion.statistics.reset()
    sampler.update(criterion)
    assert "of the draws are away from its base" in sampler.state
    assert "and return: the criterion has no samples" in sampler.state


def test_a_state_of_another_form_of_the_loss_is_refused_and_nothing_is_loaded() -> None:
    sampler, other = Information(LogNormal(), **BINS), Information(LogNormal(), prediction_type="flow", **BINS)
    train(other, criterion_of(), gaussian(0.5), 20, form="flow")
    with pytest.raises(RuntimeError, match="another form of the loss"):
        sampler.load_state_dict(other.state_dict())
    assert sampler.moved == 0.0


def test_a_resumed_sampler_goes_on_to_the_bit() -> None:
    def made() -> Information:
        return Information(LogNormal(), half_life=4.0, **BINS)

    sampler, criterion = made(), criterion_of()
    train(sampler, criterion, gaussian(0.5), 10)
    resumed, other = made(), criterion_of()
    resumed.load_state_dict(copy.deepcopy(sampler.state_dict()))
    other.load_state_dict(copy.deepcopy(criterion.state_dict()))
    assert resumed.state == sampler.state
    for one, loss in ((sampler, criterion), (resumed, other)):
        train(one, loss, gaussian(1.0), 5)
    for name, value in sampler.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_float_casts_and_copies_keep_the_state() -> None:
    sampler = Information(LogNormal(), half_life=4.0, **BINS)
    train(sampler, criterion_of(), gaussian(0.5), 10)
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    levels = sampler(u).log_snr
    assert torch.equal(copy.deepcopy(sampler).half()(u).log_snr, levels)


def test_sampler_and_update_compile_without_a_break() -> None:
    sampler = Information(LogNormal(), half_life=4.0, **BINS)
    criterion = criterion_of()
    u = torch.linspace(0.01, 0.99, 64, dtype=torch.float64)

    def step(u: Tensor) -> Tensor:
        log_snr = sampler(u).log_snr
        criterion.reweight(log_snr.abs() + 1, log_snr)
        sampler.update(criterion)
        return sampler(u).log_snr

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.isfinite(compiled(u)).all()


# refusals


class Curve:
    """What an optimal loss looks like."""

    def log_loss_at(self, log_snr: Tensor) -> Tensor:
        return log_snr


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"profile": Curve()}, TypeError, "has memorised the training images"),
        ({"profile": torch.ones(3)}, TypeError, "profile is a Tensor, expected a vadiff.information.Profile"),
        ({"prediction_type": "noise"}, ValueError, "prediction_type is 'noise'"),
        ({"floor": 0.0}, ValueError, "floor is 0.0"),
        ({"gate": "no"}, ValueError, "gate is 'no', expected True or False"),
        ({"largest_error": 0.0}, ValueError, "largest_error is 0.0"),
        ({"base_weight": 3.0}, TypeError, "base_weight is 3.0, expected a function"),
        ({"base": Information()}, TypeError, "base is"),
        ({"half_life": -1.0}, ValueError, "half_life is -1.0"),
        ({"sigma_data": 0.0}, ValueError, "sigma_data is 0.0"),
        ({"base_weight": lambda log_snr: 0 * log_snr}, ValueError, "base_weight has a number that is not positive"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Information(**options)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (vadiff.DiffusionLoss("constant", loss="huber", **BINS), "loss is 'huber', expected 'mse'"),
        (vadiff.DiffusionLoss("loss_zscore", **BINS), "depends on log-SNR alone"),
        (vadiff.DiffusionLoss("constant"), "the criterion's bins are"),
    ],
)
def test_a_criterion_without_a_profile_is_refused_and_changes_nothing(
    criterion: vadiff.DiffusionLoss, message: str
) -> None:
    sampler = Information(**BINS)
    with pytest.raises(ValueError, match=message):
        sampler.update(criterion)
    assert sampler.moved == 0.0


def test_a_process_whose_levels_are_bounded_can_be_the_base() -> None:
    sampler = Information(
        UniformTime("vp_linear", t_min=1e-3), prediction_type="epsilon", profile=profile_of(gaussian(0.5)), **BINS
    )
    low, high = sampler.base.log_snr_range
    levels = sampler(torch.linspace(0.001, 0.999, 999, dtype=torch.float64)).log_snr
    assert torch.isfinite(levels).all()
    assert low <= levels.min()
    assert levels.max() <= high
    assert sampler.moved > 0.1


# suggestions


@pytest.mark.parametrize("spread", [0.05, 0.5, 1.0, 20.0])
def test_suggestion_of_gaussian_data(spread: float) -> None:
    profile = profile_of(gaussian(spread), 1e-2 * spread, 1e2 * spread)
    found = suggest(profile.log_snr, profile.x0_error)
    assert found.sigma_data == pytest.approx(spread, rel=1e-3)
    assert found.p_mean == pytest.approx(math.log(spread), abs=1e-3)
    assert found.p_std == pytest.approx(math.pi / (2 * math.sqrt(3)), rel=1e-3)
    assert found.alpha == pytest.approx(math.exp(found.logit_mean))
    at = torch.linspace(-3, 3, 7, dtype=torch.float64)
    density = information_density(profile, at + math.log(spread), "edm", spread)
    assert torch.allclose(density, 0.5 / at.cosh().square(), rtol=5e-3)


def test_a_suggestion_does_not_depend_on_which_levels_were_measured() -> None:
    """As long as they reach beyond the data's scale at both ends."""
    whole = profile_of(gaussian(0.5), 1e-3, 1e3)
    part = profile_of(gaussian(0.5), 0.05, 10.0)
    one, other = (suggest(p.log_snr, p.x0_error) for p in (whole, part))
    assert one.p_mean == pytest.approx(other.p_mean, abs=0.02)
    assert one.logit_std == pytest.approx(other.logit_std, abs=0.02)


def test_data_ten_times_as_large_shift_edms_levels_by_ln_ten() -> None:
    found = [suggest((p := profile_of(gaussian(s))).log_snr, p.x0_error) for s in (0.4, 4.0)]
    assert found[1].p_mean - found[0].p_mean == pytest.approx(math.log(10), abs=1e-6)
    assert found[1].p_std == pytest.approx(found[0].p_std, rel=1e-6)


@pytest.mark.parametrize(("low", "high", "which"), [(0.5, 100.0, "lower"), (1e-3, 1.2, "higher")])
def test_levels_that_do_not_reach_far_enough_are_refused(low: float, high: float, which: str) -> None:
    profile = profile_of(gaussian(1.0), low, high)
    with pytest.raises(ValueError, match=f"measure the error at {which} noise too"):
        suggest(profile.log_snr, profile.x0_error, sigma_data=1.0)


def test_errors_that_are_still_those_of_the_noise_are_refused() -> None:
    profile = profile_of(lambda log_snr: (-log_snr).exp())
    with pytest.raises(ValueError, match="measure it at higher noise"):
        suggest(profile.log_snr, profile.x0_error)


def test_errors_of_eps_networks_need_sigma_data_and_are_bounded_by_it() -> None:
    profile = profile_of(lambda log_snr: gaussian(0.5)(log_snr) + 0.005 * (-log_snr).exp())
    with pytest.raises(ValueError, match=r"x0_error still grows at the highest noise, .*give sigma_data"):
        suggest(profile.log_snr, profile.x0_error)
    found = suggest(profile.log_snr, profile.x0_error, sigma_data=0.5)
    assert found.p_mean == pytest.approx(math.log(0.5), abs=0.05)
    assert found.logit_std == pytest.approx(1.1, abs=0.15)
