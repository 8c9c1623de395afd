"""Where references come from: a data set, a part of it, or a bank of batches; classes, augmentation, ranks, devices."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from posteriors import brute_force, draw
from ranks import join_two_ranks, leave_two_ranks, run_two_ranks
from torch import Tensor

import vadiff
from vadiff.targets import PosteriorMean
from vadiff.targets.posterior import chunk_of


def test_samples_that_come_again_replace_their_copies_in_a_bank(digits):
    data, targets = digits[:64], PosteriorMean(bank=48)
    for start in (0, 16, 32, 0, 16, 32, 0):
        targets(data[start : start + 16], data[start : start + 16], 1.0, 1.0)
    values = targets.source.values[targets.source.valid].flatten(1)
    assert len(values.unique(dim=0)) == len(values)


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
    run_two_ranks(rank_main, str(tmp_path))
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


def test_draws_that_keep_their_target_cost_no_references_on_a_cpu(digits, monkeypatch):
    targets = PosteriorMean(digits, subset=512)
    for _ in range(2):
        targets(digits[:128], digits[:128], 1.0, 0.1)
    monkeypatch.setattr(targets.source, "references", None)
    assert torch.equal(targets(digits[:128], digits[:128], 1.0, 0.1), digits[:128])


def test_large_samples_are_taken_in_smaller_parts():
    assert chunk_of(torch.empty(10, 1, 8, 8)) == 4096
    assert chunk_of(torch.empty(10, 3, 256, 256)) == 85
    assert chunk_of(torch.empty(1, 3, 8192, 8192)) == 1
