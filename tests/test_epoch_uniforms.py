"""vadiff.levels.epoch: uniform numbers stratified over each batch and over an epoch."""

from __future__ import annotations

import pytest
import torch

from vadiff.levels import EpochUniforms, uniforms


def test_each_batch_and_each_epoch_fills_its_strata_once() -> None:
    draw = EpochUniforms(batch_size=6, batches=5, seed=3)
    for epoch in range(3):
        batches = [draw(5 * epoch + batch) for batch in range(5)]
        for u in batches:
            assert (u * 6).floor().sort().values.tolist() == list(range(6))
        assert (torch.cat(batches) * 30).floor().sort().values.tolist() == list(range(30))


def test_numbers_are_a_function_of_seed_and_step_alone() -> None:
    draw, steps = EpochUniforms(8, 4, seed=1), [9, 0, 3, 11, 4]
    first = [draw(step) for step in steps]
    for step, u in zip(steps, first, strict=True):
        assert torch.equal(EpochUniforms(8, 4, seed=1)(step), u)
        assert not torch.equal(EpochUniforms(8, 4, seed=2)(step), u)


def test_epochs_and_batches_differ_and_the_order_inside_a_batch_is_random() -> None:
    draw = EpochUniforms(64, 3, seed=0)
    assert len(torch.cat([draw(step) for step in range(9)]).unique()) == 9 * 64
    for part in draw(0).chunk(2):  # each rank sees all noise levels
        assert part.min() < 0.25
        assert part.max() > 0.75


def test_each_number_is_uniform_over_seeds() -> None:
    drawn = torch.stack([EpochUniforms(2, 2, seed)(1) for seed in range(2000)])
    for place in range(2):
        counts = torch.histc(drawn[:, place], 8, 0.0, 1.0)
        assert ((counts - 250.0).abs() < 4.0 * 250.0**0.5).all()


def test_mean_over_an_epoch_varies_less_than_with_batches_stratified_on_their_own() -> None:
    generator = torch.Generator().manual_seed(0)

    def spread(means: list[torch.Tensor]) -> float:
        return torch.stack(means).std().item()

    own = [
        torch.stack([uniforms(4, generator, stratified=True) for _ in range(16)]).square().mean() for _ in range(200)
    ]
    whole = []
    for seed in range(200):
        draw = EpochUniforms(4, 16, seed)
        whole.append(torch.stack([draw(step) for step in range(16)]).square().mean())
    assert spread(whole) < 0.3 * spread(own)


def test_one_sample_and_one_batch_are_the_limits() -> None:
    assert EpochUniforms(1, 1, 0)(5).shape == (1,)
    u = EpochUniforms(1, 7, 0)
    assert (torch.cat([u(step) for step in range(7)]) * 7).floor().sort().values.tolist() == list(range(7))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 0), "batch_size is 0, expected an integer of at least 1"),
        ((1, 2.0, 0), "batches is 2.0, expected an integer of at least 1"),
        ((1, 1, -1), "seed is -1, expected an integer of at least 0"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochUniforms(*arguments)


def test_a_negative_step_is_named() -> None:
    with pytest.raises(ValueError, match="step is -1, expected an integer of at least 0"):
        EpochUniforms(1, 1, 0)(-1)
