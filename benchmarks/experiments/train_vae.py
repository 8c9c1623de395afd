"""A small autoencoder for CIFAR-10, of ten minutes on two CPU cores: 32 × 32 × 3 pixels to 8 × 8 × 4 latents.

diffusers' AutoencoderKL with 32, 64 and 64 channels, trained in bfloat16 (autocast). The loss of an image is

    mean over pixels of (decoded − image)² + kl_weight · KL(q(z | image) ‖ N(0, 1)) / number of pixel values

with images in [-1, 1] and z drawn from q. That is the variational bound of a Gaussian decoder with variance
kl_weight / 2 (Kingma and Welling, arXiv 1312.6114): at 1e-3, a standard deviation of 0.022. The KL only keeps the
latents' scale and smoothness; it is no prior to draw from, the diffusion network is.

Adam at 1.5e-3 with a warm-up of a tenth of the time, then cosine to zero; mirrored images; gradients clipped at norm 1.
The schedule is in time, so that the run ends when it is due on a machine of any speed.

    python benchmarks/experiments/train_vae.py --data CIFAR --out FOLDER [--minutes 10] [--threads 2]

FOLDER is what `vadiff encode --vae FOLDER` reads. It also gets error.json: error of the images that were not trained
on (the test part, or the last 5,000 where the test part is missing), decoded from the mean of q.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.nn import functional

from vadiff.files import replacing
from vadiff.pixels import normalised
from vadiff.trainer.data.cifar import load

BATCH = 32
RATE = 1.5e-3
KL_WEIGHT = 1e-3


def autoencoder() -> Any:
    """diffusers' AutoencoderKL with two halvings, four latent channels and 0.9 million parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=4,
        sample_size=32,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def train(vae: Any, images: Tensor, minutes: float, generator: torch.Generator) -> int:
    """Train on uint8 images [N, 3, 32, 32] for so many minutes; returns the number of steps."""
    optimizer = torch.optim.Adam(vae.parameters(), lr=RATE, betas=(0.9, 0.99))
    started = time.monotonic()
    steps = 0
    while (done := (time.monotonic() - started) / (60.0 * minutes)) < 1.0:
        rate = RATE * min(10.0 * done, 0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        mirrored = torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5
        batch = normalised(images[chosen])
        batch = torch.where(mirrored, batch.flip(-1), batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            moments = vae.encode(batch).latent_dist.parameters
            posterior = DiagonalGaussianDistribution(moments.float())
            decoded = vae.decode(posterior.sample(generator)).sample
        error = functional.mse_loss(decoded.float(), batch)
        divergence = posterior.kl().mean() / batch[0].numel()
        optimizer.zero_grad()
        (error + KL_WEIGHT * divergence).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if steps % 200 == 0:
            print(f"step {steps:5d}  {100 * done:5.1f} %  rmse {math.sqrt(error.item()):.4f}", flush=True)
        steps += 1
    return steps


@torch.no_grad()
def error_of(vae: Any, images: Tensor) -> dict[str, float]:
    """Root mean squared error in [-1, 1], and PSNR in dB, of uint8 images decoded from the mean of their latents."""
    squares = 0.0
    for batch in images.split(500):
        x0 = normalised(batch)
        decoded = vae.decode(vae.encode(x0).latent_dist.mean).sample.clamp(-1.0, 1.0)
        squares += (decoded - x0).double().square().sum().item()
    mean = squares / images.numel()
    return {"rmse": math.sqrt(mean), "psnr_db": 10.0 * math.log10(4.0 / mean)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small AutoencoderKL on CIFAR-10")
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10: folder or official archive")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, for from_pretrained")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images = load("cifar10", args.data)
    vae = autoencoder()
    steps = train(vae, images.train, args.minutes, torch.Generator().manual_seed(args.seed))
    error = error_of(vae, images.held_out) | {
        "images": len(images.held_out),
        "test_part": images.held_out_is_test,
        "steps": steps,
        "minutes": args.minutes,
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
    }
    with replacing(args.out) as folder:
        vae.save_pretrained(folder)
        (folder / "error.json").write_text(json.dumps(error, indent=2) + "\n")
    print(json.dumps(error, indent=2))


if __name__ == "__main__":
    main()
