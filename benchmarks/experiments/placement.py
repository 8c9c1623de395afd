"""Where noise levels are placed: the default, a suggestion, levels that follow information, the best mean of a grid.

Digits of 8 × 8, a residual MLP, constant weighting, everything below fixed before the first run:

- Objectives: EDM with P_mean -1.2, P_std 1.2 on the pixels as they are, on pixels × 1/4 and on pixels × 4, sigma_data
  being their standard deviation and P_mean kept; flow with uniform times, logit-normal (0, 1), and logit-normal (0, 1)
  with a shift of 3.
- Arms: the default (for the flow these three); `levels.suggest` on the errors of one run with the default and a seed of
  its own (for the flow with the shift of 3), typed in as P_mean and P_std or as logit-normal; `levels.Information` on
  the default (the shift of 3) as base, with gate and without; and a grid of seven means of ln sigma, -2.4 to 1.2 in
  steps of 0.6, with the standard deviation of the default (of the flow 1).
- Seeds 0 to 9, paired: weights, images, u of the levels and noise are the same for all arms of a seed.
- Primary figures: A, the mean over 12 noise levels, 0.02 to 20 times the scale of the pixels, of ln(x0 loss of the 297
  held-out digits), averaged weights; B, ln of the Fréchet distance of 1,797 samples to the training digits in the
  features of the digits classifier, averaged over three sets of sampling seeds, DPM-Solver++(2M), 16 calls, EDM's
  steps.
- Regret of an arm: its figure minus that of the best mean of the grid, which is chosen by seeds 0 to 4 for each figure
  and scored on seeds 5 to 9, paired; mean and 95 % interval by Student's t. Also the difference to the default over all
  ten seeds.

    python benchmarks/experiments/placement.py --work FOLDER [--jobs 2]

Every run is a file in FOLDER, so that a stopped experiment goes on. At the end it writes
benchmarks/results/placement.json; placement_picture.py draws it and prints the tables of docs/levels.md.
placement_cifar.py is the same on CIFAR-10.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from results import write_results
from torch import Tensor, nn

import vadiff
from vadiff import levels
from vadiff.information import Profile
from vadiff.log_snr import from_sigma
from vadiff.models import Denoiser
from vadiff.pixels import pixels
from vadiff.sampling import dpmpp_2m, noise_levels
from vadiff.trainer.data import load_digits
from vadiff.trainer.evaluation.fidelity import find_network, image_metrics
from vadiff.trainer.training.held_out import held_out_loss, level_mean
from vadiff.trainer.training.objective import OBJECTIVES

STEPS, BATCH, RATE, DECAY, CLIP = 700, 256, 1e-3, 0.99, 1.0
SEEDS, CHOOSING, SUGGESTING = range(10), range(5), 100
GRID = (-2.4, -1.8, -1.2, -0.6, 0.0, 0.6, 1.2)
HELD_OUT = torch.logspace(math.log10(0.02), math.log10(20.0), 12, dtype=torch.float64)
SAMPLES, SETS, CALLS = 1797, 3, 16
SIGMA_DATA = 0.75  # of the digits, scaled to [-1, 1]


@dataclass(frozen=True)
class Task:
    """What is trained: an objective and the scale of the pixels, with the levels that are its default."""

    name: str
    process: str
    scale: float
    default: tuple[float, float]  # mean and standard deviation of ln sigma
    grid_std: float

    batch = BATCH

    @property
    def sigma_data(self) -> float:
        return SIGMA_DATA * self.scale

    def images(self) -> Tensor:
        """What is trained on, [N, C, H, W]."""
        return load_digits().train * self.scale

    def network(self) -> nn.Module:
        return Network()

    def figures(self, denoiser: Denoiser, seed: int) -> dict[str, Any]:
        """Both primary figures, and the x0 loss of each level."""
        digits = load_digits()
        log_snr = from_sigma(HELD_OUT * self.scale)
        measured = held_out_loss(denoiser, digits.held_out * self.scale, log_snr_levels=log_snr.tolist())
        mean = level_mean(measured.mean, measured.log_snr, sigma_data=self.sigma_data)
        at = noise_levels(CALLS, 0.002 * self.scale, 80.0 * self.scale)
        distances = []
        for first in range(0, SETS * SAMPLES, SAMPLES):
            drawn = dpmpp_2m(denoiser, (1, 8, 8), range(first, first + SAMPLES), levels=at, batch_size=SAMPLES)
            found = image_metrics(
                pixels(drawn / self.scale), pixels(digits.train), metrics=("fid",), features="digits", batch_size=512,
                progress=False,
            )  # fmt: skip
            distances.append(found["fd-digits"])
        return {
            "A": float(mean.log()),
            "B": math.log(sum(distances) / SETS),
            "loss": measured.mean.tolist(),
            "distances": distances,
        }


TASKS = (
    Task("EDM", "edm", 1.0, (-1.2, 1.2), 1.2),
    Task("EDM, pixels × 1/4", "edm", 0.25, (-1.2, 1.2), 1.2),
    Task("EDM, pixels × 4", "edm", 4.0, (-1.2, 1.2), 1.2),
    Task("flow", "flow", 1.0, (math.log(3.0), 1.0), 1.0),
)
FLOW_ONLY = ("uniform", "logit-normal (0, 1)")
PLACED = ("default", "suggestion", "information", "information, no gate")


class Network(nn.Module):
    """Three residual blocks of width 256 on the pixels and a Fourier embedding of c_noise."""

    def __init__(self, size: int = 64, width: int = 256, blocks: int = 3) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(0.3, 12.0, 32))
        self.first = nn.Linear(size + 64, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.last = nn.Linear(width, size)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, scaled: Tensor, c_noise: Tensor) -> Tensor:
        phase = c_noise[:, None] * self.frequencies
        hidden = self.first(torch.cat([scaled.flatten(1), phase.sin(), phase.cos()], dim=1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.last(hidden).view_as(scaled)


def sampler_of(task: Task, arm: str, suggestion: dict[str, float] | None) -> levels.LevelSampler:
    """The noise levels of an arm."""
    mean, std = task.default
    if arm == "default":
        return levels.LogNormal(mean, std)
    if arm == "uniform":
        return levels.UniformTime("flow")
    if arm == "logit-normal (0, 1)":
        return levels.LogitNormal()
    if arm == "suggestion":
        assert suggestion is not None
        return levels.LogNormal(suggestion["mean"], suggestion["std"])
    if arm.startswith("information"):
        return levels.Information(
            levels.LogNormal(mean, std), gate="no gate" not in arm, prediction_type=task.process,
            sigma_data=task.sigma_data,
        )  # fmt: skip
    return levels.LogNormal(float(arm.removeprefix("mean ")), task.grid_std)


def train(task: Task, sampler: levels.LevelSampler, seed: int) -> tuple[Denoiser, vadiff.DiffusionLoss]:
    """The averaged denoiser, and the criterion with its statistics."""
    data = task.images()
    torch.manual_seed(seed)
    denoiser = Denoiser(task.network(), task.sigma_data, image_shape=tuple(data.shape[1:]), process=task.process)
    average = copy.deepcopy(denoiser).requires_grad_(False)
    optimiser = torch.optim.AdamW(denoiser.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, STEPS)
    criterion = vadiff.DiffusionLoss("constant")
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        x0 = data[torch.randint(len(data), (task.batch,), generator=generator)]
        sigma = sampler(levels.uniforms(task.batch, generator, stratified=True)).sigma
        eps = torch.randn(x0.shape, generator=generator)
        output = denoiser.training_output(x0, eps, sigma)
        loss = OBJECTIVES[task.process](criterion, output, x0, eps, sigma, task.sigma_data, None)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), CLIP)
        optimiser.step()
        schedule.step()
        if step % 10 == 9:
            sampler.update(criterion, from_sigma(sigma))
        with torch.no_grad():
            for kept, now in zip(average.parameters(), denoiser.parameters(), strict=True):
                kept.lerp_(now, 1.0 - DECAY)
    return average.eval(), criterion


@dataclass(frozen=True)
class Job:
    """One run: its file holds what `run` returns."""

    task: Task
    arm: str
    seed: int
    folder: Path

    @property
    def path(self) -> Path:
        name = f"{self.task.name}, {self.arm}, seed {self.seed}.json"
        return self.folder / name.replace("/", "over").replace(" ", "_")

    def done(self) -> dict[str, Any] | None:
        return json.loads(self.path.read_text()) if self.path.exists() else None


def run(job: Job) -> dict[str, Any]:
    """Train, measure, and write the run's file."""
    torch.set_num_threads(1)
    source = replace(job, arm="suggestion's source", seed=SUGGESTING).done()
    sampler = sampler_of(job.task, "default" if source is None else job.arm, None if source is None else source)
    denoiser, criterion = train(job.task, sampler, job.seed)
    found: dict[str, Any] = {}
    if source is None:
        profile = Profile.of_criterion(criterion, job.task.process, sigma_data=job.task.sigma_data)
        suggested = levels.suggest(profile.log_snr, profile.x0_error, sigma_data=job.task.sigma_data)
        flow = job.task.process == "flow"
        found["mean"] = suggested.logit_mean if flow else suggested.p_mean
        found["std"] = suggested.logit_std if flow else suggested.p_std
        found["profile"] = {"log_snr": profile.log_snr.tolist(), "x0_error": profile.x0_error.tolist()}
    else:
        found |= job.task.figures(denoiser, job.seed)
        u = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
        drawn = sampler(u).sigma.log()
        found["levels"] = {"mean": float(drawn.mean()), "std": float(drawn.std())}
        if isinstance(sampler, levels.Information):
            found["levels"]["state"] = sampler.state
    partial = job.path.with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.replace(job.path)
    return found


def jobs_of(
    tasks: Sequence[Task], seeds: Sequence[int], grid_seeds: Sequence[int], folder: Path
) -> tuple[list[Job], list[Job]]:
    """The runs that suggestions are made from, and all others, the grid's last."""
    sources = [Job(task, "suggestion's source", SUGGESTING, folder) for task in tasks]
    jobs = []
    for grid in (False, True):
        for task in tasks:
            arms: tuple[str, ...] = tuple(f"mean {mean}" for mean in GRID)
            if not grid:
                arms = (*PLACED, *(FLOW_ONLY if task.process == "flow" else ()))
            jobs += [Job(task, arm, seed, folder) for seed in (grid_seeds if grid else seeds) for arm in arms]
    return sources, jobs


def winners_of(jobs: Sequence[Job], seeds: Sequence[int], choosing: Sequence[int]) -> list[Job]:
    """The runs of all seeds of each task's best mean of the grid, by either figure, over the choosing seeds."""
    found = []
    for task in dict.fromkeys(job.task for job in jobs):
        means = [f"mean {mean}" for mean in GRID]
        grid = {arm: [job for job in jobs if job.task == task and job.arm == arm] for arm in means}
        for figure in ("A", "B"):

            def score(arm: str, figure: str = figure, grid: dict[str, list[Job]] = grid) -> float:
                return sum((job.done() or {})[figure] for job in grid[arm] if job.seed in choosing)

            best = min(means, key=score)
            found += [Job(task, best, seed, jobs[0].folder) for seed in seeds]
    return list(dict.fromkeys(found))


def collected(sources: Sequence[Job], jobs: Sequence[Job]) -> dict[str, Any]:
    """Figures of every arm and seed, and the suggestions, for the result file."""
    found: dict[str, Any] = {job.task.name: {"suggestion": job.done(), "arms": {}} for job in sources}
    for job in jobs:
        done = job.done()
        assert done is not None
        arm = found[job.task.name]["arms"].setdefault(job.arm, {"A": {}, "B": {}, "levels": {}})
        for name, values in arm.items():
            values[str(job.seed)] = done[name]
    return found


def experiment(
    name: str,
    tasks: Sequence[Task],
    arguments: argparse.Namespace,
    seeds: Sequence[int] = SEEDS,
    choosing: Sequence[int] = CHOOSING,
    grid_seeds: Sequence[int] = SEEDS,
) -> None:
    """Do the runs that are missing, and write the result file.

    Of the grid, `grid_seeds` are run for every mean, and all seeds for those that are best on the choosing ones."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    sources, jobs = jobs_of(tasks, seeds, grid_seeds, arguments.work)
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:

        def do(what: str, wanted: Sequence[Job]) -> None:
            left = [job for job in wanted if job.done() is None]
            for count, _ in enumerate(pool.map(run, left), 1):
                print(f"{what}: {count} of {len(left)}", flush=True)

        do("sources", sources)
        do("runs", jobs)
        winners = winners_of(jobs, seeds, choosing)
        do("best means", winners)
    settings = {
        "steps": STEPS, "batch": tasks[0].batch, "seeds": list(seeds), "choosing": list(choosing), "grid": list(GRID)
    }  # fmt: skip
    tables = collected(sources, list(dict.fromkeys([*jobs, *winners])))
    print(write_results(name, {"settings": settings, "tasks": tables}, arguments.out))


def parser_of(description: str, name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--out", type=Path, help=f"file for the results (benchmarks/results/{name}.json)")
    return parser


if __name__ == "__main__":
    options = parser_of(__doc__ or "", "placement").parse_args()
    find_network("digits")  # trained once, before the processes ask for it
    experiment("placement", TASKS, options)
