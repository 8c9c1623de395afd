"""Does a network that regresses on the posterior mean of its training images learn them by heart sooner?

With all training images as references the target is what a network that knows them by heart would say; so is the
expectation of the plain target, and the question is how fast it is learned. Digits of 8 × 8, 500 training images, so
that learning by heart sets in; residual MLP of placement.py. Everything below fixed before the first run:

- Objectives: flow with uniform times; EDM with P_mean -1.2, P_std 1.2. Arms: plain targets; the posterior mean over 256
  training images, the batch of 64 included; over all 500.
- 8,000 steps, learning rate 1e-3, averaged weights with decay 0.99, seeds 0 to 2, paired.
- Measured at steps 250, 500, 1,000, 2,000, 4,000, 8,000, with the averaged weights: mean over 12 noise levels of ln(x0
  loss) on the 297 held-out digits and on 297 training digits; of 500 samples (DPM-Solver++(2M), 16 calls), the median
  distance to the nearest training image, as a share of the median over held-out digits; and the share of samples whose
  nearest training image is less than a third as far as the second nearest.
- Compared: arms at equal steps, and each at the step of its lowest held-out loss.

    python benchmarks/experiments/memorising.py --work FOLDER [--jobs 2]

Every run is a file in FOLDER, so that a stopped experiment goes on. At the end it writes
benchmarks/results/memorising.json; posterior_targets_picture.py draws it and writes the table of docs/targets.md.
"""

from __future__ import annotations

import argparse
import copy
import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from placement import CLIP, DECAY, HELD_OUT, RATE, SIGMA_DATA, Network, parser_of
from posterior_targets import OBJECTIVE, Job, moved
from results import write_results
from torch import Tensor, nn

import vadiff
from vadiff import levels
from vadiff.log_snr import from_sigma
from vadiff.models import Denoiser
from vadiff.sampling import dpmpp_2m, noise_levels
from vadiff.targets import PosteriorMean
from vadiff.trainer.data import load_digits
from vadiff.trainer.training.held_out import held_out_loss, level_mean
from vadiff.trainer.training.objective import OBJECTIVES

IMAGES, BATCH, SEEDS = 500, 64, range(3)
AT = (250, 500, 1000, 2000, 4000, 8000)
ARMS = {"plain": 0, "256 references": 256, "all references": None}
TRAINED = ("flow", "EDM")
SAMPLES, CALLS = 500, 16


def nearest(images: Tensor, to: Tensor) -> Tensor:
    """Distances of images to the two nearest of `to`, [N, 2]."""
    return torch.cdist(images.flatten(1), to.flatten(1)).topk(2, dim=1, largest=False).values


def figures(denoiser: Denoiser, train: Tensor, held_out: Tensor) -> dict[str, float]:
    """What is measured at a step."""

    def loss(images: Tensor) -> float:
        measured = held_out_loss(denoiser, images, log_snr_levels=from_sigma(HELD_OUT).tolist())
        return float(level_mean(measured.mean, measured.log_snr, sigma_data=SIGMA_DATA).log())

    drawn = dpmpp_2m(denoiser, (1, 8, 8), range(SAMPLES), levels=noise_levels(CALLS), batch_size=SAMPLES)
    first, second = nearest(drawn, train).unbind(1)
    usual = nearest(held_out, train)[:, 0].median()
    return {
        "held-out": loss(held_out),
        "training": loss(train[: len(held_out)]),
        "distance": float(first.median() / usual),
        "copies": float((first < second / 3).float().mean()),
    }


def run(job: Job) -> None:
    """Train, measure on the way, and write the run's file."""
    torch.set_num_threads(1)
    digits, objective, subset = load_digits(), OBJECTIVE[job.objective], ARMS[job.arm]
    data = digits.train[:IMAGES]
    targets = None if subset == 0 else PosteriorMean(data, subset=subset)
    torch.manual_seed(job.seed)
    denoiser = Denoiser(Network(), SIGMA_DATA, image_shape=(1, 8, 8), process=objective.process)
    average = copy.deepcopy(denoiser).requires_grad_(False).eval()
    optimiser = torch.optim.AdamW(denoiser.parameters(), lr=RATE)
    criterion = vadiff.DiffusionLoss("constant")
    generator, choice = torch.Generator().manual_seed(job.seed), torch.Generator().manual_seed(job.seed + 1_000_000)
    found: dict[str, Any] = {}
    for step in range(1, AT[-1] + 1):
        index = torch.randint(IMAGES, (BATCH,), generator=generator)
        sigma = objective.levels(levels.uniforms(BATCH, generator, stratified=True)).sigma
        x0, eps = data[index], torch.randn(BATCH, 1, 8, 8, generator=generator)
        output = denoiser.training_output(x0, eps, sigma)
        x0, eps = moved(targets, x0, eps, sigma, index, choice)
        loss = OBJECTIVES[denoiser.prediction](criterion, output, x0, eps, sigma, SIGMA_DATA, None)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), CLIP)
        optimiser.step()
        with torch.no_grad():
            for kept, now in zip(average.parameters(), denoiser.parameters(), strict=True):
                kept.lerp_(now, 1.0 - DECAY)
        if step in AT:
            found[str(step)] = figures(average, data, digits.held_out)
    job.write(found)


def experiment(arguments: argparse.Namespace) -> None:
    """Do the runs that are missing, and write the result file."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    jobs = [Job(name, arm, seed, arguments.work) for seed in SEEDS for name in TRAINED for arm in ARMS]
    left = [job for job in jobs if job.done() is None]
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        for count, _ in enumerate(pool.map(run, left), 1):
            print(f"runs: {count} of {len(left)}", flush=True)
    found: dict[str, Any] = {name: {arm: {} for arm in ARMS} for name in TRAINED}
    for job in jobs:
        done = job.done()
        assert done is not None
        assert math.isfinite(done[str(AT[-1])]["held-out"])
        found[job.objective][job.arm][str(job.seed)] = done
    settings = {"images": IMAGES, "batch": BATCH, "at": list(AT), "seeds": list(SEEDS)}
    print(write_results("memorising", {"settings": settings, "objectives": found}, arguments.out))


if __name__ == "__main__":
    experiment(parser_of(__doc__ or "", "memorising").parse_args())
