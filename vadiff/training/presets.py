"""Ready-made configs."""

import dataclasses

from .config import TrainConfig

# The protocol of "Variance-Aware Adaptive Weighting for Diffusion Model Training" (arXiv 2603.10391), as its authors
# coded it: EDM preconditioning, unconditional, no flips, learning rate and EMA without warm-up. Their network is a
# home-made U-Net of the same widths, with attention on the way down only; ours is diffusers'.
_PAPER = TrainConfig(
    dataset="cifar10",
    sigma_data=0.5,
    weighting="cauchy",
    channels=(128, 256, 512),
    layers_per_block=2,
    attention_resolutions=(16, 8),
    norm_groups=32,
    steps=60_000,
    batch_size=128,
    optimizer="adamw",
    learning_rate=2e-4,
    betas=(0.9, 0.999),
    warmup=0,
    schedule="constant",
    clip=1.0,
    ema_decay=0.9995,
    log_every=100,
    checkpoint_every=2000,
    samples_every=4000,
    held_out_every=10_000,
)

_CIFAR10 = dataclasses.replace(
    _PAPER,
    weighting="variance_aware",
    flips=True,
    class_conditional=True,
    dropout=0.1,
    batch_size=256,
    learning_rate=4e-4,
    warmup=2000,
    ema_decay=0.9998,
    steps=100_000,
    precision="bf16",
)

_CIFAR10_MINI = dataclasses.replace(
    _PAPER,
    weighting="variance_aware",
    flips=True,
    channels=(64, 128, 128),
    layers_per_block=1,
    attention_resolutions=(8,),
    steps=1200,
    batch_size=256,
    learning_rate=1e-3,
    warmup=100,
    schedule="linear",
    ema_decay=0.99,
    precision="bf16",
    log_every=50,
    checkpoint_every=1200,
    samples_every=0,
    held_out_every=0,
    held_out_images=500,
)

PRESETS = {
    "digits": TrainConfig(),
    "cifar10": _CIFAR10,
    "cifar10-mini": _CIFAR10_MINI,
    "cifar10-paper": _PAPER,
    "cifar100-paper": dataclasses.replace(_PAPER, dataset="cifar100"),
    "images": dataclasses.replace(_CIFAR10, dataset="images", class_conditional=False),
}

ABOUT = {
    "digits": "a small U-Net on scikit-learn's handwritten digits, 8 x 8 pixels, in a minute on a CPU",
    "cifar10": "class-conditional CIFAR-10 with flips and dropout",
    "cifar10-mini": "a small U-Net on CIFAR-10, half a minute on a data-centre GPU",
    "cifar10-paper": "CIFAR-10 by the protocol of arXiv 2603.10391, with its weighting",
    "cifar100-paper": "the same on CIFAR-100",
    "images": "a folder of pictures of your own: --data FOLDER",
}
