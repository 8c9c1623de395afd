"""vadiff.validation: the same numbers whatever the loop, their errors, and what a loop may get wrong."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import join_two_ranks, leave_two_ranks
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

import vadiff
from vadiff.models import Denoiser
from vadiff.optimal_loss import OptimalLoss
from vadiff.process import DiscreteVP, loss_ratio
from vadiff.training import held_out_loss
from vadiff.validation import IndexedDataset, LevelLosses, LevelValidation, Records, indices_of, mean_log_ratio

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
    torch.multiprocessing.spawn(rank_main, (str(tmp_path),), nprocs=2)
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


def of(losses: Tensor, **options: Any) -> LevelLosses:
    """A result of every level of each sample, from losses [N, L]."""
    number, size = losses.shape
    records = Records(torch.arange(number).repeat_interleave(size), torch.arange(size).repeat(number), losses.flatten())
    return LevelLosses.of(torch.arange(size).double(), records, "a test", **options)


def test_standard_error_is_that_of_the_mean() -> None:
    random = torch.Generator().manual_seed(0)
    losses = 2.0 + 0.5 * torch.randn(
        400, 1000, dtype=torch.float64, generator=random
    )  # a thousand levels of 400 samples
    result = of(losses)
    assert result.loss.std().item() == pytest.approx(0.025, rel=0.1)
    assert result.stderr.mean().item() == pytest.approx(0.025, rel=0.01)
    assert result.stderr[0].item() == pytest.approx(np.std(losses[:, 0].numpy(), ddof=1) / 20.0)
    assert of(losses[:1]).stderr.isnan().all()


def test_standard_errors_of_ratio_and_mean_log_ratio_are_those_of_paired_samples() -> None:
    random = torch.Generator().manual_seed(0)
    found: list[tuple[float, float, float, float]] = []
    for _ in range(300):
        hardness = torch.rand(60, 1, dtype=torch.float64, generator=random).add(0.5)  # common to both runs
        noise = 1.0 + 0.1 * torch.randn(60, 1, dtype=torch.float64, generator=random)  # common to a sample's levels
        scale = torch.tensor([1.0, 30.0], dtype=torch.float64)
        one, other = of(0.9 * scale * hardness * noise), of(scale * hardness)
        ratio, error = one.ratio_to(other)
        found.append((ratio[1].item(), error[1].item(), one.mean_log_ratio(other), one.mean_log_ratio_stderr(other)))
    ratios, errors, means, mean_errors = np.array(found).T
    assert ratios.mean() == pytest.approx(0.9, abs=0.003)
    assert errors.mean() == pytest.approx(ratios.std(), rel=0.1)
    assert means.mean() == pytest.approx(math.log(0.9), abs=0.003)
    assert mean_errors.mean() == pytest.approx(means.std(), rel=0.1)


def test_mean_log_ratio_is_the_same_in_every_form_of_the_loss() -> None:
    a, b, log_snr = torch.tensor([[1.0, 2.0, 3.0], [1.5, 1.0, 4.0], [-3.0, 1.0, 5.0]], dtype=torch.float64)
    expected = np.log([1 / 1.5, 2.0, 0.75]).mean()
    for form in vadiff.process.PREDICTION_TYPES:
        k = loss_ratio(form, log_snr)
        assert mean_log_ratio(k * a, k * b).item() == pytest.approx(expected, rel=1e-9)


def test_gap_on_training_images_is_loss_minus_optimal_loss_in_x0_form() -> None:
    sigma = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    curve = OptimalLoss(
        sigma, torch.tensor([3.2, 8.0, 12.8]).double(), torch.zeros(3).double(), torch.ones(3).int(), 16, 16.0, 50
    )
    level = -2.0 * sigma.log()
    records = Records(
        torch.arange(6), torch.arange(3).repeat(2), (level.exp() * torch.tensor([0.3, 0.6, 0.9])).repeat(2)
    )
    gap = LevelLosses.of(level, records, "a test").training_gap(curve, "epsilon")
    torch.testing.assert_close(gap.optimal, torch.tensor([0.2, 0.5, 0.8]).double())
    torch.testing.assert_close(gap.gap, torch.tensor([0.1, 0.1, 0.1]).double(), rtol=1e-6, atol=0)


def test_table_has_a_line_per_level_and_the_one_number() -> None:
    losses = torch.tensor([[1.0, 40.0], [3.0, 60.0]]).double()
    lines = str(of(losses).compared_with(of(2.0 * losses))).splitlines()
    assert lines[0] == "loss by noise level (a test)"
    assert lines[2].split() == ["0.00", "1", "2", "2", "±", "1", "0.5000", "±", "0.0000"]
    assert lines[3].split()[:6] == ["1.00", "0.6065", "2", "50", "±", "10"]
    assert lines[4] == "mean over levels of ln(loss / reference): -0.6931 ± 0.0000 (-50.00%)"
    assert len(lines) == 5


def test_csv_gives_back_the_numbers_to_the_bit(tmp_path: Path) -> None:
    result = of(torch.rand(20, 3, dtype=torch.float64))
    result.save(tmp_path / "result.csv")
    assert_same(LevelLosses.load(tmp_path / "result.csv"), result)
    with (tmp_path / "result.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["sigma"]) for row in rows] == pytest.approx([1.0, math.exp(-0.5), math.exp(-1.0)])
    assert [path.name for path in tmp_path.iterdir()] == ["result.csv"]


def test_plot_draws_loss_and_reference() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    result = of(torch.rand(20, 3, dtype=torch.float64) + 1.0)
    axes = result.compared_with(result).plot()
    assert [line.get_label() for line in axes.get_lines()][-1] == "reference"
    assert axes.get_lines()[0].get_ydata().tolist() == result.loss.tolist()
    assert axes.get_yscale() == "log"
    assert result.plot(axes) is axes


def test_tracker_gets_a_number_per_level_and_the_mean_log_ratio() -> None:
    result, seen = of(torch.ones(4, 2).double()), []
    result.compared_with(of(2.0 * torch.ones(4, 2).double())).log_to(
        lambda values, step: seen.append((step, values)), 7
    )
    names = ["loss/log_snr_0", "loss/log_snr_1", "mean_log_ratio", "non_finite"]
    values = dict(zip(names, (1.0, 1.0, -math.log(2.0), 0.0), strict=True))
    assert seen == [(7, {f"vadiff/validation/{name}": value for name, value in values.items()})]
    with pytest.raises(TypeError, match=r"step is 0\.5, expected an integer"):
        result.log_to(print, 0.5)


def test_non_finite_loss_shows_in_its_level_and_is_counted(tmp_path: Path) -> None:
    validation = LevelValidation(2, log_snr_range=RANGE, every_level=True, reference=tmp_path / "reference.csv")
    losses = torch.ones(20)
    losses[3] = torch.nan
    log_snr, _ = validation.draw(range(20), (20, 1))
    validation.add(range(20), log_snr, losses)
    result = validation.result()
    assert result.loss.isnan().tolist() == [False, True]
    assert result.non_finite.tolist() == [0, 1]
    assert str(result).splitlines()[-1] == "non-finite losses: 1, at log-SNR 6"
    assert not (tmp_path / "reference.csv").exists(), "all later ratios would be NaN"


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
    validation: LevelValidation, indices: Sequence[int], loss: Any = None, log_snr: Any = None
) -> LevelValidation:
    levels, _ = validation.draw(indices, (len(indices), 1))
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


def test_a_pass_that_was_broken_off_is_forgotten() -> None:
    validation = added(ready(), [0, 1], 5.0 * torch.ones(2))
    validation.reset()
    assert added(validation, [0, 1]).result().loss.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "samples", "message"),
    [
        ({"log_snr_range": (-6.0, 5.0)}, 4, "the reference has log-SNR -6, 6, expected -6, 5: the same levels"),
        ({"seed": 1}, 4, "the reference was drawn with one level per sample, seed 0, expected .*seed 1"),
        ({}, 6, "the reference has 4 losses, expected 6"),
    ],
)
def test_reference_of_other_levels_noise_or_samples_is_refused(
    options: dict[str, Any], samples: int, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "reference.csv"
    added(ready(reference=file), range(4)).result()
    with pytest.raises(ValueError, match=rf"{message}.* Remove .*reference.csv to begin anew"):
        added(ready(reference=file, **options), range(samples)).result()


def test_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "reference.csv"
    file.write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match=r"reference.csv is not the result of a validation, expected CSV with"):
        added(ready(reference=file), range(4)).result()
    with pytest.raises(FileNotFoundError):
        LevelLosses.load(tmp_path / "missing.csv")
