"""Posterior-mean targets against closed forms, brute force and laws of probability."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from ranks import join_two_ranks, leave_two_ranks
from torch import Tensor

import vadiff
from vadiff.optimal_loss import estimate
from vadiff.targets import PosteriorMean
from vadiff.targets.posterior import chunk_of

INF = math.inf


def draw(data: Tensor, size: int, seed: int, sigma: float | Tensor, alpha: float = 1.0):
    """(rows, x0, x_t) of `size` draws."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(data), (size,), generator=generator)
    x0 = data[rows]
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    return rows, x0, alpha * x0 + sigma * noise


def brute_force(data: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The posterior mean over all of the data, in float64."""
    flat, x = data.flatten(1).double(), noisy.flatten(1).double()
    distances = (x[:, None] - alpha.double()[:, None, None] * flat).square().sum(2)
    return torch.softmax(-distances / (2 * sigma.double().square()[:, None]), 1) @ flat


@pytest.fixture(scope="module")
def digits() -> Tensor:
    from vadiff.trainer.data.digits import digits

    return digits().train.float().div(127.5).sub(1.0)


def test_gaussian_data_have_the_shrunk_sample_as_target():
    data = 0.7 * torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    rows, x0, noisy = draw(data, 512, 1, 0.5)
    found = PosteriorMean(data)(x0, noisy, 1.0, 0.5, index=rows)
    shrunk = noisy * 0.49 / (0.49 + 0.25)
    assert (found - shrunk).square().mean().sqrt() < 0.03 * (x0 - shrunk).square().mean().sqrt()


def test_two_points_have_a_hyperbolic_tangent_as_target():
    data = torch.tensor([[-1.0], [1.0]])
    rows, x0, noisy = draw(data, 64, 0, 0.8)
    found = PosteriorMean(data)(x0, noisy, 1.0, 0.8, index=rows)
    torch.testing.assert_close(found, torch.tanh(noisy / 0.64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by_index", [True, False])
def test_all_references_give_the_brute_force_mean_at_every_noise_level(digits, by_index):
    sigma = torch.logspace(-1, 1, 128)
    alpha = torch.linspace(0.1, 1.0, 128)
    rows = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))[:128]
    x0 = digits[rows]
    noisy = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * torch.randn(x0.shape)
    targets = PosteriorMean(digits)
    found = targets(x0, noisy, alpha, sigma, index=rows if by_index else None)
    expected = brute_force(digits, noisy, alpha, sigma)
    torch.testing.assert_close(found.flatten(1).double(), expected, rtol=0, atol=2e-5)


def unbiased_z_scores(make_targets, data: Tensor, labels: Tensor | None = None, calls: int = 1500) -> Tensor:
    """z-scores of the mean difference to the full posterior mean, times some functions of x_t.

    E[f(x_t)·(x0_hat - E[x0 | x_t])] = 0 for every f if and only if the target is unbiased given x_t.
    """
    generator = torch.Generator().manual_seed(0)
    targets = make_targets()
    by_class = [data if labels is None else data[labels == k] for k in range(1 if labels is None else 2)]
    order = torch.empty(0, dtype=torch.int64)
    found = []
    for _ in range(calls):
        if len(order) < 4:
            order = torch.randperm(len(data), generator=generator)
        rows, order = order[:4], order[4:]
        x0 = data[rows]
        noisy = x0 + 0.7 * torch.randn(x0.shape, generator=generator)
        given = {} if labels is None else {"labels": labels[rows]}
        x0_hat = targets(x0, noisy, 1.0, 0.7, index=rows, generator=generator, **given)
        ones = torch.ones(4)
        if labels is None:
            full = brute_force(data, noisy, ones, 0.7 * ones)
        else:
            both = torch.stack([brute_force(part, noisy, ones, 0.7 * ones) for part in by_class])
            full = both[labels[rows], torch.arange(4)]
        features = torch.cat([torch.ones_like(noisy), noisy, noisy.square(), noisy.abs() < 0.5], 1).double()
        found.append(((x0_hat.double() - full) * features).mean(0))  # a call's draws share their references
    values = torch.stack(found[20:])  # the first calls fill a bank
    return values.mean(0) / values.std(0) * math.sqrt(len(values))


POINTS = torch.tensor([-1.3, -1.1, -0.8, -0.2, 0.0, 0.1, 0.5, 0.9, 1.0, 1.6, 1.9, -2.0, 0.3, -0.5, 0.7, 1.2]).repeat(4)
POINTS = (POINTS + torch.linspace(-0.05, 0.05, len(POINTS)))[:, None]
CLASSES = (torch.arange(64) % 5 == 0).long()  # a fifth and four fifths


@pytest.mark.parametrize("kind", ["subset", "bank", "classes", "bank of classes"])
def test_targets_are_unbiased_given_the_noisy_sample(kind):
    labels = CLASSES if "classes" in kind else None
    if "bank" in kind:
        make = lambda: PosteriorMean(bank=16)  # noqa: E731
    else:
        make = lambda: PosteriorMean(POINTS, subset=24, labels=labels)  # noqa: E731
    assert unbiased_z_scores(make, POINTS, labels).abs().max() < 4


def test_the_test_of_bias_sees_references_of_another_mix():
    """With references that hold one half of the data only, the targets are biased."""
    make = lambda: PosteriorMean(POINTS.sort(0).values[:32], subset=24)  # noqa: E731
    assert unbiased_z_scores(make, POINTS, calls=400).abs().max() > 8


def test_the_own_sample_counts_once_however_often_it_is_a_reference(digits):
    data = digits[:300]
    _, x0, noisy = draw(data, 32, 0, 2.0)
    once = PosteriorMean(data)(x0, noisy, 1.0, 2.0)
    twice = PosteriorMean(torch.cat([data, x0]))(x0, noisy, 1.0, 2.0)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-5)


def test_samples_that_come_again_replace_their_copies_in_a_bank(digits):
    data, targets = digits[:64], PosteriorMean(bank=48)
    for start in (0, 16, 32, 0, 16, 32, 0):
        targets(data[start : start + 16], data[start : start + 16], 1.0, 1.0)
    values = targets.source.values[targets.source.valid].flatten(1)
    assert len(values.unique(dim=0)) == len(values)


def test_neither_order_nor_chunks_of_the_references_matter(digits):
    rows, x0, noisy = draw(digits, 16, 0, 1.5)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    plain = PosteriorMean(digits)(x0, noisy, 1.0, 1.5, index=rows)
    for targets, index in (
        (PosteriorMean(digits, chunk=100), rows),
        (PosteriorMean(digits[order]), order.argsort()[rows]),
        (PosteriorMean(digits[order]), None),
    ):
        torch.testing.assert_close(targets(x0, noisy, 1.0, 1.5, index=index), plain, rtol=0, atol=1e-5)


def test_only_the_ratio_of_alpha_and_sigma_matters(digits):
    rows, x0, noisy = draw(digits, 16, 0, 1.5)
    plain = PosteriorMean(digits)(x0, noisy, 1.0, 1.5, index=rows)
    scaled = PosteriorMean(digits)(x0, 0.4 * noisy, 0.4, torch.full((16,), 0.6), index=rows)
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-5)


def test_pure_noise_has_the_mean_of_the_data_as_target(digits):
    rows, x0, noisy = draw(digits, 4, 0, 1.0, alpha=0.0)
    found = PosteriorMean(digits)(x0, noisy, 0.0, 1.0, index=rows)
    torch.testing.assert_close(found, digits.mean(0).expand_as(found), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.7, 1.5, 4.0])
def test_removed_error_and_what_is_left_add_up_to_the_optimal_loss(digits, sigma):
    """Law of total variance: J*_M + E|x0_hat - E[x0 | x_t]|² = J*; with all references J*_M = J*."""
    data = digits[:600]
    level, ones = vadiff.log_snr.from_sigma(torch.tensor([sigma])), torch.ones(64)
    some, everything = PosteriorMean(data, subset=256, threshold=0.0), PosteriorMean(data, threshold=0.0)
    left = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(data), generator=generator)[:64]
        x0 = data[rows]
        noisy = x0 + sigma * torch.randn(x0.shape, generator=generator)
        full = everything(x0, noisy, 1.0, sigma, index=rows).flatten(1).double()
        torch.testing.assert_close(full, brute_force(data, noisy, ones, sigma * ones), rtol=0, atol=1e-4)
        part = some(x0, noisy, 1.0, sigma, index=rows, generator=generator).flatten(1).double()
        left.append((part - full).square().mean())
    best = estimate(data, [sigma], draws=2048)
    optimal, stderr = (float(value[0]) / best.elements for value in (best.loss, best.stderr))
    assert float(everything.removed_error(level)) == pytest.approx(optimal, abs=5 * stderr + 0.03 * optimal)
    total = float(some.removed_error(level)) + float(torch.stack(left).mean())
    assert total == pytest.approx(optimal, abs=5 * stderr + 0.05 * optimal)


def test_the_mean_target_of_a_batch_is_less_noisy(digits):
    """Noise of a batch's mean target about the mean of E[x0 | x_t], as a share of the plain target's."""
    targets = PosteriorMean(digits, subset=1024)
    noise: dict[str, list[Tensor]] = {"plain": [], "posterior": []}
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(digits), generator=generator)[:64]
        x0 = digits[rows]
        noisy = x0 + 5.0 * torch.randn(x0.shape, generator=generator)
        full = brute_force(digits, noisy, torch.ones(64), torch.full((64,), 5.0))
        found = targets(x0, noisy, 1.0, 5.0, index=rows, generator=generator)
        for name, target in (("plain", x0), ("posterior", found)):
            noise[name].append((target.flatten(1).double() - full).mean(0))
    plain, posterior = (torch.stack(noise[name]).square().mean() for name in ("plain", "posterior"))
    assert posterior < 0.15 * plain


def test_draws_below_the_threshold_keep_their_own_target_bit_by_bit(digits):
    targets = PosteriorMean(digits)
    for sigma in (0.1, 0.1, 3.0):  # from 64 draws near a level on, it is known
        rows, x0, noisy = draw(digits, 128, 0, sigma)
        targets(x0, noisy, 1.0, sigma, index=rows)
    x0, noise = digits[:128], torch.randn(128, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    mixed = torch.where(torch.arange(128) % 2 == 0, 0.1, 3.0)
    x0_hat, noise_hat = targets.pair(x0, noise, 1.0, mixed, index=torch.arange(128))
    assert torch.equal(x0_hat[::2], x0[::2])
    assert torch.equal(noise_hat[::2], noise[::2])
    assert not (x0_hat[1::2] == x0[1::2]).flatten(1).all(1).any()
    levels = vadiff.log_snr.from_sigma(torch.tensor([0.1, 3.0]))
    assert targets.removed_error(levels)[0] == 0.0
    assert targets.removed_error(levels)[1] > 0.05


def test_pair_gives_targets_that_explain_the_same_noisy_sample(digits):
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(32, generator=generator)
    x0, noise = digits[:32], torch.randn(32, 1, 8, 8, generator=generator)
    targets = PosteriorMean(digits)
    x0_hat, noise_hat = targets.pair(x0, noise, 1 - t, t, index=torch.arange(32))
    a, s = (1 - t).view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
    torch.testing.assert_close(a * x0_hat + s * noise_hat, a * x0 + s * noise, rtol=0, atol=1e-5)


def test_tf32_would_change_targets_by_less_than_their_noise(digits, monkeypatch):
    """TF32 keeps 10 bits of the factors of a product: emulated, at the lowest noise at which digits are replaced."""
    rows, x0, noisy = draw(digits, 256, 0, 0.4)
    exact = PosteriorMean(digits)(x0, noisy, 1.0, 0.4, index=rows)

    def rounded(value: Tensor) -> Tensor:
        return ((value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda c, a, b, **given: addmm(c, rounded(a), rounded(b), **given))
    found = PosteriorMean(digits)(x0, noisy, 1.0, 0.4, index=rows)
    assert not torch.equal(found, exact)
    assert (found - exact).square().mean().sqrt() < 0.02 * (x0 - exact).square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_come_back_as_they_were(digits, dtype):
    rows, x0, noisy = draw(digits, 16, 0, 2.0)
    expected = PosteriorMean(digits)(x0, noisy, 1.0, 2.0, index=rows)
    found = PosteriorMean(digits)(x0.to(dtype), noisy.to(dtype), 1.0, 2.0, index=rows)
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-5 if dtype is torch.float64 else 0.05)


def test_autocast_does_not_round_the_products(digits):
    rows, x0, noisy = draw(digits, 16, 0, 2.0)
    expected = PosteriorMean(digits)(x0, noisy, 1.0, 2.0, index=rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(PosteriorMean(digits)(x0, noisy, 1.0, 2.0, index=rows), expected)


def test_bytes_are_pixels(digits):
    pixels = vadiff.pixels.pixels(digits)
    floats = vadiff.pixels.normalised(pixels)
    _, x0, noisy = draw(floats, 16, 0, 2.0)
    expected = PosteriorMean(floats)(x0, noisy, 1.0, 2.0)
    torch.testing.assert_close(PosteriorMean(pixels)(x0, noisy, 1.0, 2.0), expected, rtol=0, atol=1e-6)


def test_withheld_labels_have_all_classes_as_references(digits):
    labels = torch.arange(len(digits)) % 10
    rows, x0, noisy = draw(digits, 16, 0, 2.0)
    plain = PosteriorMean(digits)(x0, noisy, 1.0, 2.0, index=rows)
    targets = PosteriorMean(digits, labels=labels, unlabelled=10)
    withheld = targets(x0, noisy, 1.0, 2.0, index=rows, labels=torch.full((16,), 10))
    torch.testing.assert_close(withheld, plain, rtol=0, atol=1e-5)
    of_class = targets(x0, noisy, 1.0, 2.0, index=rows, labels=labels[rows])
    for i, row in enumerate(rows.tolist()):
        own = digits[labels == row % 10]
        torch.testing.assert_close(
            of_class[i].flatten().double(), brute_force(own, noisy[i : i + 1], torch.ones(1), torch.full((1,), 2.0))[0],
            rtol=0, atol=1e-4,
        )  # fmt: skip


def test_augmented_references_are_of_the_batch_s_kind(digits):
    """References mirrored at random against a batch mirrored at random, over all mirrored and plain images."""
    data = digits[:256]
    generator = torch.Generator().manual_seed(0)

    def mirrored(images: Tensor) -> Tensor:
        coins = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        return torch.where(coins, images.flip(-1), images)

    targets = PosteriorMean(data, subset=256, augment=mirrored)
    everything = torch.cat([data, data.flip(-1)])
    plain, posterior = [], []
    for _ in range(20):
        rows = torch.randperm(256, generator=generator)[:32]
        x0 = mirrored(data[rows])
        noisy = x0 + 3.0 * torch.randn(x0.shape, generator=generator)
        full = brute_force(everything, noisy, torch.ones(32), torch.full((32,), 3.0))
        found = targets(x0, noisy, 1.0, 3.0, index=rows, generator=generator)
        plain.append((x0.flatten(1) - full).square().mean())
        posterior.append((found.flatten(1) - full).square().mean())
    assert torch.stack(posterior).mean() < 0.1 * torch.stack(plain).mean()


@pytest.mark.parametrize("kind", ["all", "subset", "bank"])
@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
def test_a_cast_of_the_module_does_not_round_its_references(digits, kind, cast):
    """Of rounded references none is the own image, which would count twice."""
    make = {
        "all": {"reference": digits[:256]},
        "subset": {"reference": digits[:256], "subset": 256},
        "bank": {"bank": 64},
    }
    plain, held = PosteriorMean(**make[kind]), PosteriorMean(**make[kind])
    for number in range(4):
        x0 = digits[:64].roll(-16 * number, 0)[:16]
        noisy = x0 + 0.7 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(number))
        expected = plain(x0, noisy, 1.0, 0.7, generator=torch.Generator().manual_seed(number))
        assert torch.equal(held(x0, noisy, 1.0, 0.7, generator=torch.Generator().manual_seed(number)), expected)
        held.to(cast)
    assert not torch.equal(expected, x0)


def test_a_bank_goes_on_from_its_state(digits):
    first = PosteriorMean(bank=64)
    batches = digits[:128].split(16)
    for x0 in batches[:5]:
        first(x0, x0 + torch.randn_like(x0), 1.0, 1.0)
    second = PosteriorMean(bank=64)
    second.load_state_dict(first.state_dict())
    third = pickle.loads(pickle.dumps(first))
    fourth = copy.deepcopy(first)
    noisy = batches[5] + torch.randn_like(batches[5])
    expected = first(batches[5], noisy, 1.0, 1.0)
    assert not torch.equal(expected, batches[5])
    for other in (second, third, fourth):
        assert torch.equal(other(batches[5], noisy, 1.0, 1.0), expected)


def test_a_sample_that_is_not_finite_spoils_its_own_target_only(digits):
    broken, plain = PosteriorMean(bank=64), PosteriorMean(bank=64)
    for number, x0 in enumerate(digits[:96].split(16)):
        noisy = x0 + 2.0
        spoilt = x0.clone()
        if number < 5:
            spoilt[3, 0, 2, 2] = math.nan
        expected, found = plain(x0, noisy, 1.0, 2.0), broken(spoilt, noisy, 1.0, 2.0)
        assert found.isfinite().flatten(1).all(1).sum() == (15 if number < 5 else 16)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.3)
    assert not torch.equal(found, x0)
    with pytest.raises(ValueError, match="reference has NaN"):
        PosteriorMean(spoilt.fill_(math.nan))


def test_in_eval_mode_nothing_changes(digits):
    targets = PosteriorMean(bank=48)
    for x0 in digits[:64].split(16):
        targets(x0, x0 + 2.0, 1.0, 2.0)
    before = copy.deepcopy(targets.state_dict())
    x0 = digits[64:80]
    assert not torch.equal(targets.eval()(x0, x0 + 2.0, 1.0, 2.0), x0)
    assert all(torch.equal(value, before[name]) for name, value in targets.state_dict().items())


def test_a_seeded_generator_repeats_the_subset(digits):
    rows, x0, noisy = draw(digits, 16, 0, 2.0)
    targets = PosteriorMean(digits, subset=128)
    one, two, three = (
        targets(x0, noisy, 1.0, 2.0, index=rows, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_the_state_survives_half_precision(digits):
    rows, x0, noisy = draw(digits, 64, 0, 2.0)
    targets = PosteriorMean(digits)
    targets(x0, noisy, 1.0, 2.0, index=rows)
    level = vadiff.log_snr.from_sigma(torch.tensor([2.0]))
    expected = targets.removed_error(level)
    assert torch.equal(targets.half().removed_error(level), expected)


@pytest.mark.parametrize("kind", ["all", "subset", "bank"])
def test_compiled_in_one_piece_it_is_the_same(digits, kind):
    make = {"all": {"reference": digits}, "subset": {"reference": digits, "subset": len(digits)}, "bank": {"bank": 64}}
    eager, compiled = PosteriorMean(**make[kind]), PosteriorMean(**make[kind])
    batches = digits[:80].split(16)
    for number, x0 in enumerate(batches):
        noisy = x0 + 2.0 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(number))
        expected = eager(x0, noisy, 1.0, 2.0)
        if number == 0:  # the first call makes a bank, and the keys of a data set
            compiled(x0, noisy, 1.0, 2.0)
            call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
            continue
        torch.testing.assert_close(call(x0, noisy, 1.0, 2.0), expected, rtol=0, atol=1e-5)


def batches_of_two_ranks() -> list[Tensor]:
    """x0 of four batches [rank, 16, 3], all different."""
    return list(torch.randn(4, 2, 16, 3, generator=torch.Generator().manual_seed(0)))


def rank_main(rank: int, folder: str) -> None:
    join_two_ranks(rank, folder)
    own, both = PosteriorMean(bank=48), PosteriorMean(bank=96, gather=True)
    for batch in batches_of_two_ranks():
        x0 = batch[rank]
        results = {"own": own(x0, x0 + 1.0, 1.0, 2.0), "both": both(x0, x0 + 1.0, 1.0, 2.0)}
    torch.save(results, f"{folder}/{rank}.pt")
    leave_two_ranks()


def test_ranks_use_their_own_batches_or_put_them_together(tmp_path):
    torch.multiprocessing.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    batches = torch.stack(batches_of_two_ranks())
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        x0, ones = batches[-1, rank], torch.ones(16)
        for name, references in (("own", batches[:, rank]), ("both", batches)):
            expected = brute_force(references.reshape(-1, 3), x0 + 1.0, ones, 2.0 * ones)
            torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "with_replacement"), [(400, True), (384, False), (1200, False)])
def test_what_a_bank_takes_out_and_the_loss_make_the_loss_against_the_data(digits, size, with_replacement):
    """Also of a bank in which images come again, which leaves fewer in it than were put in."""
    targets, generator = PosteriorMean(bank=size, threshold=0.0), torch.Generator().manual_seed(0)
    left, whole, moved = [], [], 0
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(60):
        if len(order) < 128:
            order = torch.randperm(len(digits), generator=generator)
        rows, order = order[:128], order[128:]
        if with_replacement:
            rows = torch.randint(len(digits), (128,), generator=generator)
        x0 = digits[rows]
        found = targets(x0, x0 + 3.0 * torch.randn(x0.shape, generator=generator), 1.0, 3.0, index=rows)
        if not torch.equal(found, x0):
            moved += 1
            left.append(found.square().mean())  # of a network that always says 0
            whole.append(x0.square().mean())
    removed = float(targets.removed_error(vadiff.log_snr.from_sigma(torch.tensor([3.0]))))
    assert moved >= 55
    assert float(torch.stack(left).mean()) + removed == pytest.approx(float(torch.stack(whole).mean()), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_batch_is_found_in_the_reference_without_index(digits, dtype):
    data = digits[:2]
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = PosteriorMean(data)(data.to(dtype), noise.to(dtype), 0.0, 1.0)
    torch.testing.assert_close(found.float(), data.mean(0).expand_as(data), rtol=0, atol=0.01)


def test_a_batch_that_is_not_in_the_reference_is_told(digits):
    targets = PosteriorMean(digits)
    with pytest.warns(vadiff.errors.DiffusionLossWarning, match="only .* are in the reference bit by bit.*pass index="):
        targets(digits[:128].flip(-1), digits[:128], 1.0, 2.0)
    assert "pass index=" in targets.description
    found = PosteriorMean(digits)
    found(digits[:128], digits[:128], 1.0, 2.0)
    assert found.description == "posterior mean over 1,500 references"


def test_references_are_no_buffers_and_copies_share_them(digits):
    """DistributedDataParallel sends buffers to all ranks, and averages of weights copy them."""
    for targets in (PosteriorMean(digits), PosteriorMean(bank=64)):
        targets(digits[:16], digits[:16], 1.0, 1.0)
        assert max(buffer.numel() for buffer in targets.buffers()) <= 256
    targets = PosteriorMean(digits)
    assert copy.deepcopy(targets).source.bits.data_ptr() == digits.data_ptr()


def test_a_bank_is_loaded_onto_the_device_of_the_module(digits):
    first = PosteriorMean(bank=64)
    first(digits[:16], digits[:16], 1.0, 1.0)
    second = PosteriorMean(bank=64).to("meta")
    second.load_state_dict(first.state_dict(), assign=True)
    assert second.source.bits.device.type == "meta"
    with pytest.raises(RuntimeError, match="bits has 64 samples, expected 96: the bank's size"):
        PosteriorMean(bank=96).load_state_dict(first.state_dict())


@pytest.mark.parametrize("sigma", [1e-20, 1e-30, 0.0])
def test_no_noise_at_all_leaves_the_sample(digits, sigma):
    x0, noise = digits[:8], torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x0_hat, noise_hat = PosteriorMean(digits).pair(x0, noise, 1.0, sigma)
    assert torch.equal(x0_hat, x0)
    assert torch.equal(noise_hat, noise)


def test_draws_that_keep_their_target_cost_no_references_on_a_cpu(digits, monkeypatch):
    targets = PosteriorMean(digits, subset=512)
    for _ in range(2):
        targets(digits[:128], digits[:128], 1.0, 0.1)
    monkeypatch.setattr(targets.source, "references", None)
    assert torch.equal(targets(digits[:128], digits[:128], 1.0, 0.1), digits[:128])


def test_targets_carry_no_gradient(digits):
    x0 = digits[:8].clone().requires_grad_()
    for value in PosteriorMean(digits).pair(x0, torch.randn(8, 1, 8, 8), 1.0, 2.0):
        assert not value.requires_grad


def test_large_samples_are_taken_in_smaller_parts():
    assert chunk_of(torch.empty(10, 1, 8, 8)) == 4096
    assert chunk_of(torch.empty(10, 3, 256, 256)) == 85
    assert chunk_of(torch.empty(1, 3, 8192, 8192)) == 1


DATA = torch.zeros(100, 1, 8, 8)
X0 = torch.zeros(16, 1, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected one of them"),
        ({"reference": DATA, "bank": 64}, "expected one of them"),
        ({"reference": DATA.long()}, "reference is torch.int64, expected a tensor of floats"),
        ({"reference": DATA[:1]}, r"reference has shape \(1, 1, 8, 8\), expected \(N, ...\) with at least two"),
        ({"reference": DATA, "subset": 200}, "subset is 200, expected at most 100"),
        ({"reference": DATA, "subset": 1.5}, "subset is 1.5, expected an integer"),
        ({"reference": DATA, "augment": torch.flip}, "subset is None with augment, expected a number"),
        ({"reference": DATA, "labels": torch.zeros(100, 77, 768)}, "Texts and other conditions"),
        ({"reference": DATA, "threshold": 1.0}, "threshold is 1.0, expected a number from 0 to below 1"),
        ({"reference": DATA, "chunk": 0}, "chunk is 0, expected an integer of at least 1"),
        ({"bank": 64, "labels": torch.zeros(100).long()}, "labels is given with a bank"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        PosteriorMean(**arguments)


@pytest.mark.parametrize(
    ("make", "call", "message"),
    [
        ({}, {"x0": X0.long()}, "x0 is .*, expected floats"),
        ({}, {"noisy": X0[:4]}, r"noisy is \(4, 1, 8, 8\), expected \(16, 1, 8, 8\)"),
        ({}, {"x0": X0[..., :4], "noisy": X0[..., :4]}, "as the reference"),
        ({}, {"sigma": torch.ones(4)}, r"sigma is \(4,\), expected floats \(16,\)"),
        ({}, {"alpha": INF}, "alpha is a float, expected floats"),
        ({}, {"index": torch.zeros(16)}, "index is .*float32, expected int64"),
        ({}, {"labels": torch.zeros(16).long()}, "labels is given, but the reference has none"),
        ({"labels": torch.zeros(100).long()}, {}, "labels is None, but the reference has labels"),
        ({"subset": 40}, {}, "subset is 40 with a batch of 16, expected at least 64"),
        ({"subset": 100, "augment": torch.neg}, {}, "index is None with augment"),
        ({"reference": None, "bank": 40}, {}, "bank is 40 with a batch of 16, expected at least 48"),
    ],
)
def test_bad_calls_are_named(make, call, message):
    targets = PosteriorMean(**{"reference": DATA, **make})
    with pytest.raises((TypeError, ValueError), match=message):
        targets(**{"x0": X0, "noisy": X0, "alpha": 1.0, "sigma": 1.0, **call})
