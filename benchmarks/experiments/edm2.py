"""EDM2's network against the classic one on digits: equal parameters, budget and number of learning rates tried.

Both train with the same weighting (EDM2's learned one), on the same images, noise levels and noise, each with the
schedule of its preset, and track power-function averages. The held-out images are split in half. Learning rate (five
per network, around its preset's) and width of the average are chosen on one half, with a separate seed; all reported
figures are of the other half, with other seeds.

    python benchmarks/experiments/edm2.py [--steps 450] [--seeds 3] [--jobs 2] [--runs DIR] [--out FOLDER]

Budget: 2 networks x (5 rates + 3 seeds) runs of 450 steps of 64 images, some ten minutes on two CPU cores. Writes
edm2.json and the pictures learning-curves, rates, sweep (EDM2's first seed), magnitudes (first seeds) and held-out.
Runs that are already in --runs are not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from edm2_figures import curves_figure, held_out_figure, rates_figure, save
from matplotlib.figure import Figure
from results import RESULTS, write_results

from vadiff.trainer.ablation.collect import interval
from vadiff.trainer.data import Images
from vadiff.trainer.report.ema_sweep import sweep_figure, sweep_scores
from vadiff.trainer.report.magnitudes import magnitudes_figure
from vadiff.trainer.training.data_set import load_images
from vadiff.trainer.training.held_out import held_out_loss_of_run
from vadiff.trainer.training.post_hoc import write_averages
from vadiff.training import PRESETS, HeldOutLoss, Run, TrainConfig, open_run, train

NETWORKS = {"classic": "digits", "edm2": "digits-edm2"}
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the preset's learning rate
CHOOSING_SEED = 1000
FIXED = 0.10  # width at which learning rates are chosen, tracked during training
WIDTHS = (0.02, 0.03, 0.05, 0.07, FIXED, 0.13, 0.16, 0.20, 0.25)


class Job(NamedTuple):
    """A run, and the widths to measure it at."""

    network: str
    rate: float
    seed: int
    steps: int
    widths: tuple[float, ...]
    runs: Path

    @property
    def path(self) -> Path:
        return self.runs / f"{self.network}-{self.steps}-rate-{self.rate:g}-seed-{self.seed}"

    @property
    def config(self) -> TrainConfig:
        reported = self.seed != CHOOSING_SEED
        shared: dict[str, Any] = {"weighting": "learned", "sigma_rel": (0.05, FIXED), "tensorboard": False}
        shared |= {"learning_rate": self.rate, "seed": self.seed, "steps": self.steps, "device": "cpu"}
        shared |= {"held_out_every": max(1, self.steps // 10) if reported else 0, "log_rms": reported}
        shared |= {"snapshot_every": max(1, self.steps // 64), "log_every": max(1, self.steps // 25)}
        return dataclasses.replace(PRESETS[NETWORKS[self.network]], **shared, held_out_images=half_of_held_out())


def rates_tried(network: str) -> list[float]:
    return [factor * PRESETS[NETWORKS[network]].learning_rate for factor in FACTORS]


class Measured(NamedTuple):
    """Held-out losses of a run by weights (a width, "ema" or "raw"), on the validation half and on the test half."""

    validation: dict[Any, HeldOutLoss]
    reported: dict[Any, HeldOutLoss]


def half_of_held_out() -> int:
    return len(load_images(PRESETS["digits"]).held_out) // 2


def halves(images: Images) -> tuple[Images, Images]:
    """`images` with the second half of the held-out images, and with the first, which training measures too."""
    cut = half_of_held_out()
    assert images.held_out_labels is not None
    reported, validation = (
        images._replace(held_out=images.held_out[part], held_out_labels=images.held_out_labels[part])
        for part in (slice(cut), slice(cut, 2 * cut))
    )
    return validation, reported


def measure(job: Job) -> list[dict[Any, tuple[np.ndarray, np.ndarray]]]:
    """Train and measure a run in a separate process; returns the contents of `Measured` as NumPy arrays."""
    torch.set_num_threads(1)
    train(job.config, out=job.path, resume=True, progress=False)
    run = open_run(job.path)
    write_averages(run, job.widths, job.steps)
    denoisers = {width: run.denoiser(f"ema-{width:g}", job.steps) for width in job.widths}
    denoisers |= {name: run.denoiser(name, job.steps) for name in ("ema", "raw")}  # type: ignore[misc]
    losses = [
        {name: held_out_loss_of_run(run.config, images, denoiser) for name, denoiser in denoisers.items()}
        for images in halves(run.images())
    ]
    return [{name: (loss.log_snr.numpy(), loss.per_image.numpy()) for name, loss in part.items()} for part in losses]


def measured(jobs: Sequence[Job], pool: ProcessPoolExecutor) -> dict[Job, Measured]:
    found = {}
    for job, parts in zip(jobs, pool.map(measure, jobs), strict=True):
        sigma_data = job.config.sigma_data
        losses = [
            {
                name: HeldOutLoss(torch.from_numpy(log_snr), torch.from_numpy(per_image), sigma_data)
                for name, (log_snr, per_image) in part.items()
            }
            for part in parts
        ]
        found[job] = Measured(*losses)
        print(f"{job.path.name}: {score(found[job].validation[FIXED]):.5f} to choose by", flush=True)
    return found


def score(loss: HeldOutLoss) -> float:
    """Geometric mean over noise levels of the x0 loss."""
    return loss.level_mean


def chosen_rates(tried: dict[Job, Measured]) -> tuple[dict[str, float], dict[str, dict[float, float]]]:
    """The best learning rate of each network, and the score of all rates, on the validation half."""
    scores: dict[str, dict[float, float]] = {network: {} for network in NETWORKS}
    for job, losses in tried.items():
        scores[job.network][job.rate] = score(losses.validation[FIXED])
    best = {network: min(rates, key=lambda rate: rates[rate]) for network, rates in scores.items()}
    for network, rates in scores.items():
        if best[network] in (min(rates), max(rates)):
            print(
                f"NOTE: {network} is best at {best[network]:g}, the end of the rates tried: a rate beyond may be better"
            )
    return best, scores


def figures_of(runs: Sequence[Run], losses: Sequence[Measured]) -> dict[str, Any]:
    """The reported figures of a network, from its seeds."""
    choosing = {width: statistics.fmean(score(loss.validation[width]) for loss in losses) for width in WIDTHS}
    best = min(WIDTHS, key=lambda width: choosing[width])
    by_seed = [{str(name): value for name, value in sweep_scores(loss.reported).items()} for loss in losses]
    speeds = [line["images_per_second"] for run in runs for line in run.metrics()[1:]]
    return {
        "parameters": sum(value.numel() for value in runs[0].denoiser().parameters()),
        "images_per_second": statistics.median(speeds) if speeds else None,
        "chosen_width": best,
        "held_out_by_seed": by_seed,  # by width, "ema" of the run and "raw"
        "held_out": {name: statistics.fmean(seed[name] for seed in by_seed) for name in by_seed[0]},
    }


def ratio_of(figures: dict[str, dict[str, Any]], weights: dict[str, str]) -> dict[str, float | None]:
    """EDM2's loss ÷ the classic network's, paired by seed, with a 95 % interval; `weights`: of each network."""
    pairs = zip(*(figures[network]["held_out_by_seed"] for network in ("edm2", "classic")), strict=True)
    logs = [math.log(one[weights["edm2"]] / other[weights["classic"]]) for one, other in pairs]
    found = interval(logs)
    values = {"ratio": found.mean, "low_95": found.low, "high_95": found.high}
    return {name: None if math.isnan(value) else math.exp(value) for name, value in values.items()}


def pictures_of(
    runs: dict[str, list[Run]],
    losses: dict[str, list[Measured]],
    networks: dict[str, dict[str, Any]],
    rates: dict[str, float],
    scores: dict[str, dict[float, float]],
) -> dict[str, Figure]:
    """Figures by file name."""
    first = losses["edm2"][0].reported
    widths, others = {width: first[width] for width in WIDTHS}, {name: first[name] for name in ("ema", "raw")}
    at_chosen_width = {
        network: [loss.reported[networks[network]["chosen_width"]] for loss in found]
        for network, found in losses.items()
    }
    return {
        "learning-curves": curves_figure({name: [run.metrics() for run in found] for name, found in runs.items()}),
        "rates": rates_figure(scores, rates),
        "sweep": sweep_figure(widths, others, runs["edm2"][0].config.sigma_rel),
        "magnitudes": magnitudes_figure({name: found[0].metrics() for name, found in runs.items()}),
        "held-out": held_out_figure(at_chosen_width),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel processes")
    parser.add_argument("--runs", type=Path, default=Path("runs/edm2"))
    parser.add_argument("--out", type=Path, default=RESULTS / "edm2", help="folder to write to")
    arguments = parser.parse_args()
    started = time.monotonic()
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        tried = [
            Job(
                network,
                factor * PRESETS[preset].learning_rate,
                CHOOSING_SEED,
                arguments.steps,
                (FIXED,),
                arguments.runs,
            )
            for network, preset in NETWORKS.items()
            for factor in FACTORS
        ]
        rates, scores = chosen_rates(measured(tried, pool))
        jobs = [
            Job(network, rates[network], seed, arguments.steps, WIDTHS, arguments.runs)
            for network in NETWORKS
            for seed in range(arguments.seeds)
        ]
        found = measured(jobs, pool)
    runs = {network: [open_run(job.path) for job in jobs if job.network == network] for network in NETWORKS}
    losses = {network: [found[job] for job in jobs if job.network == network] for network in NETWORKS}
    networks = {network: figures_of(runs[network], losses[network]) for network in NETWORKS}
    widths = {network: str(figures["chosen_width"]) for network, figures in networks.items()}
    figures: dict[str, Any] = {
        "steps": arguments.steps,
        "seeds": arguments.seeds,
        "processes": arguments.jobs,
        "batch_size": runs["edm2"][0].config.batch_size,
        "held_out_images": {"to_choose_by": half_of_held_out(), "reported": half_of_held_out()},
        "learning_rates": {
            network: {
                "chosen": rates[network],
                "tried": {f"{rate:g}": value for rate, value in scores[network].items()},
            }
            for network in NETWORKS
        },
        "networks": networks,
        "edm2_over_classic": {
            "width_chosen": ratio_of(networks, widths),
            f"width_{FIXED}": ratio_of(networks, dict.fromkeys(NETWORKS, str(FIXED))),
            "raw": ratio_of(networks, dict.fromkeys(NETWORKS, "raw")),
        },
        "seconds": time.monotonic() - started,
    }
    pictures = pictures_of(runs, losses, networks, rates, scores)
    written = write_results("edm2", figures, arguments.out / "edm2.json")
    for name, picture in pictures.items():
        save(picture, arguments.out / f"{name}.png")
    for network, values in networks.items():
        held_out, width = values["held_out"], values["chosen_width"]
        print(
            f"{network:>8}: {values['parameters']:,} parameters, learning rate {rates[network]:g}; held-out loss "
            f"{held_out['raw']:.4f} raw, {held_out[str(FIXED)]:.4f} at width {FIXED}, {held_out[str(width)]:.4f} at "
            f"width {width}, chosen on the other images"
        )
    for name, ratio in figures["edm2_over_classic"].items():
        spoken = ", ".join(f"{key} {value:.4f}" for key, value in ratio.items() if value is not None)
        print(f"EDM2 / classic, {name.replace('_', ' ')}: {spoken}")
    print(f"{figures['seconds']:.0f} s; written to {written} and pictures beside it")


if __name__ == "__main__":
    main()
