"""vadiff.augmentation: each transformation against its closed form, and the trainer that tells the network of them."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vadiff.augmentation import EDMAugmentation, labels_of, transformed
from vadiff.errors import RunError
from vadiff.integrations.edm import EDMLoss
from vadiff.models import EDM2UNet, unet
from vadiff.trainer.presets import PRESETS
from vadiff.trainer.training.data_set import load_images
from vadiff.trainer.training.optimal_curve import check_curve, estimate_curve
from vadiff.training import TrainConfig, train


def parameters(**given: float) -> Tensor:
    """One image's a0 to a7, 0 where not given."""
    return torch.tensor([[given.get(f"a{number}", 0.0) for number in range(8)]])


def wave(size: int = 32, across: float = 1.5, down: float = 0.5) -> Tensor:
    """A smooth image [1, 1, size, size], and its function of places from the middle."""
    places = torch.arange(size) - (size - 1) / 2.0
    return function(places[None, :], places[:, None], size, across, down)[None, None]


def function(x: Tensor, y: Tensor, size: int = 32, across: float = 1.5, down: float = 0.5) -> Tensor:
    return torch.sin(2.0 * math.pi * (across * x + down * y) / size + 0.3)


def expected(inverse: Tensor, shift: tuple[float, float] = (0.0, 0.0), size: int = 32) -> Tensor:
    """The wave at M·(p' - t)."""
    places = torch.arange(size) - (size - 1) / 2.0
    x, y = places[None, :] - shift[0], places[:, None] - shift[1]
    return function(inverse[0, 0] * x + inverse[0, 1] * y, inverse[1, 0] * x + inverse[1, 1] * y)[None, None]


def inner(images: Tensor) -> Tensor:
    """Without the parts that come from beyond the border."""
    return images[..., 10:-10, 10:-10]


def test_images_without_a_transformation_stay_bit_by_bit() -> None:
    images = torch.randn(3, 2, 16, 12)
    assert torch.equal(transformed(images, torch.zeros(3, 8)), images)


def test_resampling_at_the_pixels_themselves_gives_them_back() -> None:
    images = torch.randn(2, 3, 16, 12)
    barely = torch.zeros(2, 8)
    barely[:, 2] = 1e-12
    torch.testing.assert_close(transformed(images, barely), images, rtol=1e-4, atol=1e-5)


def test_flips_are_exact() -> None:
    images = torch.randn(1, 3, 8, 9)
    assert torch.equal(transformed(images, parameters(a0=1)), images.flip(3))
    assert torch.equal(transformed(images, parameters(a1=1)), images.flip(2))
    assert torch.equal(transformed(images, parameters(a0=1, a1=1)), images.flip(2, 3))


@pytest.mark.parametrize(("a6", "a7"), [(1.0, 0.0), (0.0, -1.0), (0.5, 1.0)])
def test_translation_by_whole_pixels_moves_them(a6: float, a7: float) -> None:
    images = torch.randn(1, 2, 32, 32)  # 1/8 of the size is 4 pixels
    moved = transformed(images, parameters(a6=a6, a7=a7))
    rolled = images.roll((round(4 * a7), round(4 * a6)), (2, 3))
    torch.testing.assert_close(inner(moved), inner(rolled), rtol=1e-4, atol=1e-4)


def test_translation_beyond_the_border_shows_the_mirrored_image() -> None:
    moved = transformed(wave(), parameters(a6=2.0))  # 8 pixels to the right
    torch.testing.assert_close(moved[..., 1:8], wave()[..., 1:8].flip(-1), rtol=0.0, atol=0.02)


def test_rotation_is_by_minus_the_angle() -> None:
    turned = transformed(wave(), parameters(a3=math.pi / 2))
    torch.testing.assert_close(inner(turned), inner(wave().rot90(1, (2, 3))), rtol=0.0, atol=0.01)
    angle = 0.7
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    torch.testing.assert_close(
        inner(transformed(wave(), parameters(a3=angle))), inner(expected(rotation)), rtol=0.0, atol=0.01
    )


def test_scaling_enlarges_by_two_to_a_fifth() -> None:
    for a2 in (-1.0, 2.0):
        found = transformed(wave(), parameters(a2=a2))
        torch.testing.assert_close(inner(found), inner(expected(torch.eye(2) * 2 ** (-a2 / 5))), rtol=0.0, atol=0.01)


@pytest.mark.parametrize(("angle", "stretched"), [(0.0, (1, 0)), (math.pi / 2, (0, 1)), (math.pi, (1, 0))])
def test_anisotropy_stretches_along_its_angle(angle: float, stretched: tuple[int, int]) -> None:
    found = transformed(wave(), parameters(a4=angle, a5=1.5))
    factors = torch.tensor([2 ** (-0.3) if along else 2**0.3 for along in stretched])
    torch.testing.assert_close(inner(found), inner(expected(torch.diag(factors))), rtol=0.0, atol=0.01)


def test_transformations_follow_one_another_in_the_order_of_the_paper_s_table() -> None:
    a0, a1, a2, a3, a4, a5, a6, a7 = (1.0, 0.0, 0.8, 2.0, 0.6, -1.2, 0.5, -0.25)

    def rotation(angle: float) -> Tensor:
        return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])

    anisotropy = rotation(a4) @ torch.diag(torch.tensor([2 ** (0.2 * a5), 2 ** (-0.2 * a5)])) @ rotation(-a4)
    forwards = anisotropy @ rotation(-a3) * 2 ** (0.2 * a2) @ torch.diag(torch.tensor([1.0 - 2.0 * a0, 1.0]))
    found = transformed(wave(), torch.tensor([[a0, a1, a2, a3, a4, a5, a6, a7]]))
    moved = expected(forwards.inverse(), shift=(32 * a6 / 8, 32 * a7 / 8))
    torch.testing.assert_close(inner(found), inner(moved), rtol=0.0, atol=0.01)


def test_autocast_does_not_blur_what_is_transformed() -> None:
    images, drawn = torch.rand(4, 3, 32, 32), EDMAugmentation(1.0).draw(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = transformed(images, drawn)
    assert torch.equal(found, transformed(images, drawn))


def test_a_plain_image_stays_plain_under_every_transformation() -> None:
    images = torch.full((64, 1, 24, 32), 0.7)
    torch.testing.assert_close(transformed(images, EDMAugmentation(1.0).draw(64)), images)


def test_an_image_that_is_not_finite_does_not_spread_to_others() -> None:
    images = torch.rand(3, 1, 16, 16)
    images[1, 0, 4, 5] = math.nan
    found = transformed(images, EDMAugmentation(1.0).draw(3))
    assert found.isnan().flatten(1).any(1).tolist() == [False, True, False]


def test_labels_say_what_was_done() -> None:
    assert torch.equal(labels_of(torch.zeros(2, 8)), torch.zeros(2, 9))
    a = torch.tensor([[1.0, 0.0, 0.3, math.pi / 2, math.pi, 2.0, -0.4, 0.6]])
    torch.testing.assert_close(labels_of(a), torch.tensor([[1.0, 0.0, 0.3, -1.0, 1.0, -2.0, 0.0, -0.4, 0.6]]))


def test_each_transformation_has_its_probability_and_distribution() -> None:
    a = EDMAugmentation(p=0.25).draw(20_000, generator=torch.Generator().manual_seed(0))
    shares = a.ne(0.0).float().mean(0)
    expected_shares = torch.tensor([0.5, 0.125, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25])
    torch.testing.assert_close(shares, expected_shares, rtol=0.0, atol=0.015)
    done = [a[:, column][a[:, column] != 0.0] for column in range(8)]
    for column in (2, 5, 6, 7):
        assert abs(done[column].mean()) < 0.06
        assert abs(done[column].std() - 1.0) < 0.04
    for column in (3, 4):
        assert abs(done[column].std() - math.pi / math.sqrt(3.0)) < 0.06
        assert done[column].abs().max() <= math.pi
    assert torch.equal(a[:, 6] != 0.0, a[:, 7] != 0.0)
    assert EDMAugmentation(p=0.0, xflip=False).draw(100).eq(0.0).all()


def test_a_seed_gives_the_same_images() -> None:
    images = torch.randn(8, 3, 16, 16)
    one, other = (EDMAugmentation(0.5)(images, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"p is 1\.5, expected a probability"):
        EDMAugmentation(1.5)
    with pytest.raises(ValueError, match=r"images is torch\.uint8 \(1, 3, 8, 8\), expected floats"):
        transformed(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 8))
    with pytest.raises(ValueError, match="of at least 7 x 7 pixels"):
        transformed(torch.zeros(1, 3, 6, 8), torch.zeros(1, 8))


def test_edm_loss_takes_it_for_its_augment_pipe() -> None:
    seen = []

    def network(noisy: Tensor, sigma: Tensor, labels: Tensor | None, augment_labels: Tensor) -> Tensor:
        seen.append(augment_labels)
        return noisy

    loss = EDMLoss()(network, torch.randn(6, 3, 16, 16), None, EDMAugmentation(0.5))
    assert torch.as_tensor(loss).isfinite().all()
    assert seen[0].shape == (6, 9)


CONFIG = TrainConfig(
    steps=4, batch_size=16, channels=(8, 16), log_every=2, checkpoint_every=2, held_out_images=20, held_out_levels=3,
    tensorboard=False, device="cpu", backend="reference", deterministic=True, flips=True, augment=0.5, held_out_every=0,
)  # fmt: skip


@pytest.mark.parametrize("model", ["unet", "edm2"])
@pytest.mark.parametrize("class_conditional", [False, True])
def test_networks_are_told_and_nothing_is_told_in_sampling(model: str, class_conditional: bool) -> None:
    found = train(dataclasses.replace(CONFIG, model=model, class_conditional=class_conditional), progress=False)
    denoiser, noisy, sigma = found.denoiser, torch.randn(2, 1, 8, 8), torch.ones(2)
    plain = denoiser.network_output(noisy, sigma)
    told = torch.zeros(2, 9)
    as_training = denoiser.training_output(noisy, torch.zeros_like(noisy), sigma, augmentation=told)
    torch.testing.assert_close(as_training, plain)
    told[0] = 1.0
    told = denoiser.training_output(noisy, torch.zeros_like(noisy), sigma, augmentation=told)
    assert not torch.equal(told[0], as_training[0])
    torch.testing.assert_close(told[1], plain[1])


def test_accumulation_draws_the_same_images_and_a_stream_of_its_own() -> None:
    config = dataclasses.replace(CONFIG, weighting="constant")
    whole, parts = (train(dataclasses.replace(config, accumulate=n), progress=False) for n in (1, 2))
    assert whole.metrics[-1]["loss"] == pytest.approx(parts.metrics[-1]["loss"], rel=1e-4)
    never = train(dataclasses.replace(CONFIG, augment=1e-9, flips=False), progress=False)
    assert never.metrics[-1]["statistics"]["count"] == whole.metrics[-1]["statistics"]["count"]  # the same noise levels


def test_an_augmented_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, model="edm2", accumulate=2)
    never = train(config, out=tmp_path, progress=False).denoiser.state_dict()
    shutil.rmtree(tmp_path / "checkpoints" / "step-4")
    resumed = train(config, out=tmp_path, resume=True, progress=False).denoiser.state_dict()
    assert [name for name in never if not torch.equal(never[name], resumed[name])] == []
    with pytest.raises(RunError, match=r"augment was 0\.5, is 0\.0"):
        train(dataclasses.replace(config, augment=0.0), out=tmp_path, resume=True, progress=False)


def test_mirrored_images_are_data_unless_the_network_is_told() -> None:
    told, untold = CONFIG, dataclasses.replace(CONFIG, augment=0.0)
    assert (told.mirrored_data, untold.mirrored_data) == (False, True)
    images = load_images(told)
    ones = [estimate_curve(config, images, torch.device("cpu"), sigmas=[1.0]) for config in (told, untold)]
    assert ones[1].samples == 2 * ones[0].samples == 2 * len(images.train)
    check_curve(ones[0], told, images)
    with pytest.raises(RunError, match="the training images are"):
        check_curve(ones[1], told, images)


def test_networks_without_augmentation_are_as_they_were() -> None:
    for network in (EDM2UNet((1, 8, 8), (8, 16), attention_resolutions=()), unet((1, 8, 8), (8, 16), labels=3)):
        assert not [name for name, _ in network.named_parameters() if "augment" in name or "conditions" in name]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "posterior_mean"}, "expected 0 with target posterior_mean: the network is told"),
        ({"weighting": "gap"}, "expected 0 with weighting or levels from the optimal loss"),
        ({"dataset": "images", "image_size": 4}, "expected 0 for images of 4 x 4 pixels: .* at least 7 x 7"),
        ({"dataset": "latents", "flips": False, "sigma_data": 0.5}, "expected 0 with latents: a transformed"),
    ],
)
def test_what_does_not_go_with_augmentation_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_preset_of_edm_takes_the_flag() -> None:
    assert dataclasses.replace(PRESETS["cifar10-edm"], augment=0.12).augment == 0.12
