"""Statistics per log-SNR bin: what enters, how it is forgotten, what non-finite values do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracle import LOSS_EPSILON, Oracle, assert_variance_close

import vadiff
from vadiff.weighting import MinSNR

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FIELDS = ("count", "mean", "variance", "mass")
INF, NAN = math.inf, math.nan


def numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def tensor(x: object, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(np.asarray(x, np.float32), device=device)


def snapshot(criterion: torch.nn.Module) -> list[torch.Tensor]:
    s = criterion.statistics
    return [s.count, s.mean, s.variance, s.mass, s.relative_std, s.skipped, criterion.weights]


def assert_unchanged(before: list[torch.Tensor], criterion: torch.nn.Module) -> None:
    for old, new in zip(before, snapshot(criterion), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)


def assert_matches(criterion: torch.nn.Module, oracle: Oracle, rtol: float, epsilon: float) -> None:
    s, filled = criterion.statistics, oracle.count > 0
    np.testing.assert_allclose(numpy(s.count), oracle.count, rtol=rtol)
    np.testing.assert_allclose(numpy(s.mass), oracle.mass, rtol=rtol)
    np.testing.assert_allclose(numpy(s.mean)[filled], oracle.mean[filled], rtol=rtol)
    expected = (oracle.count[filled], oracle.mean[filled], oracle.variance[filled])
    assert_variance_close(numpy(s.variance)[filled], *expected, epsilon)
    np.testing.assert_allclose(numpy(s.relative_std), numpy(s.variance) ** 0.5 / numpy(s.mean), rtol=1e-14)
    assert int(s.skipped) == oracle.skipped


def test_shapes_and_dtypes(make_criterion, device):
    criterion = make_criterion(bins=50)
    criterion(torch.randn(4, 3, device=device), torch.randn(4, 3, device=device), torch.randn(4, device=device))
    for name in (*FIELDS, "relative_std"):
        value = getattr(criterion.statistics, name)
        assert value.shape == (50,), name
        assert value.dtype == torch.float64, name
    assert criterion.statistics.skipped.shape == ()
    assert criterion.statistics.skipped.dtype == torch.int64
    assert criterion.bin_centers.shape == (50,)
    assert criterion.bin_centers.dtype == torch.float32
    assert criterion.weights.shape == (50,)
    assert criterion.weights.dtype == torch.float32


@pytest.mark.parametrize("weighting", ["variance_aware", "loss_level", MinSNR(), "constant"])
def test_base_loss_enters_the_bins_whatever_the_weighting(make_criterion, rng, device, weighting):
    criterion, oracle = make_criterion(weighting), Oracle(16, -8.0, 8.0)
    for size in (24, 3):
        prediction, target = rng.normal(size=(2, size, 5)).astype(np.float32)
        log_snr = (4 * rng.normal(size=size)).astype(np.float32)
        u, v = rng.uniform(0.5, 2.0, size=(2, size)).astype(np.float32)
        oracle.step(prediction, target, log_snr, base_weight=u, sample_weight=v)
        criterion(
            *(tensor(x, device) for x in (prediction, target, log_snr)),
            base_weight=tensor(u, device),
            sample_weight=tensor(v, device),
        )
    assert_matches(criterion, oracle, rtol=2e-6, epsilon=LOSS_EPSILON)  # ℓ is float32


def test_losses_given_to_reweight_are_recorded_in_float64(make_criterion, rng, device):
    criterion, oracle = make_criterion(half_life=20.0), Oracle(16, -8.0, 8.0, 20.0)
    for size in (200, 1, 57):
        losses, log_snr = (
            rng.gamma(2.0, size=size).astype(np.float32),
            rng.normal(size=size).astype(np.float32),
        )
        v = rng.uniform(size=size).astype(np.float32)
        criterion.reweight(*(tensor(x, device) for x in (losses, log_snr, v)))
        oracle.reweight(losses, log_snr, v)
    assert_matches(criterion, oracle, rtol=1e-12, epsilon=1e-14)


@pytest.mark.parametrize("bins", [2, 16, 64, 256])
def test_a_value_on_an_edge_belongs_to_the_bin_above_it(make_criterion, device, bins):
    """Widths that are powers of two: edges are exact in float32."""
    criterion = make_criterion(bins=bins)
    edges = torch.linspace(-8.0, 8.0, bins + 1, device=device)
    criterion.reweight(torch.ones(bins + 1, device=device), edges)
    expected = torch.ones(bins, dtype=torch.float64)
    expected[-1] = 2  # the upper end of the range is clamped into the last bin
    torch.testing.assert_close(criterion.statistics.mass.cpu(), expected)

    criterion = make_criterion(bins=bins)
    criterion.reweight(torch.ones(bins, device=device), edges[1:] - 2.0**-18)  # λ − low has steps of 2^-20 there
    torch.testing.assert_close(criterion.statistics.mass.cpu(), torch.ones(bins, dtype=torch.float64))


@pytest.mark.parametrize("bins", [50, 1000])
def test_bins_of_inexact_width_follow_the_float32_formula(make_criterion, rng, device, bins):
    """floor((λ − low)·inv_width) in float32, also at the edges as a user would compute them."""
    criterion, oracle = make_criterion(bins=bins), Oracle(bins, -8.0, 8.0)
    edges = np.linspace(-8.0, 8.0, bins + 1).astype(np.float32)
    criterion.reweight(tensor(np.ones(bins + 1), device), tensor(edges, device))
    oracle.reweight(np.ones(bins + 1), edges)
    np.testing.assert_allclose(numpy(criterion.statistics.mass), oracle.mass, rtol=1e-12)


def test_all_samples_in_one_bin(make_criterion, rng, device):
    criterion, losses = make_criterion(half_life=INF), rng.gamma(2.0, size=300).astype(np.float32)
    criterion.reweight(tensor(losses, device), torch.full((300,), 0.25, device=device))
    s = criterion.statistics
    assert s.count.nonzero().flatten().tolist() == [8]
    assert s.count[8] == 300
    np.testing.assert_allclose(float(s.mean[8]), losses.astype(np.float64).mean(), rtol=1e-14)
    np.testing.assert_allclose(float(s.variance[8]), losses.astype(np.float64).var(ddof=1), rtol=1e-12)


def test_values_outside_the_range_and_infinite_ones_fall_in_the_end_bins(make_criterion, device):
    criterion = make_criterion(half_life=INF)
    log_snr = torch.tensor([-INF, -1e30, -8.5, 8.0, 9.0, 3e38, INF], device=device)
    loss = criterion(torch.ones(7, 2, device=device), torch.zeros(7, 2, device=device), log_snr)
    assert loss.item() == 1
    assert int(criterion.statistics.skipped) == 0
    assert criterion.statistics.count[[0, -1]].tolist() == [3, 4]
    assert criterion.statistics.count.sum() == 7


def test_a_bin_without_a_sample_has_no_mean_and_no_variance(make_criterion, device):
    criterion = make_criterion()
    criterion.reweight(torch.tensor([2.0, 4.0], device=device), torch.full((2,), 0.5, device=device))
    s = criterion.statistics
    for value in (s.mean, s.variance, s.relative_std):
        assert value.isnan().sum() == 15
    assert s.variance[8].item() == pytest.approx(2.0)
    assert s.relative_std[8].item() == pytest.approx(2**0.5 / 3)


def test_a_single_sample_has_variance_zero(make_criterion, device):
    criterion = make_criterion(half_life=INF)
    criterion.reweight(torch.tensor([2.0], device=device), torch.tensor([0.5], device=device))
    assert criterion.statistics.count[8] == 1
    assert criterion.statistics.variance[8] == 0


@pytest.mark.parametrize("offset", ["lognormal", "mean 1000 std 3"])
def test_one_million_samples_in_batches_match_numpy(make_criterion, rng, device, interpreted, offset):
    """Each of 123 merges rounds mean and M2 a few times in float64: 123 · 1e-16 · 10 ≈ 1e-13. Deviations are
    taken near the mean, so the offset, (mean/std)² = 1e5, must not show; it would ruin E[x²] − E[x]²."""
    samples, batch = (16_000, 4096) if interpreted else (1_000_000, 8192)
    criterion = make_criterion(half_life=INF, bins=64)
    log_snr = (4 * rng.normal(size=samples)).astype(np.float32)
    draws = rng.normal(size=samples)
    losses = (np.exp(draws - 0.3 * log_snr) if offset == "lognormal" else 1000 + 3 * draws).astype(np.float32)
    for start in range(0, samples, batch):
        part = slice(start, start + batch)
        criterion.reweight(tensor(losses[part], device), tensor(log_snr[part], device))
    index = np.clip(np.floor((log_snr + 8) * 4), 0, 63).astype(int)
    s, exact = criterion.statistics, losses.astype(np.float64)
    count = np.bincount(index, minlength=64)
    assert (count > 1).all()
    mean = np.bincount(index, exact) / count
    variance = np.bincount(index, (exact - mean[index]) ** 2) / (count - 1)
    np.testing.assert_array_equal(numpy(s.count), count)
    np.testing.assert_array_equal(numpy(s.mass), count)
    np.testing.assert_allclose(numpy(s.mean), mean, rtol=1e-12)
    np.testing.assert_allclose(numpy(s.variance), variance, rtol=1e-11)


def test_half_life_is_counted_in_samples_per_bin_of_all_bins(make_criterion, device):
    """With 4 bins and a half-life of 8, 32 samples anywhere halve what was there."""
    criterion = make_criterion(bins=4, half_life=8.0)
    first = torch.tensor([1.0, 3.0, 1.0, 3.0], device=device)
    criterion.reweight(first, torch.full((4,), 7.0, device=device), torch.full((4,), 0.5, device=device))
    for _ in range(2):
        criterion.reweight(torch.ones(16, device=device), torch.full((16,), -7.0, device=device))
    s = criterion.statistics
    assert s.count[3].item() == pytest.approx(2.0, rel=1e-14)
    assert s.mass[3].item() == pytest.approx(1.0, rel=1e-14)
    assert s.mean[3].item() == 2.0
    assert s.variance[3].item() == pytest.approx(2.0, rel=1e-14)  # M2 4 → 2, over max(n − 1, n/2) = 1
    assert s.count[0].item() == pytest.approx(16 * 0.5**0.5 + 16, rel=1e-14)


def test_untouched_bins_forget_alike_however_samples_are_cut_into_batches(make_criterion, rng, device):
    """exp2 of the parts multiplies up to exp2 of the whole: 16 roundings of float64 at most, below 1e-14."""
    losses = rng.gamma(2.0, size=64).astype(np.float32)
    ends = []
    for size in (64, 16, 4):
        criterion = make_criterion(bins=4, half_life=10.0)
        criterion.reweight(tensor([1.0, 2.0, 4.0], device), tensor([7.0, 7.0, 1.0], device))
        for part in np.split(losses, 64 // size):
            criterion.reweight(tensor(part, device), torch.full((size,), -7.0, device=device))
        ends.append(torch.stack([getattr(criterion.statistics, name) for name in FIELDS]).cpu()[:, 2:])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-14, atol=0)
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-14, atol=0)


def test_touched_bins_depend_on_the_cut_by_less_than_one_batch_of_forgetting(make_criterion, rng, device):
    """Samples of one batch count alike; cut finer, the older ones have faded by up to
    ρ = 2^(−N/(half_life·K)), N = 256 the coarser batch. Counts thus differ by a factor within [ρ, 1], means by
    at most (1 − ρ)·(max − min)."""
    losses, log_snr = (
        rng.gamma(2.0, size=512).astype(np.float32),
        (4 * rng.normal(size=512)).astype(np.float32),
    )
    coarse, fine = make_criterion(half_life=64.0), make_criterion(half_life=64.0)
    for criterion, size in ((coarse, 256), (fine, 64)):
        for start in range(0, 512, size):
            part = slice(start, start + size)
            criterion.reweight(tensor(losses[part], device), tensor(log_snr[part], device))
    rho = 2.0 ** (-256 / (64 * 16))
    ratio = numpy(fine.statistics.count) / numpy(coarse.statistics.count)
    assert (ratio >= rho - 1e-12).all()
    assert (ratio <= 1 + 1e-12).all()
    assert ratio.min() < 0.999
    gap = np.abs(numpy(fine.statistics.mean) - numpy(coarse.statistics.mean))
    assert (gap <= (1 - rho) * np.ptp(losses)).all()


def test_a_bin_idle_for_more_than_twenty_half_lives_is_emptied(make_criterion, device):
    """n < 2^-20 goes to zero, and with it what belongs to it."""
    criterion = make_criterion(bins=4, half_life=1.0)
    criterion.reweight(torch.tensor([3.0], device=device), torch.tensor([7.0], device=device))
    s = criterion.statistics
    for half_lives, left in ((19, 2.0**-19), (2, 0.0)):
        size = 4 * half_lives
        criterion.reweight(torch.ones(size, device=device), torch.full((size,), -7.0, device=device))
        assert s.count[3].item() == pytest.approx(left, rel=1e-12)
        assert s.mass[3].item() == pytest.approx(left, rel=1e-12)
        assert s.mean[3].item() == pytest.approx(3.0 if left else NAN, nan_ok=True)
    assert s.variance[3].isnan()


def test_plain_welford_never_forgets(make_criterion, device):
    criterion = make_criterion(bins=4, half_life=INF)
    criterion.reweight(torch.tensor([3.0], device=device), torch.tensor([7.0], device=device))
    for _ in range(5):
        criterion.reweight(torch.ones(1000, device=device), torch.full((1000,), -7.0, device=device))
    assert criterion.statistics.count.tolist() == [5000, 0, 0, 1]


@pytest.mark.parametrize("samples", [2049, 33_000])
def test_a_batch_of_many_samples_is_recorded_like_one_of_few(make_criterion, device, samples, interpreted):
    """Kernels share them among blocks, and merge what each found."""
    if interpreted and samples > 2049:
        pytest.skip("minutes in Triton's interpreter")
    generator = torch.Generator().manual_seed(samples)
    prediction = torch.randn(samples, 3, generator=generator)
    log_snr = 4 * torch.randn(samples, generator=generator)
    sample_weight = torch.rand(samples, generator=generator) + 0.5
    log_snr[-1] = NAN
    criterion = make_criterion("constant", bins=4, log_snr_range=(-8.0, 8.0), half_life=INF)
    loss = criterion(
        prediction.to(device).clone().requires_grad_(), torch.zeros(samples, 3, device=device), log_snr.to(device),
        sample_weight=sample_weight.to(device),
    )  # fmt: skip
    assert loss.isnan()
    assert criterion.statistics.skipped == 1
    ell = prediction.double().square().mean(1).numpy()[:-1]
    weight, bin_of = sample_weight.double().numpy()[:-1], np.clip(np.floor((numpy(log_snr)[:-1] + 8) / 4), 0, 3)
    for k in range(4):
        inside = bin_of == k
        found = [float(getattr(criterion.statistics, name)[k]) for name in ("count", "mean", "variance", "mass")]
        expected = [inside.sum(), ell[inside].mean(), ell[inside].var(ddof=1), weight[inside].sum()]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    criterion.reweight(torch.ones(samples, device=device), torch.zeros(samples, device=device))
    assert criterion.statistics.count.sum() == 2 * samples - 1


def step(criterion: torch.nn.Module, device: torch.device, batch: int = 6) -> torch.Tensor:
    prediction, target = (
        torch.randn(batch, 5, device=device, requires_grad=True),
        torch.randn(batch, 5, device=device),
    )
    return criterion(prediction, target, 4 * torch.randn(batch, device=device))


def test_statistics_stand_still_in_eval_mode_and_under_no_grad(make_criterion, device):
    criterion = make_criterion()
    step(criterion, device)
    before = snapshot(criterion)
    losses = torch.ones(3, device=device)
    with torch.no_grad():
        step(criterion, device)
        criterion.reweight(losses, losses)
    with torch.inference_mode():
        step(criterion, device)
    criterion.eval()
    step(criterion, device)
    criterion.reweight(losses, losses)
    assert_unchanged(before, criterion)


def test_every_forward_is_one_fold(make_criterion, device):
    criterion = make_criterion(half_life=INF)
    for i in range(1, 4):
        loss = step(criterion, device)
        assert criterion.statistics.count.sum() == 6 * i
        loss.backward()
        assert criterion.statistics.count.sum() == 6 * i


def test_statistics_move_when_the_prediction_needs_no_gradient(make_criterion, device):
    criterion = make_criterion(half_life=INF)
    criterion(torch.ones(2, 3, device=device), torch.zeros(2, 3, device=device), torch.zeros(2, device=device))
    assert criterion.statistics.count.sum() == 2


def test_what_is_read_is_a_copy(make_criterion, device):
    criterion = make_criterion()
    for _ in range(3):
        step(criterion, device, batch=40)
    before = snapshot(criterion)
    for value in snapshot(criterion):
        value.fill_(7)
    criterion.bin_centers.fill_(7)
    assert_unchanged(before, criterion)
    assert criterion.bin_centers[0] == -7.5
    kept = [x.clone() for x in before]
    step(criterion, device)
    for old, copy in zip(before, kept, strict=True):
        torch.testing.assert_close(old, copy, rtol=0, atol=0, equal_nan=True)


NON_FINITE = {
    "log_snr is nan": {"log_snr": NAN},
    "prediction is nan": {"prediction": NAN},
    "prediction is inf": {"prediction": INF},
    "target is nan": {"target": NAN},
    "loss overflows float32": {"prediction": 1e25},
    "base_weight is nan": {"base_weight": NAN},
    "base_weight is inf": {"base_weight": INF},
    "sample_weight is nan": {"sample_weight": NAN},
    "sample_weight is inf": {"sample_weight": -INF},
}


def batch_of(rng: np.random.Generator, device: torch.device, changes: dict[str, float], at: int = 2, size: int = 5):
    values = {
        "prediction": rng.normal(size=(size, 6)),
        "target": rng.normal(size=(size, 6)),
        "log_snr": 4 * rng.normal(size=size),
        "base_weight": rng.uniform(0.5, 2, size=size),
        "sample_weight": rng.uniform(0.5, 2, size=size),
    }
    values = {name: np.asarray(value, np.float32) for name, value in values.items()}
    for name, value in changes.items():
        values[name][(at, 3) if values[name].ndim == 2 else at] = value
    return {name: tensor(value, device) for name, value in values.items()}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", list(NON_FINITE))
def test_non_finite_sample_is_counted_shows_in_loss_and_gradient_and_leaves_statistics_untouched(
    make_criterion, rng, device, case, reduction
):
    criterion, without = make_criterion(), make_criterion()
    changes = NON_FINITE[case]
    batch = batch_of(rng, device, changes)
    prediction = batch.pop("prediction").requires_grad_()
    loss = criterion(prediction, batch.pop("target"), batch.pop("log_snr"), **batch, reduction=reduction)
    (grad,) = torch.autograd.grad(loss.sum(), prediction)
    elements = [3] if changes.keys() <= {"prediction", "target"} else range(6)  # of sample 2
    finite = grad.isfinite()
    assert finite[[0, 1, 3, 4]].all()
    assert all(finite[2, i] == (i not in elements) for i in range(6)) or case == "loss overflows float32"
    if reduction == "none":
        assert loss.isfinite().tolist() == [True, True, False, True, True]
        return
    assert not loss.isfinite()

    rng = np.random.default_rng(0)
    batch = {name: value[[0, 1, 3, 4]] for name, value in batch_of(rng, device, NON_FINITE[case]).items()}
    without(batch.pop("prediction"), batch.pop("target"), batch.pop("log_snr"), **batch)
    assert int(criterion.statistics.skipped) == 1
    assert int(without.statistics.skipped) == 0
    for name in FIELDS:
        got, expected = getattr(criterion.statistics, name), getattr(without.statistics, name)
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0, equal_nan=True)
    torch.testing.assert_close(criterion.weights, without.weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [True, False])
def test_gradient_is_not_finite_where_the_weight_is_in_every_dtype_and_for_the_base_weight(
    make_criterion, device, dtype, keep
):
    prediction = torch.randn(3, 5).to(device, dtype).requires_grad_()
    level = torch.ones(3, device=device, requires_grad=True)
    log_snr = torch.tensor([0.0, NAN, 0.0], device=device)
    loss = make_criterion()(prediction, torch.zeros(3, 5).to(device, dtype), log_snr, base_weight=level)
    (loss * 1024).backward(retain_graph=keep)
    assert loss.isnan()
    assert prediction.grad.isnan().all(1).tolist() == [False, True, False]
    assert level.grad.isnan().tolist() == [False, True, False]


def test_base_loss_that_overflows_float32_does_not_enter_the_statistics(make_criterion, device):
    """u and ℓ are finite, u·ℓ is 1e40: whether it enters or is skipped, no infinity may stay behind."""
    criterion = make_criterion()
    criterion(
        torch.full((1, 4), 1e10, device=device),
        torch.zeros(1, 4, device=device),
        torch.zeros(1, device=device),
        base_weight=torch.full((1,), 1e20, device=device),
    )
    step(criterion, device, batch=40)
    assert not criterion.statistics.mean.isinf().any()
    assert not criterion.statistics.variance.isinf().any()
    assert criterion.weights.isfinite().all()
    assert (criterion.weights > 0).all()


def test_a_batch_without_a_finite_sample_changes_only_the_skipped_count(make_criterion, device):
    criterion = make_criterion()
    step(criterion, device, batch=30)
    before = snapshot(criterion)
    criterion(
        torch.full((4, 3), NAN, device=device),
        torch.zeros(4, 3, device=device),
        torch.zeros(4, device=device),
    )
    after = snapshot(criterion)
    assert int(after[5]) == 4
    before[5] = after[5]
    assert_unchanged(before, criterion)


@pytest.mark.parametrize("fill", [NAN, INF])
@pytest.mark.parametrize("zero", ["base_weight", "sample_weight"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_masked_sample_has_no_loss_and_no_gradient_whatever_its_values(
    make_criterion, rng, device, zero, fill, reduction
):
    changes = {zero: 0.0, "prediction": fill}
    criterion, without = make_criterion(), make_criterion()
    batch = batch_of(rng, device, changes)
    prediction = batch.pop("prediction").requires_grad_()
    loss = criterion(prediction, batch.pop("target"), batch.pop("log_snr"), **batch, reduction=reduction)
    (grad,) = torch.autograd.grad(loss.sum(), prediction)
    assert (grad[2] == 0).all()
    assert grad.isfinite().all()

    kept = [0, 1, 3, 4]
    batch = {n: value[kept] for n, value in batch_of(np.random.default_rng(0), device, changes).items()}
    expected = without(batch.pop("prediction"), batch.pop("target"), batch.pop("log_snr"), **batch, reduction="none")
    if reduction == "mean":
        torch.testing.assert_close(loss, expected.sum() / 5)
    else:
        assert loss[2] == 0
        torch.testing.assert_close(loss[kept], expected)
    assert int(criterion.statistics.skipped) == 0
    for name in FIELDS:
        got, want = getattr(criterion.statistics, name), getattr(without.statistics, name)
        torch.testing.assert_close(got, want, rtol=1e-14, atol=0, equal_nan=True)


def test_reweight_follows_the_same_rules_for_non_finite_values(make_criterion, device):
    criterion = make_criterion(half_life=INF)
    losses = torch.tensor([1.0, NAN, INF, 2.0, NAN, 5.0], device=device, requires_grad=True)
    log_snr = torch.tensor([0.0, 0.0, 0.0, NAN, 0.0, INF], device=device)
    out = criterion.reweight(losses, log_snr, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 2.0], device=device))
    assert out.isnan().tolist() == [False, True, True, True, False, False]
    assert out[[0, 4, 5]].tolist() == [1.0, 0.0, 10.0]
    out.sum().backward()
    assert losses.grad.isnan().tolist() == [False, True, True, True, False, False]
    assert losses.grad[[0, 4, 5]].tolist() == [1.0, 0.0, 2.0]
    assert int(criterion.statistics.skipped) == 3
    assert criterion.statistics.count.sum() == 2


def test_reweight_keeps_the_gradient_and_detaches_the_weights(make_criterion, rng, device):
    criterion = make_criterion(vadiff.weighting.VarianceAware(prior=1.0))
    for _ in range(2):
        log_snr = 4 * torch.randn(60, device=device)
        losses = (torch.exp(-0.3 * log_snr) * torch.rand(60, device=device)).requires_grad_()
        v = torch.rand(60, device=device)
        weight = criterion.weight_at(log_snr)
        out = criterion.reweight(losses, log_snr, v)
        torch.testing.assert_close(out, weight * v * losses)
        (grad,) = torch.autograd.grad(out.sum(), losses)
        torch.testing.assert_close(grad, weight * v)
    assert weight.max() > 1.2 * weight.min()
