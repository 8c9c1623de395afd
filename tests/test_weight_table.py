"""From statistics to weights: adaptive tables against the oracle and by what they promise, fixed exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from oracle import Oracle, min_snr

import vadiff
from vadiff.weighting import Constant, LossLevel, MinSNR, VarianceAware

pytestmark = pytest.mark.usefixtures("poisoned_memory")

INF, NAN = math.inf, math.nan
RTOL = 3e-6  # ln w is stored in float32: up to 16 it has steps of 1e-6, and w = exp(ln w) that relative error


def numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def stream(rng: np.random.Generator, sizes: tuple[int, ...]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per-sample losses that fall with log-SNR by four orders of magnitude, and their spread with them."""
    for size in sizes:
        log_snr = (4 * rng.normal(size=size)).astype(np.float32)
        losses = np.exp(-0.6 * log_snr) * rng.gamma(4.0, size=size) / 4
        yield losses.astype(np.float32), log_snr, rng.uniform(0.2, 2.0, size=size).astype(np.float32)


def feed(criterion: torch.nn.Module, device: torch.device, batch: tuple[np.ndarray, ...]) -> None:
    criterion.reweight(*(torch.as_tensor(np.asarray(x, np.float32), device=device) for x in batch))


RULES = {
    "default": {},
    "half strength": {"strength": 0.5},
    "narrow": {"smoothing": 0.2},
    "wide": {"smoothing": 3.0},
    "unsmoothed": {"smoothing": 0.0},
    "sure at once": {"prior": 1e-3},
    "never sure": {"prior": 1e6},
    "tight clip": {"clip": 1.5, "prior": 1.0},
    "no clip": {"clip": INF, "prior": 1.0},
    "negative strength": {"strength": -1.0},
}


@pytest.mark.parametrize(
    ("bins", "rule"), [*((16, rule) for rule in RULES), (2, "wide"), (50, "wide"), (256, "default")]
)
@pytest.mark.parametrize(("weighting", "statistic"), [(VarianceAware, "std"), (LossLevel, "mean")])
def test_table_follows_the_four_steps(make_criterion, rng, device, weighting, statistic, rule, bins):
    criterion = make_criterion(weighting(**RULES[rule]), bins=bins, half_life=64.0)
    oracle = Oracle(bins, -8.0, 8.0, 64.0, statistic=statistic, **RULES[rule])
    for batch in stream(rng, (7, 300)):
        feed(criterion, device, batch)
        oracle.reweight(*batch)
        np.testing.assert_allclose(numpy(criterion.weights), oracle.weights, rtol=RTOL)


@pytest.mark.parametrize(("bins", "smoothing", "reach"), [(16, 0.5, 1), (16, 1.0, 3), (160, 0.7, 21)])
def test_smoothing_reaches_three_widths_and_the_third_included(make_criterion, device, bins, smoothing, reach):
    """3·0.7 / 0.1 is 20.999999999999996 in float64, and yet the 21st bin is at three widths."""
    criterion = make_criterion(LossLevel(smoothing=smoothing, prior=1e-9, clip=INF), bins=bins)
    feed(criterion, device, ([1.0] * 4 + [100.0] * 4, [-7.99] * 4 + [7.99] * 4))
    log_weight = np.log(numpy(criterion.weights))
    np.testing.assert_allclose(log_weight[: reach + 1], log_weight[0], atol=1e-6)
    np.testing.assert_allclose(log_weight[-reach - 1 :], log_weight[-1], atol=1e-6)
    assert np.ptp(log_weight[reach + 1 : -reach - 1]) < 1e-6
    assert log_weight[reach] - log_weight[reach + 1] > 1


@pytest.mark.parametrize("weighting", ["variance_aware", "loss_level"])
def test_weights_are_one_before_the_first_batch_and_for_it(make_criterion, rng, device, weighting):
    criterion = make_criterion(weighting)
    assert (criterion.weights == 1).all()
    losses, log_snr, _ = (torch.as_tensor(x, device=device) for x in next(stream(rng, (64,))))
    assert torch.equal(criterion.weight_at(log_snr), torch.ones(64, device=device))
    assert torch.equal(criterion.reweight(losses, log_snr), losses)
    assert not torch.equal(criterion.reweight(losses, log_snr), losses)


def test_a_batch_of_one_gives_no_spread_and_leaves_the_weights_at_one(make_criterion, device):
    criterion = make_criterion(VarianceAware(prior=1e-6))
    feed(criterion, device, ([3.0], [0.5]))
    assert (criterion.weights == 1).all()


def test_one_populated_bin_has_nothing_to_balance(make_criterion, rng, device):
    """The bin itself stays at 1, as do those that borrow from it and those out of reach."""
    criterion = make_criterion(VarianceAware(prior=1e-6))
    feed(criterion, device, (rng.gamma(2.0, size=50), [0.5] * 50))
    np.testing.assert_allclose(numpy(criterion.weights), 1, rtol=1e-6)


@pytest.mark.parametrize("weighting", [VarianceAware, LossLevel])
@pytest.mark.parametrize("apart", [1, 2, 9])
def test_two_populated_bins(make_criterion, rng, device, weighting, apart):
    criterion = make_criterion(weighting(prior=4.0, smoothing=1.0))
    oracle = Oracle(16, -8.0, 8.0, statistic="std" if weighting is VarianceAware else "mean", prior=4.0, smoothing=1.0)
    losses = np.concatenate([rng.gamma(4.0, size=30), 0.05 * rng.gamma(4.0, size=30)]).astype(np.float32)
    log_snr = np.repeat(np.float32([-4.5, -4.5 + apart]), 30)
    feed(criterion, device, (losses, log_snr))
    oracle.reweight(losses, log_snr)
    weights = numpy(criterion.weights)
    np.testing.assert_allclose(weights, oracle.weights, rtol=RTOL)
    assert weights[3 + apart] > 1 > weights[3]


def test_slope_through_two_bins_is_not_extrapolated(make_criterion, device):
    """Smoothed values stay within those of the bins in reach, whatever line they suggest."""
    criterion = make_criterion(LossLevel(prior=1e-9, smoothing=2.0, clip=INF))
    feed(criterion, device, ([1.0] * 5000 + [1000.0] * 5000, [-0.5] * 5000 + [0.5] * 5000))
    weights = numpy(criterion.weights)
    assert weights.max() / weights.min() <= 1000 * (1 + 1e-5)
    assert np.argmax(weights) <= 7
    assert np.argmin(weights) >= 8


def test_empty_bins_borrow_from_their_neighbours(make_criterion, rng, device):
    criterion = make_criterion(LossLevel(prior=1.0, smoothing=1.0))
    feed(criterion, device, ([4.0] * 40 + [1.0] * 40, [-1.5] * 40 + [0.5] * 40))
    low, between, high = numpy(criterion.weights)[6:9]
    assert low < between < high
    np.testing.assert_allclose(between, math.sqrt(low * high), rtol=1e-3)  # halfway between, equally many on each side


def test_bins_out_of_reach_take_no_side(make_criterion, device):
    """a = 0 there: the weight is the normalising factor c alone, the same for all of them."""
    criterion = make_criterion(LossLevel(prior=1.0, smoothing=0.4))
    feed(criterion, device, ([4.0] * 40 + [1.0] * 40, [-7.5] * 40 + [7.5] * 40))
    weights = numpy(criterion.weights)
    assert (weights[2:-2] == weights[2]).all()
    assert weights[0] < weights[2] < weights[-1]


def test_confidence_grows_with_the_samples_behind_a_bin(make_criterion, device):
    """One bin against another at a ratio of 100: a is ±ln 10, times n/(n + prior)."""
    for samples in (1, 32, 320):
        criterion = make_criterion(LossLevel(prior=32.0, smoothing=0.0, clip=INF), half_life=INF)
        feed(criterion, device, ([100.0] * samples + [1.0] * samples, [-4.5] * samples + [4.5] * samples))
        weights = numpy(criterion.weights)
        share = samples / (samples + 32)
        assert math.log(weights[12] / weights[3]) == pytest.approx(share * math.log(100), rel=1e-5)


def test_idle_bins_fade_out_of_the_table(make_criterion, rng, device):
    """After a thousand half-lives without a sample, as if never seen; the weights stay finite on the way."""
    criterion, fresh = (make_criterion(VarianceAware(prior=1.0), bins=8, half_life=0.5) for _ in range(2))
    feed(criterion, device, (rng.gamma(4.0, size=100), rng.uniform(4, 8, size=100)))
    for half_lives in (5, 14, 1, 1, 1, 978):
        size = half_lives * 4
        losses, log_snr = rng.gamma(4.0, size=size) * 0.01, rng.uniform(-8, -4, size=size)
        feed(criterion, device, (losses, log_snr))
        assert criterion.weights.isfinite().all()
    feed(fresh, device, (losses, log_snr))
    np.testing.assert_allclose(numpy(criterion.weights), numpy(fresh.weights), rtol=RTOL)


def test_constant_losses_carry_no_signal_for_spread_but_do_for_level(make_criterion, rng, device):
    log_snr = rng.uniform(-8, 8, size=400)
    losses = np.where(log_snr > 0, 0.1, 3.3)
    for weighting, varies in ((VarianceAware(prior=1.0), False), (LossLevel(prior=1.0), True)):
        criterion = make_criterion(weighting, half_life=INF)
        for _ in range(5):
            feed(criterion, device, (losses, log_snr))
        weights = criterion.weights
        assert (weights.max() > 2 * weights.min()) if varies else torch.equal(weights, torch.ones_like(weights))


@pytest.mark.parametrize(("spread", "counts"), [(2.0**-23, False), (2.0**-17, True)])
def test_a_spread_of_rounding_is_no_signal(make_criterion, rng, device, spread, counts):
    """One in the last place of float32 is 1e-7 of the mean, under the 1e-6 that count."""
    criterion = make_criterion(VarianceAware(prior=1.0))
    losses = 1 + spread * (np.arange(200) % 2)
    losses[:100] *= 1 + np.arange(100) % 3  # other bins, with a spread of their own
    log_snr = np.repeat([-6.5, 6.5], 100)
    feed(criterion, device, (losses, log_snr))
    assert (criterion.weights.max() > 2 * criterion.weights.min()) == counts


@pytest.mark.parametrize("weighting", ["variance_aware", "loss_level"])
@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_zero_and_negative_losses_keep_weights_finite_and_positive(make_criterion, rng, device, weighting, sign):
    criterion = make_criterion(weighting)
    oracle = Oracle(16, -8.0, 8.0, statistic="std" if weighting == "variance_aware" else "mean")
    for losses, log_snr, v in stream(rng, (100, 100)):
        feed(criterion, device, (sign * losses, log_snr, v))
        oracle.reweight(sign * losses, log_snr, v)
    weights = numpy(criterion.weights)
    np.testing.assert_allclose(weights, oracle.weights, rtol=RTOL)
    assert np.isfinite(weights).all()
    assert (weights > 0).all()


@pytest.mark.parametrize(
    "losses",
    [[1.0, 3.0, -1.0, -3.0, 10.0, -10.0], [-2.0, 4.0, -2.0, 4.0, -0.9, -1.0]],
    ids=["sum is zero", "sum changes sign under the weights"],
)
def test_without_a_positive_finite_normaliser_weights_are_left_as_they_are(make_criterion, device, losses):
    criterion, oracle = make_criterion(VarianceAware(prior=0.1)), Oracle(16, -8.0, 8.0, prior=0.1)
    log_snr = [-4.5, -4.5, -4.5, -4.5, 4.5, 4.5]
    feed(criterion, device, (losses, log_snr))
    oracle.reweight(np.array(losses), np.array(log_snr))
    weights = numpy(criterion.weights)
    np.testing.assert_allclose(weights, oracle.weights, rtol=RTOL)
    assert (weights[[0, 8]] == 1).all()  # out of reach: c alone


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_losses_give_the_same_weights_as_ordinary_ones(make_criterion, rng, device, scale):
    criterion, ordinary = make_criterion(), make_criterion()
    for losses, log_snr, v in stream(rng, (200, 200)):
        feed(criterion, device, (losses * scale, log_snr, v))
        feed(ordinary, device, (losses, log_snr, v))
    np.testing.assert_allclose(numpy(criterion.weights), numpy(ordinary.weights), rtol=1e-5)


@pytest.mark.parametrize("clip", [1.0, 2.0, 10.0])
def test_weights_of_two_levels_differ_by_at_most_clip_squared(make_criterion, rng, device, clip):
    criterion = make_criterion(VarianceAware(clip=clip, prior=1e-6), half_life=INF)
    for batch in stream(rng, (2000,)):
        feed(criterion, device, batch)
    weights = numpy(criterion.weights)
    assert weights.max() / weights.min() == pytest.approx(clip**2, rel=1e-5)


@pytest.mark.parametrize("weighting", [VarianceAware, LossLevel])
def test_strength_zero_is_the_trainers_own_objective(make_criterion, rng, device, weighting):
    criterion = make_criterion(weighting(strength=0.0, prior=1.0))
    for batch in stream(rng, (100, 100)):
        feed(criterion, device, batch)
    np.testing.assert_allclose(numpy(criterion.weights), 1, rtol=2e-7)


@pytest.mark.parametrize("rule", ["default", "tight clip", "no clip", "unsmoothed"])
@pytest.mark.parametrize("weighting", [VarianceAware, LossLevel])
def test_expected_loss_is_preserved(make_criterion, rng, device, weighting, rule):
    """Σ m w μ = Σ m μ, to the rounding of ln w in float32."""
    criterion = make_criterion(weighting(**RULES[rule]))
    for batch in stream(rng, (300, 50)):
        feed(criterion, device, batch)
        mass, mean = numpy(criterion.statistics.mass), np.nan_to_num(numpy(criterion.statistics.mean))
        weighted = (mass * numpy(criterion.weights) * mean).sum()
        np.testing.assert_allclose(weighted, (mass * mean).sum(), rtol=RTOL)


def test_variance_aware_balances_spread_and_loss_level_balances_the_mean(make_criterion, rng, device):
    """Many samples, no clip, hardly any prior, no smoothing: w·std (w·mean) is the same in all bins."""
    for weighting, name in ((VarianceAware, "std"), (LossLevel, "mean")):
        criterion = make_criterion(weighting(clip=INF, prior=1e-6, smoothing=0.0), half_life=INF)
        for batch in stream(rng, (2000,)):
            feed(criterion, device, batch)
        s = criterion.statistics
        level = s.variance.sqrt() if name == "std" else s.mean
        balanced = numpy(criterion.weights) * numpy(level)
        assert (s.count > 1).all()
        np.testing.assert_allclose(balanced, balanced[0], rtol=1e-5)


def test_weights_do_not_depend_on_a_common_factor_of_sample_weights(make_criterion, rng, device):
    criterion, scaled = make_criterion(), make_criterion()
    for losses, log_snr, v in stream(rng, (100, 100)):
        feed(criterion, device, (losses, log_snr, v))
        feed(scaled, device, (losses, log_snr, 1e-3 * v))
    np.testing.assert_allclose(numpy(criterion.weights), numpy(scaled.weights), rtol=1e-5)


def learned(make: Callable[..., torch.nn.Module], rng: np.random.Generator, device: torch.device, **options: object):
    criterion = make(VarianceAware(prior=1.0), **options)
    for batch in stream(rng, (300,)):
        feed(criterion, device, batch)
    return criterion


@pytest.mark.parametrize("bins", [2, 16, 50])
def test_log_weights_are_read_by_linear_interpolation_between_centres(make_criterion, rng, device, bins):
    criterion = learned(make_criterion, rng, device, bins=bins)
    centers, log_weight = numpy(criterion.bin_centers), np.log(numpy(criterion.weights))
    np.testing.assert_allclose(centers, -8 + (np.arange(bins) + 0.5) * 16 / bins, rtol=1e-6, atol=1e-6)
    log_snr = np.concatenate([np.linspace(-9, 9, 181), centers]).astype(np.float32)
    got = criterion.weight_at(torch.as_tensor(log_snr, device=device))
    assert got.dtype == torch.float32
    assert not got.requires_grad
    expected = np.exp(np.interp(log_snr.astype(np.float64), centers, log_weight))
    np.testing.assert_allclose(numpy(got), expected, rtol=5e-6)


def test_weights_are_flat_beyond_the_outer_centres(make_criterion, rng, device):
    criterion = learned(make_criterion, rng, device)
    weights = criterion.weights
    beyond = torch.tensor([-7.5, -7.6, -8.0, -1e6, -3e38, -INF, 7.5, 7.9, 8.0, 1e6, 3e38, INF], device=device)
    expected = torch.cat([weights[:1].expand(6), weights[-1:].expand(6)])
    torch.testing.assert_close(criterion.weight_at(beyond), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighting", ["variance_aware", MinSNR()])
def test_weight_at_nan_is_nan(make_criterion, device, weighting):
    weight = make_criterion(weighting).weight_at(torch.tensor([NAN, 0.0], device=device))
    assert weight.isnan().tolist() == [True, False]


@pytest.mark.parametrize("weighting", ["variance_aware", "loss_level", MinSNR(), "constant"])
def test_the_loss_uses_what_weight_at_says(make_criterion, rng, device, weighting):
    criterion = make_criterion(weighting)
    for batch in stream(rng, (12, 12)):
        losses, log_snr, _ = (torch.as_tensor(x, device=device) for x in batch)
        residual = losses.sqrt()[:, None].expand(-1, 3)
        weight = criterion.weight_at(log_snr)
        loss = criterion(residual, torch.zeros_like(residual), log_snr, reduction="none")
        torch.testing.assert_close(loss, weight * criterion.per_sample_loss, rtol=1e-6, atol=0)


def test_a_sample_never_changes_its_own_weight(make_criterion, rng, device):
    criterion, other = (learned(make_criterion, np.random.default_rng(1), device) for _ in range(2))
    losses, log_snr, _ = (torch.as_tensor(x, device=device) for x in next(stream(rng, (20,))))
    weight = criterion.weight_at(log_snr)
    torch.testing.assert_close(criterion.reweight(losses, log_snr), weight * losses, rtol=1e-6, atol=0)
    changed = losses.clone()
    changed[3] *= 1e6
    torch.testing.assert_close(other.reweight(changed, log_snr), weight * changed, rtol=1e-6, atol=0)
    assert not torch.equal(criterion.weights, other.weights)


LEVELS = [-INF, -100.0, -8.5, -3.0, -0.2, 0.0, math.log(5), 1.7, 4.0, 8.5, 60.0, 100.0, INF]


@pytest.mark.parametrize("gamma", [5.0, 1.0, 0.3])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow", "edm"])
def test_min_snr_is_exact_at_every_log_snr(make_criterion, rng, device, prediction_type, gamma):
    criterion = make_criterion(MinSNR(gamma, prediction_type))
    formula = min_snr(prediction_type, gamma)
    log_snr = np.array(LEVELS, np.float32)
    for batch in stream(rng, (50,)):  # and stays so: nothing is normalised
        feed(criterion, device, batch)
    got = numpy(criterion.weight_at(torch.as_tensor(log_snr, device=device)))
    expected = [formula(float(x)) for x in log_snr]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-37)
    at_centers = [formula(float(x)) for x in criterion.bin_centers]
    np.testing.assert_allclose(numpy(criterion.weights), at_centers, rtol=2e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow", "edm"])
def test_min_snr_is_safe_at_zero_terminal_snr(make_criterion, device, prediction_type):
    criterion = make_criterion(MinSNR(prediction_type=prediction_type))
    prediction = torch.randn(2, 4, device=device, requires_grad=True)
    loss = criterion(prediction, torch.randn(2, 4, device=device), torch.tensor([-INF, INF], device=device))
    loss.backward()
    assert loss.isfinite()
    assert prediction.grad.isfinite().all()
    assert int(criterion.statistics.skipped) == 0


def test_constant_weights_are_one(make_criterion, rng, device):
    criterion = make_criterion(Constant())
    for batch in stream(rng, (50, 50)):
        feed(criterion, device, batch)
    assert (criterion.weights == 1).all()
    assert (criterion.weight_at(torch.tensor([-INF, 0.3, INF], device=device)) == 1).all()


def test_every_available_name_is_accepted(make_criterion):
    names = vadiff.weighting.available()
    assert {"constant", "loss_level", "min_snr", "variance_aware"} <= set(names)
    for name in names:
        assert make_criterion(name).weights.shape == (16,)


@pytest.mark.parametrize(("name", "same"), [("loss_level", LossLevel()), ("variance_aware", VarianceAware())])
def test_a_name_stands_for_the_object_with_its_defaults(make_criterion, rng, device, name, same):
    by_name, by_object = make_criterion(name), make_criterion(same)
    for batch in stream(rng, (100,)):
        feed(by_name, device, batch)
        feed(by_object, device, batch)
    assert torch.equal(by_name.weights, by_object.weights)
