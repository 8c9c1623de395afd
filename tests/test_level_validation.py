"""vadiff.validation: the same numbers whatever the loop, their errors, and what a loop may get wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import join_two_ranks, leave_two_ranks, run_two_ranks
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

import vadiff
from vadiff.models import Denoiser
from vadiff.process import DiscreteVP, loss_ratio
from vadiff.training import held_out_loss
from vadiff.validation import IndexedDataset, LevelLosses, LevelValidation, indices_of

RANGE = (-6.0, 6.0)
IMAGES = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.5


def loss_of(clean: Tensor, log_snr: Tensor, noise: Tensor, scale: float = 0.3) -> Tensor:
    """ε loss [B] of a network that guesses `scale` of its input; row by row, so that batches agree to the bit."""
    per_sample = (-1, 1, 1, 1)
    noisy = log_snr.sigmoid().sqrt().view(per_sample) * clean + (-log_snr).sigmoid().sqrt().view(per_sample) * noise
    return torch.stack([row.double().square().mean() for row in scale * noisy - noise])


def validate(validation: LevelValidation, batches: Sequence[Any], scale: float = 0.3) -> LevelLosses:
    for indices, clean in batches:
        log_snr, noise = validation.draw(indices, clean.shape)
        validation.add(indices, log_snr, loss_of(clean, log_snr, noise, scale))
    return validation.result()


def batches(size: int, order: Tensor | None = None, turns: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.arange(turns * len(IMAGES)) if order is None else order
    return ((indices, IMAGES[indices // turns]) for indices in order.split(size))


def assert_same(found: LevelLosses, expected: LevelLosses) -> None:
    for name in ("log_snr", "loss", "stderr", "samples", "non_finite"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("every_level", [False, True])
def test_batch_size_and_order_change_nothing(every_level: bool) -> None:
    validation = LevelValidation(5, log_snr_range=RANGE, every_level=every_level)
    expected = validate(validation, [*batches(50, turns=validation.turns)])
    shuffled = torch.randperm(validation.turns * len(IMAGES), generator=torch.Generator().manual_seed(1))
    for size, order in ((7, None), (1, shuffled), (16, shuffled)):
        assert_same(validate(validation, [*batches(size, order, validation.turns)]), expected)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("every_level", [False, True])
def test_loader_of_the_indexed_dataset_gives_each_sample_its_turns(workers: int, every_level: bool) -> None:
    validation = LevelValidation(3, log_snr_range=RANGE, every_level=every_level)
    expected = validate(validation, [*batches(50, turns=validation.turns)])
    loader: DataLoader[Any] = DataLoader(validation.indexed(IMAGES), batch_size=8, shuffle=True, num_workers=workers)
    found = validate(validation, loader)
    assert_same(found, expected)
    assert found.samples.tolist() == ([50, 50, 50] if every_level else expected.samples.tolist())


def test_collate_function_of_the_loop_is_kept() -> None:
    indexed = IndexedDataset([{"text": "a"}, {"text": "b"}], collate_fn=lambda items: [item["text"] for item in items])
    ((indices, texts),) = DataLoader(indexed, batch_size=2, collate_fn=indexed.collate)
    assert indices.tolist() == [0, 1]
    assert texts == ["a", "b"]


def test_indices_from_bytes_are_equal_for_equal_samples_only() -> None:
    twice = torch.cat([IMAGES, IMAGES[:3]])
    found = indices_of(twice)
    assert torch.equal(found[50:], found[:3])
    assert len(found.unique()) == 50
    validation = LevelValidation(3, log_snr_range=RANGE)
    result = validate(validation, [(found[part], twice[part]) for part in torch.arange(53).split(9)])
    assert int(result.samples.sum()) == 50


def test_levels_are_even_over_any_run_of_samples_and_in_no_rhythm() -> None:
    validation = LevelValidation(4, log_snr_range=RANGE)
    levels, _ = validation.draw(torch.arange(400), (400, 1))
    assert all(len(block.unique()) == 4 for block in levels.split(4))
    of_a_class = levels[::4]  # of data whose four classes take turns
    assert all(15 <= int((of_a_class == level).sum()) <= 35 for level in validation.log_snr)


def test_noise_is_normal_and_different_for_each_index_and_seed() -> None:
    drawn = {
        seed: LevelValidation(2, log_snr_range=RANGE, seed=seed).draw(range(200), (200, 3, 4, 4))[1] for seed in (0, 7)
    }
    noise = torch.stack([*drawn.values()]).flatten(2).double()  # [2, 200, 48]
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1.0) < 0.02
    correlation = torch.corrcoef(noise.flatten(0, 1)) - torch.eye(400, dtype=torch.float64)
    assert correlation.abs().max() < 0.8
    assert abs(correlation.mean()) < 1e-3


def test_every_level_of_a_sample_has_the_noise_of_its_single_level() -> None:
    single, every = (LevelValidation(3, log_snr_range=RANGE, every_level=choice) for choice in (False, True))
    noise = single.draw([4], (1, 2, 2))[1]
    log_snr, repeated = every.draw([12, 13, 14], (3, 2, 2))
    assert torch.equal(repeated, noise.expand(3, 2, 2))
    assert log_snr.tolist() == [-6.0, 0.0, 6.0]


def rank_main(rank: int, folder: str) -> None:
    join_two_ranks(rank, folder)
    validation = LevelValidation(3, log_snr_range=RANGE, reference=Path(folder) / "reference.csv")
    results = []
    for scale in (0.3, 0.2):
        dataset = validation.indexed(IMAGES[:49])  # odd: one sample comes twice
        sampler: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=2, rank=rank, shuffle=False)
        results.append(validate(validation, DataLoader(dataset, batch_size=8, sampler=sampler), scale))
    unwritable = LevelValidation(3, log_snr_range=RANGE, reference=Path(folder) / "reference.csv" / "no folder")
    share = [*batches(50)] if rank == 0 else []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ratios = [validate(unwritable, share, scale).mean_log_ratio() for scale in (0.3, 0.2)]
    torch.save((ratios, [str(warning.message) for warning in caught]), f"{folder}/unwritable-{rank}.pt")
    lonely = LevelValidation(3, log_snr_range=RANGE, sync=False)
    if rank == 0:
        validate(lonely, [*batches(50)])
    try:
        validation.result()
    except ValueError as error:
        results.append(str(error))
    torch.save(results, f"{folder}/{rank}.pt")
    leave_two_ranks()


def test_two_ranks_give_the_numbers_of_one_process(tmp_path: Path) -> None:
    run_two_ranks(rank_main, str(tmp_path))
    validation = LevelValidation(3, log_snr_range=RANGE, reference=tmp_path / "alone.csv")
    expected = [
        validate(validation, [(i, IMAGES[i]) for i in torch.arange(49).split(8)], scale) for scale in (0.3, 0.2)
    ]
    for rank in (0, 1):
        *found, error = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for got, wanted in zip(found, expected, strict=True):
            assert_same(got, wanted)
            assert got.mean_log_ratio() == wanted.mean_log_ratio()
        assert "no losses were added" in error
    (first, warned), (second, silent) = (torch.load(tmp_path / f"unwritable-{rank}.pt") for rank in (0, 1))
    assert first == second
    assert first[0] == 0.0 != first[1]
    assert "cannot be written" in warned[0]
    assert (len(warned), silent) == (1, [])
    assert (tmp_path / "reference.csv").read_text() == (tmp_path / "alone.csv").read_text()


def test_resumed_run_compares_with_the_first_validation(tmp_path: Path) -> None:
    file = tmp_path / "new" / "validation.csv"
    unbroken = LevelValidation(5, log_snr_range=RANGE, reference=str(file))
    first, second = (validate(unbroken, [*batches(16)], scale) for scale in (0.3, 0.2))
    assert first.mean_log_ratio() == 0.0
    resumed = validate(LevelValidation(5, log_snr_range=RANGE, reference=str(file)), [*batches(9)], 0.2)
    assert_same(resumed, second)
    assert str(resumed) == str(second)
    by_hand = np.log(second.loss.numpy() / first.loss.numpy()).mean()
    assert resumed.mean_log_ratio() == pytest.approx(by_hand, abs=1e-12)


def test_loss_of_a_foreign_loop_is_the_trainers_held_out_loss() -> None:
    torch.manual_seed(0)

    class Scaled(Denoiser):
        def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
            return noisy / (1.0 + sigma.view(-1, 1, 1, 1) ** 2)

    denoiser, levels = Scaled(torch.nn.Linear(1, 1), 0.5), [-4.0, 1.0, 6.0]
    own = held_out_loss(denoiser, IMAGES, log_snr_levels=levels, draws=1)
    stream = torch.randn(IMAGES.numel(), generator=torch.Generator().manual_seed(0)).view(IMAGES.shape)
    validation = LevelValidation(levels, every_level=True, noise=lambda samples, shape: stream[samples])
    for indices, clean in batches(11, torch.randperm(150), turns=3):
        log_snr, noise = validation.draw(indices, clean.shape)
        sigma = (-0.5 * log_snr).exp()
        error = denoiser(clean + sigma.view(-1, 1, 1, 1) * noise, sigma) - clean
        loss = error.square().flatten(1).mean(1) * loss_ratio("edm", log_snr, sigma_data=0.5)
        validation.add(indices, log_snr, loss)
    result = validation.result()
    torch.testing.assert_close(result.loss.float(), own.mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.stderr, own.by_level.stderr, rtol=1e-4, atol=0)


def test_non_finite_loss_shows_in_its_level_and_is_counted() -> None:
    losses = torch.ones(20)
    losses[3] = torch.nan
    result = added(ready(every_level=True), range(20), losses).result()
    assert result.loss.isnan().tolist() == [False, True]
    assert result.non_finite.tolist() == [0, 1]
    assert str(result).splitlines()[-1] == "non-finite losses: 1, at log-SNR 6"


SCHEDULES = {"linear": DiscreteVP.linear(), "cosine": DiscreteVP.cosine(), "hundred": DiscreteVP.linear(100)}


@pytest.mark.parametrize("process", [*SCHEDULES.values(), "stable_diffusion"], ids=[*SCHEDULES, "name"])
def test_levels_of_a_discrete_process_are_whole_timesteps(process: Any) -> None:
    validation = LevelValidation.for_process(process, levels=5)
    process = DiscreteVP.scaled_linear() if isinstance(process, str) else process
    timesteps = vadiff.schedulers.timesteps_of(process, validation.log_snr)
    assert torch.equal(process.log_snr(timesteps.double()).float(), validation.log_snr.float())
    assert torch.equal(timesteps, process.timestep(validation.log_snr))
    assert len(timesteps.unique()) == 5


def test_levels_of_a_continuous_process_are_within_it() -> None:
    assert LevelValidation.for_process("flow", levels=3).log_snr.tolist() == [-10.0, 0.0, 10.0]
    edm = LevelValidation.for_process("edm", levels=2).log_snr
    assert edm.tolist() == pytest.approx([-2.0 * math.log(80.0), 10.0])
    asked = LevelValidation.for_process("flow", [2.0, -1.0], every_level=True)
    assert (asked.log_snr.tolist(), asked.turns) == ([2.0, -1.0], 2)


def added(
    validation: LevelValidation, indices: Sequence[int], loss: Any = None, log_snr: Any = None, shape: Any = (1,)
) -> LevelValidation:
    levels, _ = validation.draw(indices, (len(indices), *shape))
    validation.add(indices, levels if log_snr is None else log_snr, torch.ones(len(indices)) if loss is None else loss)
    return validation


def ready(**options: Any) -> LevelValidation:
    return LevelValidation(**{"levels": 2, "log_snr_range": RANGE, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ready(levels=0), ValueError, "levels is 0, expected at least 1"),
        (lambda: ready(levels=[1.0, 1.0]), ValueError, "levels is .*, expected each log-SNR once"),
        (lambda: ready(levels=[math.inf]), ValueError, "levels is .*, expected a number of levels, or finite log-SNRs"),
        (lambda: ready(log_snr_range=None), ValueError, r"log_snr_range is None, .*for_process\(scheduler\)"),
        (lambda: ready(log_snr_range=(3.0, -3.0)), ValueError, r"log_snr_range is \(3.0, -3.0\), expected a lower and"),
        (lambda: ready(log_snr_range=(2, 1, 4)), ValueError, r"log_snr_range is \(2, 1, 4\), expected a lower and"),
        (lambda: ready(log_snr_range=(None, 1)), ValueError, r"log_snr_range is \(None, 1\), expected a lower and"),
        (lambda: ready(levels="12"), ValueError, "levels is '12', expected a number of levels, or finite log-SNRs"),
        (lambda: ready(reference=123), TypeError, "reference is a int, expected the path of a file, a LevelLosses"),
        (lambda: ready().draw([2**64 - 1], (1, 2)), ValueError, r"indices cannot be read \(.*expected integers \[B\]"),
        (lambda: added(ready(), [0], [1.0]), TypeError, "loss_per_sample is a list, expected a torch.Tensor"),
        (lambda: indices_of(torch.ones(3)), ValueError, r"samples have shape \(3,\), expected \(B, \.\.\.\)"),
        (lambda: ready(seed=-1), ValueError, "seed is -1, expected an integer from 0"),
        (lambda: ready().draw([0.5], (1, 2)), TypeError, "indices have dtype torch.float32, expected integers"),
        (lambda: ready().draw([-3], (1, 2)), ValueError, "indices have -3, expected 0 or more"),
        (lambda: ready().draw([[1]], (1, 2)), ValueError, r"indices have shape \(1, 1\), expected \(B,\)"),
        (lambda: ready().draw([1, 2], (3, 8)), ValueError, r"shape is \(3, 8\), expected \(2, \.\.\.\)"),
        (lambda: added(ready(), [0, 1], torch.ones(2, 3)), ValueError, r"loss_per_sample has shape \(2, 3\), expected"),
        (lambda: added(ready(), [0, 1], torch.ones(())), ValueError, r"loss_per_sample has shape \(\), expected"),
        (lambda: added(ready(), [0], log_snr=torch.zeros(1)), ValueError, r"log_snr of index 0 is 0, .*for_process"),
        (lambda: added(ready(), [0], log_snr=torch.zeros(2)), ValueError, r"log_snr has shape \(2,\), expected \(1,\)"),
        (lambda: added(ready(), [0], log_snr=torch.tensor([5])), TypeError, "log_snr has dtype torch.int64"),
        (lambda: ready().result(), ValueError, "no losses were added since the last result: call add"),
        (lambda: added(ready(), [0]).result(), ValueError, r"1 losses were added, but none at log-SNR -?6"),
        (
            lambda: added(added(ready(), [0, 1]), [1, 2], 2.0 * torch.ones(2)).result(),
            ValueError,
            r"index 1 was added twice, with the losses 1 and 2\. .*validation.indexed\(dataset\)",
        ),
        (lambda: added(ready(), [0, 1]).result().mean_log_ratio(), ValueError, "reference is None, expected a result"),
        (lambda: ready().indexed(iter([1])), TypeError, "dataset is a .*iterator, expected one with a length"),
        (lambda: LevelValidation.for_process("ddpm"), ValueError, "process is 'ddpm', expected one of edm, flow"),
        (lambda: LevelValidation.for_process(object()), TypeError, "process is a object, expected a name"),
        (lambda: LevelValidation.for_process(DiscreteVP.linear(10), 20), ValueError, "20 from .* only 9 different"),
        (
            lambda: LevelValidation.for_process(DiscreteVP.linear(), log_snr_range=(-20.0, 8.0)),
            ValueError,
            r"log_snr runs from -20 to 8, expected -10.12 to 9.21",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_validated_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_padded_samples_count_once() -> None:
    result = added(added(ready(), [0, 1]), [1, 0], torch.tensor([1.001, 1.0])).result()
    assert result.samples.tolist() == [1, 1]
    assert added(added(ready(), [0, 1], torch.zeros(2)), [0, 1], torch.full((2,), 1e-9)).result().loss.max() < 1e-8


def test_a_pass_that_was_broken_off_is_forgotten() -> None:
    validation = added(ready(), [0, 1], 5.0 * torch.ones(2))
    validation.reset()
    assert added(validation, [0, 1]).result().loss.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_snr_range": (-6.0, 5.0)}, "the reference has log-SNR -6, 6, expected -6, 5: the same levels"),
        ({"seed": 1}, "the reference was drawn with one level per sample, seed 0, expected .*seed 1"),
        ({"noise": lambda samples, shape: torch.zeros(shape)}, "expected one level per sample, .*noise of <lambda>"),
    ],
)
def test_reference_of_other_levels_or_noise_is_refused_at_once(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "reference.csv"
    result = added(ready(reference=file), range(4)).result()
    with pytest.raises(ValueError, match=rf"{message}.* Remove .*reference.csv to begin anew"):
        ready(reference=file, **options)
    with pytest.raises(ValueError, match=message):
        ready(reference=result, **options)


@pytest.mark.parametrize("content", [b"step,loss\n1,2\n", bytes(range(256))])
def test_reference_file_that_is_no_result_is_refused_at_once(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "reference.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"reference.csv is not the result of a validation, expected CSV with"):
        ready(reference=tmp_path / "reference.csv")


@pytest.mark.parametrize(
    ("indices", "shape", "message"),
    [
        (range(6), (1,), "measured on 4 samples of shape 1, .* expected 6 samples of shape 1, .*the same held-out set"),
        (range(10, 14), (1,), "with indices of hash .* expected 4 samples of shape 1, with indices of hash"),
        (range(4), (3, 2), "measured on 4 samples of shape 1, .* expected 4 samples of shape 3x2, "),
    ],
)
def test_other_samples_than_the_references_warn_and_have_no_ratio(
    indices: Sequence[int], shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "reference.csv"
    added(ready(reference=file), range(4)).result()
    before, seen = file.read_bytes(), []
    resumed = added(ready(reference=file), indices, shape=shape)
    with pytest.warns(UserWarning, match=rf"{message}.* Remove .*reference.csv to begin anew"):
        result = resumed.result()
    result.log_to(lambda values, step: seen.extend(values), 1)
    assert seen == [f"vadiff/validation/{name}" for name in ("loss/log_snr_-6", "loss/log_snr_6", "non_finite")]
    assert added(resumed, range(4)).result().mean_log_ratio() == 0.0
    assert file.read_bytes() == before


@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0])
def test_result_without_a_logarithm_is_no_reference(bad: float, tmp_path: Path) -> None:
    validation = ready(every_level=True, reference=tmp_path / "reference.csv")
    with pytest.warns(UserWarning, match=r"not taken as reference, as the loss at log-SNR 6 is .*, expected positive"):
        first = added(validation, range(4), torch.tensor([1.0, bad, 1.0, bad])).result()
    assert first.reference is None
    assert not (tmp_path / "reference.csv").exists()
    assert added(validation, range(4)).result().mean_log_ratio() == 0.0
    with pytest.raises(ValueError, match=r"the loss at log-SNR 6 is .*, expected positive, finite losses"):
        ready(every_level=True, reference=first)


def test_reference_that_cannot_be_written_warns_and_serves_until_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    validation = added(ready(reference=tmp_path / "file" / "reference.csv"), range(4))
    with pytest.warns(UserWarning, match=r"reference.csv cannot be written \(.*Later results are compared with this"):
        assert validation.result().mean_log_ratio() == 0.0
    assert added(validation, range(4), torch.full((4,), math.e)).result().mean_log_ratio() == pytest.approx(1.0)


def test_part_of_the_held_out_set_is_kept_from_becoming_the_reference(tmp_path: Path) -> None:
    validation = added(ready(reference=tmp_path / "reference.csv"), range(2))
    assert validation.result(save_reference=False).reference is None
    assert list(tmp_path.iterdir()) == []
    assert added(validation, range(4)).result().mean_log_ratio() == 0.0


def test_batch_without_samples_is_a_ranks_share_of_a_small_set() -> None:
    validation = ready()
    both: tuple[Any, ...] = (torch.empty(0, dtype=torch.int64), [])
    for nothing in both:
        log_snr, noise = validation.draw(nothing, (0, 3, 2))
        assert (log_snr.shape, noise.shape) == ((0,), (0, 3, 2))
        validation.add(nothing, log_snr, torch.empty(0))
    assert added(validation, range(4), shape=(3, 2)).result().samples.tolist() == [2, 2]


def test_levels_of_numpy_are_levels() -> None:
    validation = LevelValidation(np.int64(3), log_snr_range=(np.float32(-1), 1), seed=np.int64(2))
    assert validation.log_snr.tolist() == [-1.0, 0.0, 1.0]
    assert validation.seed == 2


def test_rounding_of_bfloat16_is_no_other_level_but_a_close_neighbour_is() -> None:
    coarse = LevelValidation([-20.0, 19.93])
    added(coarse, range(8), log_snr=coarse.draw(range(8), (8, 1))[0].bfloat16())
    close = LevelValidation([0.0, 0.01, 0.02])
    log_snr, _ = close.draw(range(9), (9, 1))
    close.add(range(9), log_snr, torch.ones(9))
    with pytest.raises(ValueError, match="log_snr of index"):
        close.add(range(9), log_snr.roll(1), torch.ones(9))
