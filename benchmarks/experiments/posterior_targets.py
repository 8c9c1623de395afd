"""Do posterior-mean targets help, and where? Plain targets against the posterior mean, on five objectives.

Digits of 8 × 8, the residual MLP of placement.py, constant weighting, everything below fixed before the first run:

- Objectives: epsilon with linear betas and uniform times, v with the cosine schedule and uniform times, flow with
  uniform times, flow with logit-normal (0, 1) shifted by 3, EDM with P_mean -1.2 and P_std 1.2.
- Arms: plain targets; `targets.PosteriorMean` over 1,024 training images, the batch of 256 included, chosen anew at
  each step; over all 1,500 training images.
- Seeds 0 to 9, paired: weights, images, noise levels and noise are the same for all arms of a seed.
- Primary figures, as in placement.py: A, the mean over 12 noise levels of ln(x0 loss of the 297 held-out digits,
  against the digits themselves); B, ln of the Fréchet distance of 1,797 samples to the training digits, three sets of
  sampling seeds.
- Reported: mean and 95 % interval (Student's t, ten pairs) of an arm's figure minus that of plain targets, and the same
  for the held-out loss of each level.

    python benchmarks/experiments/posterior_targets.py --work FOLDER [--jobs 2]

Every run is a file in FOLDER, so that a stopped experiment goes on. At the end it writes
benchmarks/results/posterior_targets.json; posterior_targets_picture.py draws it and writes the table of
docs/targets.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from placement import BATCH, CLIP, DECAY, RATE, SEEDS, SIGMA_DATA, STEPS, Network, Task, parser_of
from results import write_results
from torch import Tensor, nn

import vadiff
from vadiff import levels
from vadiff.log_snr import from_sigma
from vadiff.models import Denoiser
from vadiff.models.parameterisation import parameterisation
from vadiff.targets import PosteriorMean
from vadiff.trainer.data import load_digits
from vadiff.trainer.evaluation.fidelity import find_network
from vadiff.trainer.training.objective import OBJECTIVES

ARMS = ("plain", "1,024 references", "all references")
FIGURES = Task("digits", "edm", 1.0, (-1.2, 1.2), 1.2)


@dataclass(frozen=True)
class Objective:
    """What is trained, at which noise levels."""

    name: str
    process: str
    prediction: str | None
    levels: levels.LevelSampler


OBJECTIVE = {
    objective.name: objective
    for objective in (
        Objective("epsilon, linear betas", "vp_linear", "epsilon", levels.UniformTime("vp_linear")),
        Objective("v, cosine", "vp_cosine", "v_prediction", levels.UniformTime("vp_cosine")),
        Objective("flow", "flow", None, levels.UniformTime("flow")),
        Objective("flow, shift 3", "flow", None, levels.Shift(levels.LogitNormal(), 3.0)),
        Objective("EDM", "edm", None, levels.LogNormal(-1.2, 1.2)),
    )
}


def targets_of(arm: str) -> PosteriorMean | None:
    """What an arm regresses on; None is the image itself."""
    subset = {"plain": 0, "1,024 references": 1024, "all references": None}[arm]
    return None if subset == 0 else PosteriorMean(load_digits().train, subset=subset)


def moved(
    targets: PosteriorMean | None, x0: Tensor, eps: Tensor, sigma: Tensor, index: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """x0 and eps that are regressed on. sigma may be infinite: pure noise of a variance-preserving process."""
    if targets is None:
        return x0, eps
    log_snr = from_sigma(sigma)
    alpha, noise = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
    return targets.pair(x0, eps, alpha, noise, index=index, generator=generator)


def train(objective: Objective, targets: PosteriorMean | None, seed: int) -> Denoiser:
    """The averaged denoiser."""
    data = load_digits().train
    torch.manual_seed(seed)
    form = parameterisation(objective.process, objective.prediction, sigma_data=SIGMA_DATA)
    denoiser = Denoiser(Network(), SIGMA_DATA, image_shape=(1, 8, 8), process=form)
    average = copy.deepcopy(denoiser).requires_grad_(False)
    optimiser = torch.optim.AdamW(denoiser.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, STEPS)
    criterion = vadiff.DiffusionLoss("constant")
    generator, choice = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1_000_000)
    for _ in range(STEPS):
        index = torch.randint(len(data), (BATCH,), generator=generator)
        x0 = data[index]
        sigma = objective.levels(levels.uniforms(BATCH, generator, stratified=True)).sigma
        eps = torch.randn(x0.shape, generator=generator)
        output = denoiser.training_output(x0, eps, sigma)
        x0, eps = moved(targets, x0, eps, sigma, index, choice)
        loss = OBJECTIVES[form.prediction](criterion, output, x0, eps, sigma, SIGMA_DATA, None)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), CLIP)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for kept, now in zip(average.parameters(), denoiser.parameters(), strict=True):
                kept.lerp_(now, 1.0 - DECAY)
    return average.eval()


@dataclass(frozen=True)
class Job:
    """One run: its file holds what `run` returns."""

    objective: str
    arm: str
    seed: int
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / f"{self.objective}, {self.arm}, seed {self.seed}.json".replace(" ", "_")

    def write(self, found: dict[str, Any]) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(self.path)

    def done(self) -> dict[str, Any] | None:
        return json.loads(self.path.read_text()) if self.path.exists() else None


def run(job: Job) -> None:
    """Train, measure, and write the run's file."""
    torch.set_num_threads(1)
    denoiser = train(OBJECTIVE[job.objective], targets_of(job.arm), job.seed)
    job.write(FIGURES.figures(denoiser, job.seed))


def experiment(arguments: argparse.Namespace) -> None:
    """Do the runs that are missing, and write the result file."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    jobs = [Job(name, arm, seed, arguments.work) for seed in SEEDS for name in OBJECTIVE for arm in ARMS]
    left = [job for job in jobs if job.done() is None]
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        for count, _ in enumerate(pool.map(run, left), 1):
            print(f"runs: {count} of {len(left)}", flush=True)
    found: dict[str, Any] = {name: {arm: {} for arm in ARMS} for name in OBJECTIVE}
    for job in jobs:
        done = job.done()
        assert done is not None
        assert math.isfinite(done["A"])
        found[job.objective][job.arm][str(job.seed)] = done
    settings = {"steps": STEPS, "batch": BATCH, "seeds": list(SEEDS)}
    print(write_results("posterior_targets", {"settings": settings, "objectives": found}, arguments.out))


if __name__ == "__main__":
    options = parser_of(__doc__ or "", "posterior_targets").parse_args()
    find_network("digits")  # trained once, before the processes ask for it
    experiment(options)
