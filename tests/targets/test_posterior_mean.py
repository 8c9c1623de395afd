"""Posterior-mean targets against closed forms, brute force and laws of probability."""

from __future__ import annotations

import math

import pytest
import torch
from posteriors import brute_force, draw
from torch import Tensor

import vadiff
from vadiff.optimal_loss import estimate
from vadiff.targets import PosteriorMean

INF = math.inf


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


@pytest.mark.parametrize("sigma", [1e-20, 1e-30, 0.0])
def test_no_noise_at_all_leaves_the_sample(digits, sigma):
    x0, noise = digits[:8], torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x0_hat, noise_hat = PosteriorMean(digits).pair(x0, noise, 1.0, sigma)
    assert torch.equal(x0_hat, x0)
    assert torch.equal(noise_hat, noise)


def test_targets_carry_no_gradient(digits):
    x0 = digits[:8].clone().requires_grad_()
    for value in PosteriorMean(digits).pair(x0, torch.randn(8, 1, 8, 8), 1.0, 2.0):
        assert not value.requires_grad
