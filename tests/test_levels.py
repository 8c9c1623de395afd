"""Noise levels: densities against draws and integrals, tables and corrections, stratification, adaptation, resuming."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import scipy.stats
import torch
from torch import Tensor

import vadiff
from vadiff import levels, process
from vadiff.levels import (
    Beta,
    Cauchy,
    CosineInterpolated,
    CosMap,
    Laplace,
    LevelSampler,
    LogitNormal,
    LogLogistic,
    LogNormal,
    LogUniform,
    LossSpread,
    Mixture,
    Mode,
    SecondMoment,
    Shift,
    SplitLogNormal,
    Table,
    UniformTime,
    uniforms,
)

FIXED: dict[str, Callable[[], LevelSampler]] = {
    "log normal": LogNormal,
    "log normal, cut off": lambda: LogNormal(-0.4, 1.0, log_snr_range=(-1.0, 4.0)),
    "logit normal": LogitNormal,
    "mode": Mode,
    "mode, the ends": lambda: Mode(-0.8),
    "cosmap": CosMap,
    "laplace": Laplace,
    "laplace, cut off below": lambda: Laplace(1.0, 2.0, log_snr_range=(0.0, math.inf)),
    "cauchy": Cauchy,
    "log uniform": LogUniform,
    "uniform flow time": UniformTime,
    "uniform flow time, data at 1": lambda: UniformTime(process.Flow(data_at=1)),
    "uniform cosine time": lambda: UniformTime("vp_cosine"),
    "uniform linear time": lambda: UniformTime("vp_linear", t_min=1e-3),
    "uniform sigma": lambda: UniformTime(process.EDM(), 0.1, 3.0),
    "table": lambda: Table([1.0, 0.0, 3.0, 2.0], (-4.0, 4.0)),
    "table on log normal": lambda: Table([1.0, 0.5, 3.0, 2.0], (-2.0, 6.0), base=LogNormal(), corrected=True),
    "log logistic": lambda: LogLogistic(-0.7, 0.5),
    "split log normal": lambda: SplitLogNormal(-0.4, 0.5, 1.5),
    "split log normal, cut off": lambda: SplitLogNormal(-0.4, 1.5, 0.5, log_snr_range=(-1.0, 4.0)),
    "cosine, interpolated": lambda: CosineInterpolated(256, 32, 128, sigma_data=0.5),
    "beta": Beta,
    "beta, cut off": lambda: Beta(0.6, 3.0, log_snr_range=(-10.0, 10.0)),
    "shifted logit normal": lambda: Shift(LogitNormal(), 3.0),
    "shifted uniform linear time, cut off": lambda: Shift(UniformTime("vp_linear"), 3.0, log_snr_range=(-10.0, 9.0)),
    "shifted table": lambda: Shift(Table([1.0, 0.0, 3.0, 2.0], (-4.0, 4.0)), 0.25),
    "mixture with uniform time": lambda: Mixture(LogitNormal(0.0, 0.3)),
    "mixture of a table": lambda: Mixture(Table([1.0, 0.0, 3.0, 2.0], (-4.0, 4.0)), LogUniform(), 0.2),
    "table on a table": lambda: Table([1.0, 4.0], (-4.0, 4.0), base=Table([1.0, 2.0, 3.0], (-4.0, 4.0))),
}


@pytest.fixture(params=list(FIXED))
def sampler(request: pytest.FixtureRequest) -> LevelSampler:
    return FIXED[request.param]()


def midpoints(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_levels_are_float32_inside_the_range_and_noise_grows_with_u(sampler):
    drawn = sampler(midpoints(1000))
    low, high = sampler.log_snr_range
    assert drawn.log_snr.dtype == torch.float32
    assert drawn.log_snr.isfinite().all()
    assert (drawn.log_snr.diff() <= 0).all()
    assert (drawn.log_snr >= low - 1e-6).all()
    assert (drawn.log_snr <= high + 1e-6).all()
    torch.testing.assert_close(drawn.sigma, (-0.5 * drawn.log_snr.double()).exp().float())


def test_empirical_density_is_the_stated_one(sampler):
    """Shares of equally spaced u against integrals of the density, over 40 intervals of log-SNR."""
    drawn = sampler(midpoints(200_000)).log_snr.double()
    limits = torch.linspace(drawn.min(), drawn.max(), 41, dtype=torch.float64)
    share = torch.histc(drawn, 40, drawn.min().item(), drawn.max().item()) / len(drawn)
    fine = torch.linspace(0.0, 1.0, 4001, dtype=torch.float64)
    for left, right, found in zip(limits[:-1], limits[1:], share, strict=True):
        at = left + (right - left) * 0.5 * (fine[1:] + fine[:-1])
        expected = sampler.log_density(at).exp().mean() * (right - left)
        assert found == pytest.approx(expected.item(), abs=2e-5)


def test_density_integrates_to_one(sampler):
    at = torch.linspace(-80.0, 80.0, 200_001, dtype=torch.float64)
    assert sampler.log_density(at).exp().sum() * 8e-4 == pytest.approx(1.0, abs=5e-4)


def test_cdf_undoes_the_quantile(sampler):
    u = midpoints(999)
    torch.testing.assert_close(sampler.cdf(sampler(u).log_snr), u, rtol=0, atol=2e-6)


def test_no_density_outside_the_range():
    cut = LogNormal(log_snr_range=(-1.0, 4.0))
    outside = torch.tensor([-1.01, 4.01, math.inf, -math.inf, math.nan])
    assert cut.log_density(outside).eq(-math.inf).all()


def test_levels_at_the_ends_have_a_density_after_rounding_to_float32(sampler):
    near = torch.linspace(1e-9, 1e-7, 100, dtype=torch.float64)
    drawn = sampler(torch.cat([near, 1.0 - near])).log_snr
    assert sampler.log_density(drawn).isfinite().all()


def test_share_of_a_level_that_is_no_number_is_none(sampler):
    assert sampler.cdf(torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize(
    ("sampler", "distribution"),
    [
        (LogNormal(-0.8, 1.6), scipy.stats.norm(1.6, 3.2)),
        (LogitNormal(0.3, 0.7), scipy.stats.norm(-0.6, 1.4)),
        (Laplace(0.5, 0.75), scipy.stats.laplace(0.5, 0.75)),
        (Cauchy(1.0, 2.0, (-math.inf, math.inf)), scipy.stats.cauchy(1.0, 2.0)),
        (CosMap(), scipy.stats.hypsecant(0.0, 2.0)),
        (UniformTime("flow"), scipy.stats.logistic(0.0, 2.0)),
        (LogLogistic(-0.7, 0.5), scipy.stats.logistic(1.4, 1.0)),
        (SplitLogNormal(-0.6, 0.8, 0.8), scipy.stats.norm(1.2, 1.6)),
        (CosineInterpolated(64, 64, 64, 1.0, 1e-12, 1e12), scipy.stats.hypsecant(0.0, 2.0)),
        (Beta(1.0, 1.0), scipy.stats.logistic(0.0, 2.0)),
        (Shift(LogitNormal(0.3, 0.7), 2.0), scipy.stats.norm(-0.6 - 2.0 * math.log(2.0), 1.4)),
        (LogUniform(math.exp(-2.0), math.exp(1.0)), scipy.stats.uniform(-2.0, 6.0)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, LevelSampler) else "",
)
def test_named_distributions_are_scipys(sampler, distribution):
    u = midpoints(97)
    expected = torch.from_numpy(distribution.isf(u.numpy()))  # noise grows where log-SNR falls
    torch.testing.assert_close(sampler(u).log_snr.double(), expected, rtol=1e-6, atol=1e-6)
    density = torch.from_numpy(distribution.logpdf(expected.numpy()))
    torch.testing.assert_close(sampler.log_density(expected), density, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("a", "b"), [(0.25, 0.5), (0.8, 1.0), (2.0, 5.0), (100.0, 100.0), (100.0, 2.0)])
def test_noise_shares_of_beta_are_scipys(a, b):
    sampler, u = Beta(a, b), midpoints(997)
    t = (-0.5 * sampler._levels(u)).sigmoid()
    found = torch.from_numpy(scipy.stats.beta.cdf(t.numpy(), a, b))
    torch.testing.assert_close(found, u, rtol=0, atol=2e-6)
    at = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    density = sampler.log_density(-2.0 * at.logit()) - (0.5 * at * (1.0 - at)).log()
    torch.testing.assert_close(
        density, torch.from_numpy(scipy.stats.beta.logpdf(at.numpy(), a, b)), rtol=1e-9, atol=1e-8
    )


@pytest.mark.parametrize("b", [0.25, 2.0])
def test_smallest_noise_shares_of_beta_follow_its_power_law(b):
    u = torch.tensor([1e-15, 1e-12], dtype=torch.float64)
    t = (-0.5 * Beta(0.5, b)._levels(u)).exp()
    expected = (0.5 * scipy.special.beta(0.5, b) * u) ** 2
    torch.testing.assert_close(t, expected, rtol=1e-6, atol=0)


def test_flow_densities_are_those_of_diffusers():
    """diffusers draws t of a flow; its `mode` has 1 - u in u's place."""
    training_utils = pytest.importorskip("diffusers.training_utils")
    torch.manual_seed(3)
    t = training_utils.compute_density_for_timestep_sampling("mode", 64, mode_scale=1.29)
    torch.manual_seed(3)
    ours = Mode(1.29)(1.0 - torch.rand(64).double()).log_snr
    torch.testing.assert_close(torch.sigmoid(-0.5 * ours), t, rtol=1e-5, atol=1e-6)
    torch.manual_seed(3)
    t = training_utils.compute_density_for_timestep_sampling("logit_normal", 64, logit_mean=0.5, logit_std=0.8)
    torch.manual_seed(3)
    z = torch.normal(mean=0.5, std=0.8, size=(64,))
    ours = LogitNormal(0.5, 0.8)(torch.special.ndtr((z.double() - 0.5) / 0.8)).log_snr
    torch.testing.assert_close(torch.sigmoid(-0.5 * ours), t, rtol=1e-5, atol=1e-6)


# uniform numbers


@pytest.mark.parametrize("samples", [1, 7, 64])
@pytest.mark.parametrize("antithetic", [False, True])
def test_stratified_numbers_fill_every_stratum_once(samples, antithetic):
    u = uniforms(samples, generator(), stratified=True, antithetic=antithetic)
    assert (u * samples).floor().sort().values.tolist() == list(range(samples))


@pytest.mark.parametrize("stratified", [False, True])
def test_antithetic_numbers_come_in_pairs(stratified):
    u = uniforms(8, generator(), stratified=stratified, antithetic=True).sort().values
    torch.testing.assert_close(u, 1.0 - u.flip(0))
    assert len(uniforms(9, generator(), stratified=stratified, antithetic=True).unique()) == 9


def test_uniform_numbers_are_float64_reproducible_and_inside_the_open_interval():
    u = uniforms(1000, generator(5))
    assert u.dtype == torch.float64
    assert torch.equal(u, uniforms(1000, generator(5)))
    assert ((u > 0) & (u < 1)).all()
    ends = torch.tensor([2.0**-54, 1.0 - 2.0**-53], dtype=torch.float64)
    assert LogNormal()(ends).log_snr.isfinite().all()


def test_strata_span_the_ranks_and_each_rank_sees_all_noise_levels():
    u = uniforms(64, generator(), stratified=True)
    for part in u.chunk(2):
        assert part.min() < 0.25
        assert part.max() > 0.75


@pytest.mark.parametrize("name", ["log normal", "uniform flow time", "cauchy", "table on log normal"])
def test_stratified_batches_lower_the_variance_of_the_batch_mean(name):
    sampler, source = FIXED[name](), generator()

    def spread(**how: bool) -> float:
        means = [sampler(uniforms(32, source, **how)).log_snr.sigmoid().mean() for _ in range(200)]
        return torch.stack(means).var().item()

    plain = spread()
    assert spread(stratified=True) < 0.05 * plain
    assert spread(stratified=True, antithetic=True) < 0.05 * plain
    assert spread(antithetic=True) < 0.8 * plain


# tables


def base_loss(log_snr: Tensor) -> Tensor:
    return 0.1 + torch.exp(-0.5 * (log_snr - 1.0) ** 2)


def test_correction_leaves_the_expected_loss_of_the_base_unchanged():
    base = LogNormal()
    tilted = Table([1.0, 8.0, 0.2, 1.0, 3.0], (-6.0, 4.0), base=base, corrected=True)
    u = midpoints(200_000)
    drawn = tilted(u)
    assert drawn.sample_weight is not None
    expected = base_loss(base(u).log_snr).mean()
    assert (drawn.sample_weight * base_loss(drawn.log_snr)).mean() == pytest.approx(expected.item(), rel=1e-4)
    assert drawn.sample_weight.mean() == pytest.approx(1.0, rel=1e-4)
    assert base_loss(drawn.log_snr).mean() != pytest.approx(expected.item(), rel=0.05)
    ratio = (base.log_density(drawn.log_snr) - tilted.log_density(drawn.log_snr)).exp()
    assert torch.isclose(ratio.float(), drawn.sample_weight).float().mean() > 0.9999  # but for rounding at a bin's edge


def test_sampling_twin_has_the_expected_gradient_of_the_weighting():
    base, weighting = LogNormal(), vadiff.weighting.MinSNR(5.0, "sample")
    centers = torch.linspace(-16.0, 16.0, 513)[:-1] + 1 / 32
    twin = Table(weighting(centers), base=base)
    u = midpoints(100_000)
    weighted = weighting(base(u).log_snr)
    by_weight = (weighted * base_loss(base(u).log_snr)).mean() / weighted.mean()
    assert twin(u).sample_weight is None
    assert base_loss(twin(u).log_snr).mean() == pytest.approx(by_weight.item(), rel=1e-3)


def test_a_table_of_equal_factors_is_its_base():
    base = LogNormal()
    u = uniforms(512, generator())
    same = Table(torch.full((8,), 3.0), base=base, corrected=True)(u)
    torch.testing.assert_close(same.log_snr, base(u).log_snr, rtol=1e-6, atol=1e-6)
    assert same.sample_weight.eq(1.0).all()


def test_bins_with_factor_zero_are_never_drawn():
    drawn = Table([0.0, 1.0, 0.0, 0.0, 2.0, 0.0], (0.0, 6.0))(midpoints(10_000)).log_snr
    assert set(drawn.floor().long().tolist()) == {1, 4}


# adaptive samplers


def trained(weighting: str = "constant", device: str = "cpu", **options: object) -> vadiff.DiffusionLoss:
    """Losses of mean 1 and spread rising with log-SNR, where log-SNR is above 0; far lower ones below."""
    criterion = vadiff.DiffusionLoss(
        weighting, bins=8, log_snr_range=(-8.0, 8.0), half_life=math.inf, backend="reference", **options
    ).to(device)
    log_snr = uniforms(8192, generator()).float() * 16 - 8
    noise = torch.randn(8192, generator=generator(1)).square()
    criterion.reweight(((log_snr > 0) * 0.9 + 0.1) * noise, log_snr)
    return criterion


ADAPTIVE = [SecondMoment, LossSpread]


@pytest.fixture(params=ADAPTIVE, ids=lambda kind: kind.__name__)
def make_adaptive(request: pytest.FixtureRequest) -> Callable[..., levels.AdaptiveLevels]:
    def make(**options: object) -> levels.AdaptiveLevels:
        settings = {"base": LogNormal(0.0, 1.5), "bins": 8, "log_snr_range": (-8.0, 8.0), "smoothing": 0.0, **options}
        return request.param(**settings)

    return make


def test_before_any_update_an_adaptive_sampler_is_its_base(make_adaptive):
    u = uniforms(64, generator())
    torch.testing.assert_close(make_adaptive()(u).log_snr, LogNormal(0.0, 1.5)(u).log_snr, rtol=1e-6, atol=1e-6)


def test_density_follows_the_statistic(make_adaptive):
    criterion = trained()
    sampler = make_adaptive(floor=1e-9, prior=1e-6)
    sampler.update(criterion)
    statistics = criterion.statistics
    expected = statistics.variance.sqrt()
    if isinstance(sampler, SecondMoment):
        expected = (statistics.mean**2 + statistics.state.view(torch.float64)[16:24] / statistics.count).sqrt()
    tilt = (sampler.log_density(sampler.bin_centers) - sampler.base.log_density(sampler.bin_centers)).exp()
    torch.testing.assert_close(tilt / tilt.sum(), expected / expected.sum(), rtol=1e-5, atol=0)
    assert tilt[6] > 5 * tilt[1]


def test_the_weight_of_the_criterion_enters(make_adaptive):
    """loss_level makes all means equal, and with losses that spread in proportion nothing is left to do."""
    sampler = make_adaptive(floor=1e-9, prior=1e-6)
    sampler.update(trained(vadiff.weighting.LossLevel(smoothing=0.0, prior=1e-6, clip=math.inf)))
    tilt = (sampler.log_density(sampler.bin_centers) - sampler.base.log_density(sampler.bin_centers)).exp()
    assert tilt.max() / tilt.min() < 1.2


def test_floor_bounds_the_sample_weight(make_adaptive):
    sampler = make_adaptive(floor=0.5, corrected=True)
    sampler.update(trained())
    weights = sampler(midpoints(10_000)).sample_weight
    assert 1.5 < weights.max() <= 2.0
    assert weights.mean() == pytest.approx(1.0, abs=1e-3)


def test_second_moment_levels_lower_the_variance_of_the_loss_and_keep_its_mean():
    criterion = trained()
    sampler = SecondMoment(LogNormal(0.0, 1.5), bins=8, log_snr_range=(-8.0, 8.0))
    sampler.update(criterion)

    def losses(drawn: levels.NoiseLevels) -> Tensor:
        noise = torch.randn(100_000, generator=generator(2)).square()
        plain = ((drawn.log_snr > 0) * 0.9 + 0.1) * noise
        return plain if drawn.sample_weight is None else plain * drawn.sample_weight

    u = uniforms(100_000, generator(3))
    plain, adapted = losses(sampler.base(u)), losses(sampler(u))
    assert adapted.mean() == pytest.approx(plain.mean().item(), rel=0.02)
    assert adapted.var() < 0.8 * plain.var()


def test_a_resumed_sampler_draws_the_same_to_the_bit(make_adaptive):
    sampler, criterion = make_adaptive(), trained()
    sampler.update(criterion)
    resumed = make_adaptive()
    resumed.load_state_dict(copy.deepcopy(sampler.state_dict()))
    for _ in range(2):
        u = uniforms(256, generator())
        for ours, theirs in zip(sampler(u), resumed(u), strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)
        sampler.update(criterion)
        resumed.update(criterion)


def test_float_casts_leave_the_state_alone(make_adaptive):
    sampler = make_adaptive()
    sampler.update(trained())
    u = uniforms(64, generator())
    before = sampler(u).log_snr
    assert torch.equal(sampler.half()(u).log_snr, before)
    assert torch.equal(copy.deepcopy(sampler).to(torch.bfloat16)(u).log_snr, before)


def test_sampler_and_update_compile_without_a_break(make_adaptive):
    sampler, plain, criterion = make_adaptive(), make_adaptive(), trained()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(u: Tensor) -> Tensor:
        sampler.update(criterion)
        return sampler(u).log_snr

    u = uniforms(64, generator())
    plain.update(criterion)
    torch.testing.assert_close(step(u), plain(u).log_snr)


def test_a_fixed_sampler_ignores_updates():
    sampler = LogNormal()
    sampler.update(trained(), torch.zeros(3))
    u = midpoints(5)
    assert torch.equal(sampler(u).log_snr, LogNormal()(u).log_snr)


@pytest.mark.parametrize("weighting", [vadiff.weighting.LossZScore(), vadiff.weighting.Gaussian(center=None)])
def test_weights_by_more_than_log_snr_cannot_be_followed_and_leave_the_sampler_alone(make_adaptive, weighting):
    sampler = make_adaptive()
    sampler.update(trained())
    before = sampler.ratio.clone()
    with pytest.raises(ValueError, match=r"weighting is .*expected one whose weight depends on log-SNR"):
        sampler.update(trained(weighting))
    assert torch.equal(sampler.ratio, before)


class Everywhere(vadiff.weighting.FixedWeighting):
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.full_like(log_snr, self.weight)


@pytest.mark.parametrize("weight", [0.0, math.inf])
def test_weights_that_say_nothing_leave_the_levels_as_they_were(make_adaptive, weight):
    sampler, criterion = make_adaptive(), trained()
    sampler.update(criterion)
    before = sampler.ratio.clone()
    criterion.weighting = Everywhere(weight)
    sampler.update(criterion)
    torch.testing.assert_close(sampler.ratio.view(torch.float64), before.view(torch.float64), rtol=1e-12, atol=0)


def test_the_last_levels_of_the_steepest_mode_are_exact():
    """t = sin²(pi·u/2), taken from u - (u - t), would be rounding at u = 1e-15."""
    u = torch.tensor([1e-15, 1e-9], dtype=torch.float64)
    torch.testing.assert_close(Mode(-1.0)(u).log_snr.double(), -4.0 * (0.5 * math.pi * u).log(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sampler", [UniformTime("vp_cosine"), LogNormal()])
def test_densities_are_to_be_had_in_inference_mode(sampler):
    at = torch.linspace(-3.0, 3.0, 5)
    expected = sampler.log_density(at)
    with torch.inference_mode():
        assert torch.equal(sampler.log_density(at.clone()), expected)


def test_representations_name_the_arguments():
    assert repr(LogitNormal(0.5, 2.0)) == "LogitNormal(mean=0.5, std=2)"


# errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogNormal(p_std=0.0), "p_std is 0.0"),
        (lambda: LogNormal(p_mean=math.nan), "p_mean is nan"),
        (lambda: LogNormal(log_snr_range=(1.0, 1.0)), "log_snr_range is .1, 1."),
        (lambda: LogNormal(log_snr_range=(900.0, 1000.0)), "no noise levels"),
        (lambda: LogNormal(log_snr_range=3.0), "expected two numbers"),
        (lambda: Mode(1.8), "at most 2/"),
        (lambda: Laplace(scale=-1.0), "scale is -1.0"),
        (lambda: Cauchy(scale=0), "scale is 0"),
        (lambda: LogLogistic(scale=0), "scale is 0"),
        (lambda: Beta(0.1, 1.0), "a is 0.1, expected a finite number of at least 0.25"),
        (lambda: Beta(1.0, 101.0), "a and b are 1 and 101, expected at most 100"),
        (lambda: LogUniform(1.0, 0.5), "sigma_max is 0.5"),
        (lambda: UniformTime("cosine"), "process is 'cosine'.*vp_cosine"),
        (lambda: UniformTime("flow", 0.5, 0.5), "t_max is 0.5"),
        (lambda: UniformTime("vp_cosine", 0.0, 1000.0), r"t_max is 1000.0.*VPCosine\(s=0.008\) ends"),
        (lambda: Table([[1.0, 2.0]]), r"factors has shape \(1, 2\)"),
        (lambda: Table([1.0, -1.0]), "negative"),
        (lambda: Table([1.0, 0.0], corrected=True), "has a 0"),
        (lambda: Table([0.0, 0.0]), "factors is 0 wherever"),
        (lambda: SecondMoment(floor=0.0), "floor is 0.0"),
        (lambda: SecondMoment(floor=1.5), "at most 1"),
        (lambda: LossSpread(bins=1), "bins is 1"),
        (lambda: uniforms(0, generator()), "samples is 0"),
        (lambda: LogNormal()(torch.rand(2, 1)), r"u has shape \(2, 1\)"),
        (lambda: levels.from_name("lognormal"), "levels is 'lognormal'.*log_normal"),
        (lambda: SecondMoment(bins=16).update(trained()), r"criterion's bins are \(8, .*expected \(16"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_integers_are_no_uniform_numbers():
    with pytest.raises(TypeError, match=r"u has dtype torch\.int64"):
        LogNormal()(torch.arange(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogNormal()([0.5]), "u is a list"),
        (lambda: uniforms(4, 0), "generator is 0"),
        (lambda: SecondMoment("log_normal"), "base is a str"),
    ],
)
def test_other_types_are_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("other", [{"bins": 9}, {"log_snr_range": (-8.0, 9.0)}, {"base": LogNormal(0.1, 1.5)}])
def test_state_of_another_distribution_is_refused_and_nothing_is_loaded(make_adaptive, other):
    saved = make_adaptive(**other).state_dict()
    sampler = make_adaptive()
    sampler.update(trained())
    before = sampler.ratio.clone()
    with pytest.raises(RuntimeError, match="make the sampler with"):
        sampler.load_state_dict(saved)
    assert torch.equal(sampler.ratio, before)


def test_every_name_makes_a_sampler():
    for name in levels.available():
        sampler = levels.from_name(name, **({"factors": [1.0, 2.0]} if name == "table" else {}))
        assert sampler(midpoints(4)).log_snr.shape == (4,)
