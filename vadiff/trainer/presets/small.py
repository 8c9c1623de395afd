"""Ready-made configs for digits, CIFAR and images of your own."""

import dataclasses
import math

from ..config import TrainConfig

# The protocol of "Variance-Aware Adaptive Weighting for Diffusion Model Training" (arXiv 2603.10391), as its authors
# coded it: EDM preconditioning, unconditional, no flips, learning rate and EMA without warm-up. Their network is their
# own U-Net with the same channels and attention in the encoder only; here it is diffusers'.
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
    graph=True,  # on a CUDA device, with a compiled network
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
    compile=False,  # compiling takes as long as this run
)

# EDM v1's class-conditional CIFAR-10 (arXiv 2206.00364): DDPM++'s widths and depth, learning rate with a
# ramp of 10 million images, EMA with a half-life of half a million. Its augmentation is a flag, --augment 0.12; without
# it there are flips. The network is diffusers', 59 million parameters.
_EDM = dataclasses.replace(
    _PAPER,
    weighting="constant",
    flips=True,
    class_conditional=True,
    label_dropout=0.0,
    channels=(256, 256, 256),
    layers_per_block=4,
    attention_resolutions=(16,),
    dropout=0.13,
    steps=390_625,
    batch_size=512,
    optimizer="adam",
    learning_rate=1e-3,
    betas=(0.9, 0.999),
    warmup=19_531,
    warmup_from_zero=True,
    clip=math.inf,
    ema_decay=0.5 ** (512 / 500_000),
    ema_rampup=0.05,
    held_out_every=20_000,
    checkpoint_every=5000,
    samples_every=20_000,
)

# EDM2's config G and training (arXiv 2312.02696) at the size of the network above, 57 million
# parameters. The paper has no CIFAR-10: its learning rate falls after 35,000 steps of 2,048 images and training goes
# on for 10 to 30 times that; here both and the ramp are shorter by the same factor. Dropout is EDM v1's.
_EDM2 = dataclasses.replace(
    _EDM,
    model="edm2",
    weighting="learned",
    attention_resolutions=(16, 8),
    steps=100_000,
    learning_rate=1e-2,
    betas=(0.9, 0.99),
    warmup=5000,
    schedule="inverse_sqrt",
    schedule_steps=10_000,
    precision="bf16",
    sigma_rel=(0.05, 0.10),
    snapshot_every=1500,
)

# DDPM on CIFAR-10 (arXiv 2006.11239, appendix B): linear betas, uniform timesteps, the simple objective of eps, 35.7
# million parameters, attention at 16 × 16.
_DDPM = dataclasses.replace(
    _PAPER,
    process="vp_linear",
    weighting="constant",
    flips=True,
    channels=(128, 256, 256, 256),
    layers_per_block=2,
    attention_resolutions=(16,),
    dropout=0.1,
    steps=800_000,
    batch_size=128,
    optimizer="adam",
    learning_rate=2e-4,
    warmup=5000,
    clip=1.0,
    ema_decay=0.9999,
    held_out_every=20_000,
    held_out_images=100,  # a trial of some steps on a CPU measures and draws once, in minutes
    checkpoint_every=5000,
    samples_every=20_000,
    sample_count=16,
)

# Min-SNR-gamma (arXiv 2303.09556) as its paper states it, on the cosine schedule, for x0; --prediction epsilon and
# v_prediction are its other two. Its networks are vision transformers on ImageNet and U-Nets on CelebA: here it is
# DDPM's for CIFAR-10.
_MIN_SNR = dataclasses.replace(
    _DDPM, process="vp_cosine", prediction="sample", weighting="min_snr", weighting_options={"gamma": 5.0}
)

PRESETS = {
    "digits": TrainConfig(),
    "digits-edm2": TrainConfig(
        model="edm2",
        weighting="learned",
        learning_rate=4e-2,  # at the paper's 1e-2 the weights rotate too little in a run this short
        schedule="inverse_sqrt",
        schedule_steps=100,
        sigma_rel=(0.05, 0.10),
        snapshot_every=10,
        log_rms=True,
    ),
    "cifar10": _CIFAR10,
    "cifar10-mini": _CIFAR10_MINI,
    "cifar10-paper": _PAPER,
    "cifar100-paper": dataclasses.replace(_PAPER, dataset="cifar100"),
    "cifar10-ddpm": _DDPM,
    "cifar10-min-snr": _MIN_SNR,
    "cifar10-edm": _EDM,
    "cifar10-edm2": _EDM2,
    # Attention at 16 only: images of 32 and of 64 pixels both have this resolution.
    "images": dataclasses.replace(_CIFAR10, dataset="images", class_conditional=False, attention_resolutions=(16,)),
}

ABOUT = {
    "digits": "a small U-Net on scikit-learn's handwritten digits, 8 x 8 pixels, in a minute on a CPU",
    "digits-edm2": "digits with EDM2's network, schedule, learned weighting and averages of the weights",
    "cifar10": "class-conditional CIFAR-10 with flips and dropout",
    "cifar10-mini": "a small U-Net on CIFAR-10, half a minute on a data-centre GPU",
    "cifar10-paper": "CIFAR-10 by the protocol of arXiv 2603.10391, with its weighting",
    "cifar100-paper": "CIFAR-100 by the same protocol",
    "cifar10-ddpm": "DDPM on CIFAR-10: epsilon, linear betas, uniform timesteps",
    "cifar10-min-snr": "Min-SNR on the cosine schedule, x0; or --prediction epsilon, v_prediction",
    "cifar10-edm": "class-conditional CIFAR-10 as EDM v1 trained it, with flips for augmentation",
    "cifar10-edm2": "EDM2's network, schedule, learned weighting and averages, at the size of cifar10-edm",
    "images": "a folder of your own images: --data FOLDER",
}
