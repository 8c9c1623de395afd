"""The optimal loss: closed forms, brute force, what theory says of subsets, the curve, a model's gap, the schedule."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import vadiff
from vadiff import process
from vadiff.levels import GapLevels, LogNormal, uniforms
from vadiff.optimal_loss import (
    Estimate,
    OptimalLoss,
    estimate,
    estimate_until,
    fit_scaling_law,
    model_gap,
)
from vadiff.optimal_loss.posterior import Problem
from vadiff.weighting import GapWeighting

INF = math.inf
SIGMAS = (0.3, 0.5, 0.8)  # where the posterior of the digits is over few of them


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """Handwritten digits in [-1, 1], [1797, 64] float32."""
    datasets = pytest.importorskip("sklearn.datasets")
    return torch.from_numpy(datasets.load_digits().data).float() / 8.0 - 1.0


@pytest.fixture(scope="module")
def full(digits: Tensor) -> OptimalLoss:
    return estimate(digits, SIGMAS, draws=4096)


def brute_force(data: np.ndarray, sigma: float, draws: int) -> tuple[float, float]:
    """E|x0 - E[x0|x]|² from noise of its own, all pairs at once."""
    rng = np.random.default_rng(7)
    clean = data[rng.integers(len(data), size=draws)]
    noisy = clean + sigma * rng.normal(size=clean.shape)
    logits = -0.5 * ((noisy[:, None] - data[None]) ** 2).sum(2) / sigma**2
    posterior = np.exp(logits - logits.max(1, keepdims=True))
    posterior /= posterior.sum(1, keepdims=True)
    errors = ((clean - posterior @ data) ** 2).sum(1)
    return errors.mean(), errors.std() / math.sqrt(draws)


def curve(sigma: Tensor, loss: Tensor, elements: int = 4, total_variance: float = 8.0) -> OptimalLoss:
    return OptimalLoss(
        sigma.double(), loss.double(), 0 * loss.double(), torch.ones(len(sigma)).long(), elements, total_variance, 100
    )


# closed forms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_points_have_the_closed_form(dtype):
    """x0 = ±a: E[x0|x] = a·tanh(a·x/sigma²), so J* = a²·E[1 - tanh²(a(a + sigma z)/sigma²)]."""
    a, sigmas = 1.5, [0.8, 1.2, 2.0, 8.0]
    got = estimate(torch.tensor([[a + 3.0], [3.0 - a]], dtype=dtype), sigmas, draws=40_000)
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    for sigma, loss, stderr in zip(sigmas, got.loss.tolist(), got.stderr.tolist(), strict=True):
        inner = 1.0 - np.tanh(a * (a + sigma * nodes) / sigma**2) ** 2
        expected = a**2 * (weights @ inner) / weights.sum()
        assert abs(loss - expected) < 4 * stderr + 1e-7
        assert stderr < 0.02 * expected
    assert got.total_variance == pytest.approx(a**2)


def test_gaussian_data_has_the_closed_form():
    """N(0, s²) in each of two coordinates: J* = 2·s²·sigma²/(s² + sigma²), where sigma is above the points' spacing."""
    s = 0.7
    line = s * torch.special.ndtri((torch.arange(60, dtype=torch.float64) + 0.5) / 60)
    s2 = line.square().mean().item()
    data = torch.cartesian_prod(line, line)
    got = estimate(data, [0.5, 1.0, 3.0], draws=8192)
    expected = 2 * s2 * got.sigma**2 / (s2 + got.sigma**2)
    torch.testing.assert_close(got.loss, expected, rtol=0.02, atol=0)


def test_limits_are_zero_and_the_total_variance(digits):
    got = estimate(digits, [0.002, 200.0], draws=256)
    assert 0.0 <= got.loss[0] < 1e-5 * got.total_variance
    assert got.loss[1] == pytest.approx(got.total_variance, rel=1e-3)
    assert got.total_variance == pytest.approx(float(digits.double().var(0, correction=0).sum()), rel=1e-5)


# estimators


def test_full_estimate_is_brute_force(digits, full):
    for sigma, loss, stderr in zip(SIGMAS, full.loss.tolist(), full.stderr.tolist(), strict=True):
        expected, error = brute_force(digits.double().numpy(), sigma, 600)
        assert abs(loss - expected) < 4 * math.hypot(stderr, error)


def test_dol_is_too_low_snis_too_high_and_cdol_between(digits, full):
    dol, cdol, snis = (
        estimate(digits, SIGMAS, draws=2048, estimator=name, subset=180) for name in ("dol", "cdol", "snis")
    )
    for level in range(len(SIGMAS)):
        below, above = (3 * math.hypot(each.stderr[level], full.stderr[level]) for each in (dol, snis))
        assert dol.loss[level] + below < full.loss[level] < snis.loss[level] - above
        assert dol.loss[level] < cdol.loss[level] < snis.loss[level]
        assert abs(cdol.loss[level] - full.loss[level]) < 0.03 * full.total_variance
    assert (full.loss - dol.loss)[2] > 3 * (full.loss - cdol.loss)[2].abs()


def test_correction_one_is_dol_and_more_of_it_raises_the_estimate(digits):
    options = {"sigmas": SIGMAS, "draws": 512, "subset": 200}
    dol = estimate(digits, estimator="dol", **options).loss
    rising = [estimate(digits, estimator="cdol", correction=c, **options).loss for c in (1.0, 5.0, 25.0, 1e30)]
    assert torch.equal(dol, rising[0])
    assert all((high > low).all() for low, high in itertools.pairwise(rising))
    by_default = estimate(digits, estimator="cdol", **options).loss
    assert torch.equal(by_default, estimate(digits, estimator="cdol", correction=2 * 1797 / 200, **options).loss)


@pytest.mark.parametrize(("correction", "dtype", "rtol"), [(None, torch.float64, 1e-9), (3.0, torch.float32, 1e-4)])
def test_the_papers_cdol_is_a_minus_b_of_the_same_draws(digits, correction, dtype, rtol):
    """A = mean |x_n|², B = mean |Σ p_n x_n|² with the source's weight divided by C, 4N/L by default."""
    data = digits[:60].to(dtype) + 0.3  # not centred
    problem = Problem(data, "cdol_paper", 20, correction, 0, 16, None)
    sigmas, flat, c = [0.4, 2.0], data.double().flatten(1), 4 * 60 / 20 if correction is None else correction
    squares: dict[float, list[float]] = {sigma: [] for sigma in sigmas}
    for batch in problem.batches(64, 8):
        rows = batch.shards[0].rows.tolist()
        for source, noise, left_out in zip(batch.sources.tolist(), batch.noise, batch.left_out.tolist(), strict=True):
            chosen = [source, *(row for row in rows if row != left_out)]
            assert len(chosen) == 20
            for sigma in sigmas:
                noisy = flat[source] + sigma * noise.double()
                logits = -(noisy - flat[chosen]).square().sum(1) / (2 * sigma**2)
                logits[0] -= math.log(c)
                squares[sigma].append(float((logits.softmax(0) @ flat[chosen]).square().sum()))
    expected = [float(flat.square().sum(1).mean() - np.mean(squares[sigma])) for sigma in sigmas]
    got = estimate(data, sigmas, 64, "cdol_paper", 20, correction, chunk=16)
    np.testing.assert_allclose(got.loss.numpy(), expected, rtol=rtol)


@pytest.mark.parametrize("estimator", ["snis", "dol"])
def test_a_subset_of_all_the_data_is_the_full_estimate(digits, full, estimator):
    """For dol this needs the source counted once, not twice, and no other sample left out."""
    few = digits[:300].double()
    whole = estimate(few, SIGMAS, draws=4096)
    subset = estimate(few, SIGMAS, draws=4096, estimator=estimator, subset=300)
    for level in range(len(SIGMAS)):
        error = math.hypot(whole.stderr[level], subset.stderr[level])
        assert abs(whole.loss[level] - subset.loss[level]) < 4 * error


def test_a_source_in_the_subset_is_not_counted_twice():
    """Two points, both in every subset: counted twice, the source would weigh 2 to 1."""
    data = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    got = estimate(data, [50.0], draws=512, estimator="dol", subset=2)
    assert got.loss[0] == pytest.approx(1.0, abs=1e-3)  # 8/9 if it were


@pytest.mark.parametrize("estimator", ["full", "snis", "cdol", "cdol_paper"])
def test_neither_chunks_nor_devices_change_the_result(digits, estimator):
    whole, *others = (
        estimate(digits[:500], SIGMAS, draws=300, estimator=estimator, chunk=chunk, device=device)
        for chunk, device in ((500, None), (1, None), (128, None), (77, ("cpu", "cpu", "cpu")))
    )
    for other in others:
        torch.testing.assert_close(other.loss, whole.loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.stderr, whole.stderr, rtol=1e-3, atol=1e-5)


def test_a_level_does_not_depend_on_the_others(digits):
    alone = estimate(digits[:500], [0.5], draws=300)
    torch.testing.assert_close(alone.loss, estimate(digits[:500], SIGMAS, draws=300).loss[1:2])


@pytest.mark.parametrize("options", [{}, {"estimator": "cdol"}, {"estimator": "snis", "subset": 4}])
def test_standard_error_is_the_spread_over_seeds(digits, options):
    """With four samples in a subset the draws that share it are nearly one."""
    estimates = [estimate(digits[:400], [0.7, 4.0], draws=512, seed=seed, **options) for seed in range(24)]
    spread = torch.stack([each.loss for each in estimates]).std(0)
    stated = torch.stack([each.stderr for each in estimates]).square().mean(0).sqrt()
    assert ((stated / spread > 0.6) & (stated / spread < 1.7)).all()


@pytest.mark.parametrize("draws", [1, 7, 300])
@pytest.mark.parametrize("estimator", ["full", "dol"])
def test_exactly_as_many_draws_as_asked_for(digits, draws, estimator):
    got = estimate(digits[:50], SIGMAS, draws=draws, estimator=estimator)
    assert got.draws.tolist() == [draws] * 3
    assert got.stderr.isnan().all() == (draws == 1)


def test_levels_get_the_draws_they_need_and_no_more_than_the_limit(digits):
    seen: list[Estimate] = []
    got = estimate_until(digits, (0.1, 0.5, 6.0), limit=1500, relative=0.02, absolute=2e-4, progress=seen.append)
    assert got.draws.tolist() == [512, 1500, 512]
    done = got.stderr <= torch.maximum(0.02 * got.loss, torch.tensor(2e-4 * got.total_variance))
    assert done.tolist() == [True, False, True]
    assert [each.levels_done for each in seen] == [2, 2, 2]
    flops = 2 * digits.numel() * (512 * 5 + 988 * 3)
    assert seen[-1].flops == pytest.approx(flops)


def test_it_is_reproducible_and_leaves_the_global_random_state_alone(digits):
    state = torch.random.get_rng_state()
    first, second = (estimate(digits[:100], SIGMAS, draws=64, seed=3).loss for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, estimate(digits[:100], SIGMAS, draws=64, seed=4).loss)
    assert torch.equal(torch.random.get_rng_state(), state)


# the curve


def test_conversions_are_those_of_the_optimal_denoiser(digits):
    """J* of eps, v, flow and F from the posterior mean itself, by brute force over the same draws."""
    sigma = 0.5
    base = estimate(digits[:200].double(), [sigma], draws=64)
    log_snr = torch.tensor([-2 * math.log(sigma)], dtype=torch.float64)
    torch.manual_seed(0)
    error = torch.randn(64, dtype=torch.float64)
    error *= math.sqrt(base.loss.item()) / error.norm()  # D - x0 with the optimal size
    for prediction_type, which in (
        ("sample", process.EDM()),
        ("epsilon", process.VPCosine()),
        ("v_prediction", process.VPLinear()),
        ("v_prediction", process.Flow()),
        ("flow", process.Flow(data_at=1)),
        ("edm", process.EDM()),
    ):
        got = base.convert(prediction_type, which, sigma_data=0.6)
        alpha, noise = which.alpha(got.time), which.sigma(got.time)
        torch.testing.assert_close(2 * (alpha / noise).log(), log_snr)
        eps_error = -alpha / noise * error
        expected = {
            "sample": error,
            "epsilon": eps_error,
            "v_prediction": alpha * eps_error - noise * error,
            "flow": eps_error - error,
            "edm": error / (noise * 0.6 / (noise**2 + 0.36).sqrt()),
        }[prediction_type]
        torch.testing.assert_close(got.loss, expected.square().sum()[None])
        torch.testing.assert_close(got.stderr / got.loss, base.stderr / base.loss)


def test_curve_is_linear_in_logs_between_its_levels_in_any_order():
    line = curve(torch.tensor([4.0, 1.0, 0.25]), torch.tensor([8.0, 2.0, 0.02]))
    at = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 64.0])
    expected = torch.tensor([8.0, 4.0, 2.0, 0.2, 0.02, 0.005, 8.0]) / 4  # sigma² below, flat above
    got = line.log_loss_at(-2 * at.log()).exp()
    torch.testing.assert_close(got.float(), expected, rtol=1e-5, atol=0)
    ends = line.log_loss_at(torch.tensor([INF, -INF, math.nan]))
    assert ends[0] == -INF
    assert ends[1] == pytest.approx(math.log(2.0))
    assert ends[2].isnan()


def test_sigma_star_is_the_largest_level_below_the_share():
    line = curve(torch.tensor([0.1, 0.2, 0.4, 0.8]), torch.tensor([0.0, 1e-3, 8.0, 8.0]))
    x = (math.log(8e-3) - math.log(1e-3)) / (math.log(8.0) - math.log(1e-3))
    assert line.sigma_star() == pytest.approx(0.2 * 2**x)
    with pytest.raises(ValueError, match=r"nowhere.*levels below sigma = 0\.4"):
        curve(torch.tensor([0.4, 0.8]), torch.tensor([1.0, 2.0])).sigma_star()
    with pytest.raises(ValueError, match=r"still at the highest level.*above sigma = 0\.8"):
        curve(torch.tensor([0.4, 0.8]), torch.tensor([0.0, 1e-4])).sigma_star()


def test_a_saved_curve_reads_back_to_the_bit(full, tmp_path):
    path = tmp_path / "new" / "curve.csv"
    full.save(path)
    read = OptimalLoss.load(path)
    for name in ("sigma", "loss", "stderr", "draws"):
        assert torch.equal(getattr(read, name), getattr(full, name))
    for name in ("elements", "total_variance", "samples", "estimator"):
        assert getattr(read, name) == getattr(full, name)
    assert [file.name for file in path.parent.iterdir()] == ["curve.csv"]


@pytest.mark.parametrize("text", ["", "sigma,loss\n1,2\n", "not,a,curve\n1,2,3\n"])
def test_another_file_is_no_curve(tmp_path, text):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=r"x\.csv is not an optimal-loss curve"):
        OptimalLoss.load(tmp_path / "x.csv")


# a model's gap


class IdealDenoiser(torch.nn.Module):
    """E[x0|x] of a data set, off by a fixed vector."""

    def __init__(self, data: Tensor, off: float = 0.0) -> None:
        super().__init__()
        self.data, self.off = data, off
        self.modes: list[bool] = []

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        self.modes.append(self.training)
        logits = -0.5 * torch.cdist(noisy, self.data, compute_mode="donot_use_mm_for_euclid_dist").square()
        shift = 0.0 if labels is None else labels[:, None]
        return (logits / sigma[:, None] ** 2).softmax(1) @ self.data + self.off + shift


def test_the_ideal_denoiser_has_no_gap_and_another_exactly_its_error(digits):
    data = digits[:300]
    optimal = estimate(data, SIGMAS, draws=4096)
    ideal, off = IdealDenoiser(data), IdealDenoiser(data, off=0.5)
    best = model_gap(ideal, data, optimal, draws=4)
    assert (best.gap.abs() < 4 * best.stderr).all()
    assert (best.stderr < 0.1 * best.loss)[2]
    worse = model_gap(off, data, optimal, draws=4)
    torch.testing.assert_close(worse.gap - best.gap, torch.full((3,), 0.25, dtype=torch.float64), rtol=0.1, atol=0)
    told = dataclasses.replace(optimal, classes=1)
    labelled = model_gap(ideal, data, told, draws=4, labels=torch.full((300,), 0.5))
    torch.testing.assert_close(labelled.loss, worse.loss)


def test_gap_is_measured_in_eval_mode_and_batches_do_not_matter(digits):
    data = digits[:100]
    optimal = estimate(data, SIGMAS, draws=64)
    model = IdealDenoiser(data)
    one = model_gap(model, data, optimal, sigmas=[0.4, 0.7])
    assert model.training
    assert not any(model.modes)
    torch.testing.assert_close(one.optimal, optimal.log_loss_at(-2 * torch.tensor([0.4, 0.7]).double().log()).exp())
    zero = [model_gap(lambda noisy, sigma: 0 * noisy, data, optimal, batch_size=size) for size in (100, 33)]
    torch.testing.assert_close(zero[0].loss, data.double().square().mean().expand(3))  # whatever the noise
    for batched in zero[1]._asdict():
        torch.testing.assert_close(getattr(zero[1], batched), getattr(zero[0], batched))


def test_a_single_image_has_no_standard_error(digits):
    assert model_gap(IdealDenoiser(digits), digits[:1], estimate(digits, SIGMAS, draws=64)).stderr.isnan().all()


# the schedule


def gap_curve() -> OptimalLoss:
    """Total variance 8 over 4 elements; J* crosses 8e-3 at sigma 0.2."""
    return curve(torch.tensor([0.1, 0.2, 0.4, 8.0]), torch.tensor([1e-3, 8e-3, 0.8, 8.0]))


def test_gap_weighting_is_the_formula():
    sigma = torch.tensor([0.05, 0.15, 0.21, 0.4, 8.0], dtype=torch.float64)
    log_snr = -2 * sigma.log()
    weights = GapWeighting(
        gap_curve(), cap=300.0, scale=2.0, bump=5.0, bump_mean=-2.0, bump_std=0.5, prediction_type="sample"
    )(log_snr)
    per_element = gap_curve().log_loss_at(log_snr).exp()
    density = torch.distributions.Normal(-2.0, 0.5).log_prob(sigma.log()).exp()
    expected = 2.0 * (1 / per_element).clamp(max=300.0) + 5.0 * density * (sigma < 0.2)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=0)
    assert expected[0] > 600


def test_gap_weighting_by_default_is_one_up_to_sigma_star_and_the_inverse_above():
    sigma = torch.tensor([1e-3, 0.1, 0.1999, 0.4, 8.0], dtype=torch.float64)
    plain = GapWeighting(gap_curve(), bump=0.0, prediction_type="sample")(-2 * sigma.log())
    torch.testing.assert_close(plain, torch.tensor([1.0, 1.0, 1.0, 0.01, 0.001]), rtol=1e-4, atol=0)
    bumped = GapWeighting(gap_curve(), prediction_type="sample")(-2 * sigma.log())
    assert torch.equal(bumped[3:], plain[3:])
    assert (bumped[:3] > plain[:3]).all()


def trained_gap_levels(**options: object) -> tuple[GapLevels, vadiff.DiffusionLoss, Tensor]:
    """x0 losses of J*/D, twice that above log-SNR 0, and half of it above 4."""
    settings = {"bins": 8, "log_snr_range": (-8.0, 8.0), "half_life": INF, "prior": 1e-6, "floor": 1e-6, **options}
    sampler = GapLevels(gap_curve(), base=LogNormal(-0.5, 1.5), **settings)
    criterion = vadiff.DiffusionLoss("constant", bins=8, log_snr_range=(-8.0, 8.0), backend="reference")
    log_snr = LogNormal(-0.5, 1.5)(uniforms(4096, torch.Generator().manual_seed(0), stratified=True)).log_snr
    excess = 1.0 + (log_snr > 0).float() - 1.5 * (log_snr > 4).float()
    criterion.reweight(excess * gap_curve().log_loss_at(log_snr).exp().float(), log_snr)
    return sampler, criterion, log_snr


def test_gap_levels_draw_in_proportion_to_weight_times_gap():
    sampler, criterion, log_snr = trained_gap_levels()
    sampler.update(criterion, log_snr)
    drawn = sampler(uniforms(20_000, torch.Generator().manual_seed(1), stratified=True))
    assert drawn.sample_weight is None
    share = torch.histc(drawn.log_snr, 8, -8.0, 8.0) / 20_000
    bin_of = ((log_snr + 8) / 2).long().clamp(0, 7)
    gap = ((log_snr > 0) & (log_snr <= 4)) * gap_curve().log_loss_at(log_snr).exp()
    weight = GapWeighting(gap_curve()).log_x0_weight(sampler.bin_centers.double()).exp()
    expected = torch.zeros(8, dtype=torch.float64).index_add_(0, bin_of, gap) * weight
    torch.testing.assert_close(share.double(), expected / expected.sum(), rtol=0.02, atol=2e-3)
    assert share[:4].sum() == 0  # no gap
    assert share[6:].sum() == 0  # a negative one


def test_bins_without_a_gap_keep_the_floor():
    sampler, criterion, log_snr = trained_gap_levels(floor=0.3)
    sampler.update(criterion, log_snr)
    drawn = sampler(uniforms(20_000, torch.Generator().manual_seed(1), stratified=True)).log_snr
    base = LogNormal(-0.5, 1.5)(uniforms(20_000, torch.Generator().manual_seed(1), stratified=True)).log_snr
    assert (drawn < 0).float().mean() == pytest.approx(0.3 * (base < 0).float().mean().item(), rel=0.02)


def test_gap_in_another_form_is_taken_back_to_x0():
    sampler, criterion, log_snr = trained_gap_levels()
    other, _, _ = trained_gap_levels(prediction_type="epsilon")
    ell = criterion.per_sample_loss
    sampler.update(criterion, log_snr)
    other.update(SimpleNamespace(per_sample_loss=ell * log_snr.exp(), statistics=criterion.statistics), log_snr)
    torch.testing.assert_close(other.ratio.view(torch.float64), sampler.ratio.view(torch.float64), rtol=1e-3, atol=1e-6)


def test_gap_levels_resume_to_the_bit_and_rest_in_eval_mode():
    sampler, criterion, log_snr = trained_gap_levels()
    sampler.update(criterion, log_snr)
    resumed, _, _ = trained_gap_levels()
    resumed.load_state_dict(copy.deepcopy(sampler.state_dict()))
    for each in (sampler, resumed):
        each.update(criterion, log_snr)
    assert torch.equal(sampler.ratio, resumed.ratio)
    counted = sampler._recorder.statistics.count.sum()
    sampler.eval().update(criterion, log_snr)
    assert sampler._recorder.statistics.count.sum() == counted


def test_before_anything_is_seen_gap_levels_are_their_base():
    sampler, criterion, log_snr = trained_gap_levels()
    sampler.eval().update(criterion, log_snr)
    u = uniforms(64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampler(u).log_snr, LogNormal(-0.5, 1.5)(u).log_snr, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_model_at_or_below_its_optimum_everywhere_is_drawn_from_the_base(share):
    """Not from where few samples were seen, which shrinkage alone would favour."""
    sampler, criterion, log_snr = trained_gap_levels(prior=32.0, floor=0.1)
    ell = share * gap_curve().log_loss_at(log_snr).exp().float() * (1 - 1e-6)
    sampler.update(SimpleNamespace(per_sample_loss=ell, statistics=criterion.statistics), log_snr)
    assert torch.equal(sampler.ratio.view(torch.float64), torch.ones(8, dtype=torch.float64))


# scaling laws


def test_scaling_law_is_recovered_once_the_optimal_loss_is_subtracted():
    compute = np.array([1.0, 3.0, 10.0, 30.0, 100.0])
    loss = 0.7 * compute**-0.4 + 0.25
    law = fit_scaling_law(compute, loss, optimal=0.25)
    assert law == pytest.approx((0.7, -0.4, -1.0))
    plain = fit_scaling_law(torch.from_numpy(compute), torch.from_numpy(loss))
    assert plain.alpha > -0.3
    assert -0.999 < plain.correlation < 0


# errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": torch.zeros(5)}, r"data has shape \(5,\)"),
        ({"data": torch.zeros(1, 3)}, "at least two samples"),
        ({"data": torch.full((3, 2), math.nan)}, "NaN or infinite"),
        ({"sigmas": []}, r"sigmas has shape \(0,\)"),
        ({"sigmas": [1.0, 0.0]}, "not positive"),
        ({"draws": 0}, "draws is 0"),
        ({"estimator": "dols"}, "estimator is 'dols'.*cdol"),
        ({"subset": 3}, "subset is 3 with estimator 'full'"),
        ({"estimator": "dol", "subset": 1}, "subset is 1, expected an integer from 2 to 4"),
        ({"estimator": "dol", "subset": 5}, "subset is 5"),
        ({"estimator": "dol", "correction": 2.0}, "correction is 2.0 with estimator 'dol'"),
        ({"estimator": "cdol", "correction": 0.0}, "correction is 0.0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"device": ()}, "device is empty"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        estimate(**{"data": torch.randn(4, 3), "sigmas": [1.0], "draws": 8, **options})


def test_bytes_are_refused():
    with pytest.raises(TypeError, match=r"data has dtype torch\.uint8"):
        estimate(torch.zeros(4, 3, dtype=torch.uint8), [1.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: estimate_until(torch.randn(4, 2), [1.0], relative=0.0), "relative is 0.0"),
        (lambda: estimate_until(torch.randn(4, 2), [1.0], limit=-1), "limit is -1"),
        (lambda: GapWeighting(gap_curve(), cap=-1.0), "cap is -1.0"),
        (lambda: GapWeighting(gap_curve(), bump=-1.0), "bump is -1.0"),
        (lambda: GapWeighting(gap_curve(), bump_std=0.0), "bump_std is 0.0"),
        (lambda: GapLevels(gap_curve(), prediction_type="x"), "prediction_type is 'x'"),
        (lambda: trained_gap_levels()[0].update(trained_gap_levels()[1]), "log_snr is None"),
        (lambda: trained_gap_levels()[0].update(trained_gap_levels()[1], torch.zeros(3)), r"log_snr has shape \(3,\)"),
        (lambda: model_gap(max, torch.zeros(0, 4), gap_curve()), r"images has shape \(0, 4\)"),
        (lambda: model_gap(max, torch.zeros(3, 4), gap_curve(), draws=0), "draws is 0"),
        (lambda: model_gap(max, torch.zeros(3, 4), gap_curve(), batch_size=0), "batch_size is 0"),
        (lambda: model_gap(max, torch.zeros(3, 4), gap_curve(), sigmas=[0.0]), r"sigmas is \[0.0\]"),
        (lambda: model_gap(lambda x, s: x[:1], torch.zeros(3, 4), gap_curve()), r"denoise returned shape \(1, 4\)"),
        (lambda: curve(torch.ones(2), torch.ones(2)).log_loss_at(torch.zeros(2)), "a repeated noise level"),
        (lambda: model_gap(max, torch.zeros(3, 5), gap_curve()), "images have 5 elements, expected 4"),
        (
            lambda: model_gap(max, torch.zeros(3, 4), gap_curve(), labels=torch.zeros(2)),
            "labels has length 2",
        ),
        (lambda: curve(torch.ones(1), torch.ones(1)).log_loss_at(torch.zeros(2)), "1 noise level"),
        (lambda: fit_scaling_law([1.0], [1.0]), "two models"),
        (lambda: fit_scaling_law([1.0, 1.0], [1.0, 2.0]), "same for all"),
        (lambda: fit_scaling_law([1.0, 2.0], [1.0, 0.1], optimal=0.2), "expected losses above it"),
        (lambda: fit_scaling_law([1.0, 0.0], [1.0, 2.0]), "compute has a value"),
    ],
)
def test_bad_arguments_of_the_rest_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GapWeighting("curve.csv"), "optimal is a str"),
        (lambda: GapLevels("curve.csv"), "optimal is a str"),
        (lambda: GapLevels(gap_curve(), vadiff.weighting.Cauchy()), "weighting is Cauchy.*a weight of the x0 loss"),
        (lambda: model_gap(max, torch.zeros(3, 4).byte(), gap_curve()), r"images has dtype torch\.uint8"),
    ],
)
def test_other_types_are_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_names_that_moved_are_found_where_they_were() -> None:
    assert vadiff.optimal_loss.GapLevels is GapLevels
    assert vadiff.optimal_loss.GapWeighting is GapWeighting
    assert not hasattr(vadiff.optimal_loss, "Gap")


@pytest.mark.parametrize("make", [GapWeighting, vadiff.weighting.InverseOptimalLoss])
def test_a_criterion_takes_the_weighting_and_compiles_with_it(make):
    weighting = make(gap_curve(), prediction_type="sample")
    criterion = vadiff.DiffusionLoss(weighting, backend="reference")
    log_snr = torch.tensor([-3.0, 0.0, 3.0, INF])
    residual = torch.ones(4, 2, requires_grad=True)
    loss = criterion(residual, torch.zeros(4, 2), log_snr, reduction="none")
    torch.testing.assert_close(loss, weighting(log_snr))
    step = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(residual, torch.zeros(4, 2), log_snr, reduction="none"), loss)
    assert copy.deepcopy(criterion).weights.isfinite().all()
