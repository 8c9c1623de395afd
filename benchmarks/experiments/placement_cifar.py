"""The EDM part of placement.py on CIFAR-10 at 16 × 16: does it pay to move levels where the default was tuned?

All as there, and fixed before the first run, except: CIFAR-10's training images, averaged over 2 × 2 pixels; sigma_data
their standard deviation; a U-Net of 0.64 million weights, 700 steps of 64 images; seeds 0 to 2, of which 0 chooses the
best mean of the grid and 1 and 2 score it, so that there are no intervals; figure A on 500 test images; figure B, ln of
the Fréchet distance in 768 Inception features of 500 samples to 1,000 training images, one set of sampling seeds.

    python benchmarks/experiments/placement_cifar.py --cifar FOLDER --inception-weights FILE --work FOLDER [--jobs 2]

It writes benchmarks/results/placement_cifar.json.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from placement import CALLS, HELD_OUT, Task, experiment, parser_of
from torch import Tensor, nn

from vadiff.log_snr import from_sigma
from vadiff.models import Denoiser, unet
from vadiff.pixels import normalised, pixels
from vadiff.sampling import dpmpp_2m, noise_levels
from vadiff.trainer.data import cifar
from vadiff.trainer.evaluation.fidelity import image_metrics
from vadiff.trainer.training.held_out import held_out_loss, level_mean

SEEDS = range(3)
SAMPLES, REFERENCES, HELD_OUT_IMAGES = 500, 1000, 500


@functools.cache
def small_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Training and held-out images of CIFAR-10, averaged over 2 × 2 pixels. [N, 3, 16, 16] in [-1, 1] each."""
    images = cifar.load("cifar10", folder)
    train, held_out = (F.avg_pool2d(normalised(part), 2) for part in (images.train, images.held_out))
    return train, held_out


@dataclass(frozen=True)
class CifarTask(Task):
    """EDM's objective on these images."""

    folder: Path = Path()
    weights: Path = Path()  # of the Inception network

    batch = 64

    @property
    def sigma_data(self) -> float:
        return round(float(self.images().std()), 3)

    def images(self) -> Tensor:
        return small_images(self.folder)[0]

    def network(self) -> nn.Module:
        return unet((3, 16, 16), (32, 64))

    def figures(self, denoiser: Denoiser, seed: int) -> dict[str, Any]:
        train, held_out = small_images(self.folder)
        measured = held_out_loss(
            denoiser, held_out[:HELD_OUT_IMAGES], log_snr_levels=from_sigma(HELD_OUT).tolist(), batch_size=250
        )
        mean = level_mean(measured.mean, measured.log_snr, sigma_data=denoiser.sigma_data)
        drawn = dpmpp_2m(denoiser, (3, 16, 16), range(SAMPLES), levels=noise_levels(CALLS), batch_size=250)
        found = image_metrics(
            pixels(drawn), pixels(train[:REFERENCES]), metrics=("fid",), layer="768", inception_weights=self.weights,
            progress=False,
        )  # fmt: skip
        distance = found["fid-768"]
        return {
            "A": float(mean.log()),
            "B": math.log(distance),
            "loss": measured.mean.tolist(),
            "distances": [distance],
        }


if __name__ == "__main__":
    parser = parser_of(__doc__ or "", "placement_cifar")
    parser.add_argument("--cifar", type=Path, required=True, help="folder with CIFAR-10, as for `vadiff train --data`")
    parser.add_argument("--inception-weights", type=Path, required=True, help="torch-fidelity's Inception weights")
    options = parser.parse_args()
    task = CifarTask(
        "EDM, CIFAR-10 at 16 × 16", "edm", 1.0, (-1.2, 1.2), 1.2, options.cifar, options.inception_weights
    )  # fmt: skip
    experiment("placement_cifar", (task,), options, SEEDS, choosing=(0,), grid_seeds=(0,))
