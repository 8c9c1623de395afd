"""What a run costs, known before its first step: parameters, floating-point operations, memory and files."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...ema import PRECISIONS
from ..config import TrainConfig
from .assembly import build_denoiser
from .data_set import load_images

_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100}
_IMAGENET = 1000  # classes, of data sets that are not there yet
_FLOAT32 = 4  # bytes
_PER_STEP = 3  # forward and backward pass, in forward passes: the backward pass has two products for each of forward


class NetworkSize(NamedTuple):
    """Size of a network.

    Attributes:
        parameters: how many are trained.
        flops: floating-point operations of the forward pass of one image: those of convolutions, linear layers and
            attention, a multiply and an add counted as two.
    """

    parameters: int
    flops: int


def network_size(config: TrainConfig, image_shape: tuple[int, int, int], classes: int) -> NetworkSize:
    """The size of a config's network, which is made without memory for its weights.

    torch's global random state stays as it is.

    Args:
        config: of the run.
        image_shape: (C, H, W).
        classes: number of classes of the data set, 0 without labels.

    Raises:
        MissingExtraError: diffusers is not installed.
        ValueError: sizes that are invalid for these images.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser = build_denoiser(config, image_shape, classes).eval()
        denoiser.network_output(torch.empty(1, *image_shape), torch.empty(1))
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    return NetworkSize(parameters, counter.get_total_flops())


def describe(config: TrainConfig) -> str:
    """Lines on the network, the steps, the memory and the files of a run, without training it.

    Images and latents are opened for the number of their classes, if the config is class-conditional and says where
    they are.

    Raises:
        DataError: they are missing, truncated or corrupt.
        MissingExtraError: diffusers is not installed.
    """
    shape, classes, assumed = config.image_shape, _CLASSES.get(config.dataset, _IMAGENET), []
    if config.class_conditional and config.dataset not in _CLASSES:
        if config.data is not None:
            images = load_images(config)
            shape, classes = images.shape, images.classes
        else:
            assumed = [f"Classes: {_IMAGENET:,}, as ImageNet has; with --data those of the data"]
    return "\n".join([*assumed, cost_in_words(config, network_size(config, shape, classes))])


def size_in_words(config: TrainConfig, size: NetworkSize) -> str:
    """One line: "Network: edm2, 280.2 million parameters, 201.6 GFLOPs per image"."""
    return (
        f"Network: {config.model}, {_millions(size.parameters)} parameters, {size.flops / 1e9:.4g} GFLOPs per image in "
        "the forward pass (a multiply and an add are two)"
    )


def cost_in_words(config: TrainConfig, size: NetworkSize) -> str:
    """Lines on the network, the steps, the memory of weights and optimiser, and the files of a run."""
    weights = _FLOAT32 * size.parameters
    widths = len(config.sigma_rel)
    images = config.steps * config.batch_size
    passes = _PER_STEP + (1 if config.gradient_checkpointing else 0)
    parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
    recomputed = " and with the blocks computed twice" if config.gradient_checkpointing else ""
    held = {"weights": 1, "gradients": 1, "optimiser": 2, "running average": 1, "power-function averages": widths}
    memory = ", ".join(f"{name} {_bytes(count * weights)}" for name, count in held.items() if count)
    kept = weights * (4 + widths)  # all of these but the gradients
    lines = [
        size_in_words(config, size),
        f"Training: {config.steps:,} steps of {config.batch_size:,} images{parts}, {_millions(images)} images "
        f"({images / 1000:,.0f} kimg), "
        f"{passes * size.flops * images:.2g} FLOPs with a backward pass of two forward passes{recomputed}",
        f"Memory in fp32: {memory}; {_bytes(sum(held.values()) * weights)} in all. Activations come on top.",
        f"Checkpoints: {_bytes(kept)} each, the last {config.keep_checkpoints} are kept",
    ]
    if widths:
        snapshot = widths * size.parameters * PRECISIONS[config.snapshot_precision].itemsize
        count = -(-config.steps // config.snapshot_every)
        lines.append(f"Snapshots of the averages: {count:,} of {_bytes(snapshot)}, {_bytes(count * snapshot)} in all")
    return "\n".join(lines)


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} million" if number >= 1e6 else f"{number:,}"


def _bytes(number: int) -> str:
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
