"""EDM2's presets for ImageNet, and what `vadiff train` says of a run's size before it starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from vadiff.trainer.cli import main
from vadiff.trainer.training.optimisation import learning_rate_at
from vadiff.trainer.training.size import cost_in_words, describe, network_size
from vadiff.training import PRESETS, TrainConfig, open_run, train

# Of the paper, table 2, in millions.
PAPER = {"xs": 125, "s": 280, "m": 498, "l": 777, "xl": 1119, "xxl": 1523}
SIZED = [name for name in PRESETS if name.startswith("img")]
MI = 2**20
TINY = TrainConfig(model="edm2", channels=(8, 16), steps=2, batch_size=8, tensorboard=False, device="cpu")


@pytest.mark.parametrize("name", SIZED)
def test_every_size_has_the_parameters_of_the_paper(name: str) -> None:
    config = PRESETS[name]
    size = network_size(config, config.image_shape, 1000)
    assert round(size.parameters / 1e6) == PAPER[name.rpartition("-")[2]]


def test_there_are_the_sizes_of_the_paper_for_pixels_and_latents() -> None:
    assert [f"img64-{size}" for size in ("xs", "s", "m", "l", "xl")] + [f"img512-latent-{n}" for n in PAPER] == SIZED
    for name in SIZED:
        config, pixels = PRESETS[name], name.startswith("img64")
        assert config.dataset == ("images" if pixels else "latents")
        assert config.image_shape == ((3, 64, 64) if pixels else (4, 64, 64))


@pytest.mark.parametrize(
    ("name", "rate", "dropout", "millions"),
    [
        ("img64-xs", 0.012, 0.0, 1024), ("img64-s", 0.01, 0.0, 1024), ("img64-m", 0.009, 0.1, 2048),
        ("img64-l", 0.008, 0.1, 1024), ("img64-xl", 0.007, 0.1, 640),
        ("img512-latent-xs", 0.012, 0.0, 2048), ("img512-latent-s", 0.01, 0.0, 2048),
        ("img512-latent-m", 0.009, 0.1, 2048), ("img512-latent-l", 0.008, 0.1, 1792),
        ("img512-latent-xl", 0.007, 0.1, 1280), ("img512-latent-xxl", 0.0065, 0.1, 896),
    ],
)  # fmt: skip
def test_presets_train_as_the_paper_does(name: str, rate: float, dropout: float, millions: int) -> None:
    config = PRESETS[name]
    assert (config.batch_size, config.betas, config.label_dropout) == (2048, (0.9, 0.99), 0.0)
    assert (config.dropout, config.steps * config.batch_size) == (dropout, millions * MI)
    assert (config.sigma_rel, config.snapshot_every * config.batch_size) == ((0.05, 0.10), 8 * MI)
    assert (config.p_mean, config.p_std) == ((-0.8, 1.6) if name.startswith("img64") else (-0.4, 1.0))
    decay = 35_000 if name.startswith("img64") else 70_000
    ramp = 10_000_000 / 2048  # in steps
    assert learning_rate_at(config, 0) == 0
    assert learning_rate_at(config, 1000) == pytest.approx(rate * 1000 / ramp, rel=1e-4)
    assert learning_rate_at(config, decay) == pytest.approx(rate)
    assert learning_rate_at(config, 4 * decay) == pytest.approx(rate / 2)


def test_operations_of_a_small_network_are_those_counted_by_hand() -> None:
    """Multiplies and adds of all layers on 4 × 4 pixels: one block down, two in the middle, two up."""
    width, pixels = 8, 16
    config = dataclasses.replace(
        TINY, channels=(width,), layers_per_block=1, dataset="images", image_size=4, attention_resolutions=()
    )
    convolutions = (
        (3 + 1) * width * 9  # the first, of the image and ones
        + width * 3 * 9  # the last
        + 3 * 2 * width**2 * 9  # blocks down and in the middle, two convolutions each
        + 2 * (2 * width * width * 9 + width**2 * 9 + 2 * width * width)  # up, from twice the width
        + 4 * width**2  # attention in the middle: queries, keys, values, output
    )
    attention = 2 * pixels * pixels * width
    linear = width * width + 5 * width * width  # noise level, and its effect on each block
    size = network_size(config, config.image_shape, 0)
    assert size.flops == 2 * (pixels * convolutions + attention + linear)
    assert size.parameters == convolutions + linear + 5 + 1  # and the gains


@pytest.mark.parametrize("model", ["edm2", "unet"])
def test_size_needs_no_memory_and_leaves_the_random_state(model: str) -> None:
    if model == "unet":
        pytest.importorskip("diffusers", reason="the model unet is diffusers' U-Net: pip install diffusers")
    before = torch.get_rng_state()
    config = dataclasses.replace(TINY, model=model, channels=(8, 16), class_conditional=True)
    size = network_size(config, (1, 8, 8), 10)
    assert torch.equal(before, torch.get_rng_state())
    assert size.parameters > 1000
    assert size.flops > 1e6
    assert size == network_size(dataclasses.replace(config, gradient_checkpointing=True), (1, 8, 8), 10)


def test_description_counts_what_is_kept_and_written() -> None:
    config = PRESETS["img512-latent-xs"]
    text = cost_in_words(config, network_size(config, config.image_shape, 1000))
    assert "Network: edm2, 124.7 million parameters, 89.9 GFLOPs per image" in text
    assert "Training: 1,048,576 steps of 2,048 images, 2,147.5 million images (2,147,484 kimg), 5.8e+20 FLOPs" in text
    assert "weights 475.7 MiB, gradients 475.7 MiB, optimiser 951.5 MiB" in text
    assert "Snapshots of the averages: 256 of 475.7 MiB, 118.9 GiB in all" in text  # the paper: 118 to 635 GB
    longer = dataclasses.replace(config, gradient_checkpointing=True, accumulate=4, sigma_rel=())
    text = cost_in_words(longer, network_size(longer, longer.image_shape, 1000))
    assert "2,048 images in 4 parts" in text
    assert "7.7e+20 FLOPs with a backward pass of two forward passes and with the blocks computed twice" in text
    assert "Snapshots" not in text


def test_train_describe_prints_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "--preset", "img64-s", "--describe", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Classes: 1,000, as ImageNet has; with --data those of the data" in printed
    assert "280.2 million parameters" in printed
    assert not out.exists()


def test_description_takes_the_classes_of_the_data(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pictures are read with Pillow: pip install Pillow")
    for place in range(12):
        folder = tmp_path / f"class-{place % 3}"
        folder.mkdir(exist_ok=True)
        image.new("RGB", (8, 8), (place, 0, 0)).save(folder / f"{place}.png")
    config = dataclasses.replace(
        TINY, dataset="images", data=str(tmp_path), image_size=8, class_conditional=True, attention_resolutions=()
    )
    lines = describe(config).splitlines()
    assert f"{network_size(config, (3, 8, 8), 3).parameters:,} parameters" in lines[0]


def test_training_says_the_size_first(capsys: pytest.CaptureFixture[str]) -> None:
    train(TINY)
    size = network_size(TINY, (1, 8, 8), 10)
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith(f"Network: edm2, {size.parameters:,} parameters, {size.flops / 1e9:.4g} GFLOPs per image")
    train(TINY, progress=False)
    assert capsys.readouterr().err == ""


def test_checkpointed_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        config = dataclasses.replace(TINY, dropout=0.2, gradient_checkpointing=checkpointing, accumulate=2)
        train(config, out=tmp_path / name, progress=False)
    one, other = (open_run(tmp_path / name).denoiser("raw").state_dict() for name in ("plain", "checkpointed"))
    assert all(torch.equal(one[key], other[key]) for key in one)
