"""EDM2's network against the classic one on digits, at equal parameters and budget, and the σ_rel sweep of one run.

Both presets train with the same weighting (EDM2's learned one), on the same images, noise levels and noise, for the
same number of steps; each has the learning rate and schedule of its preset, and each keeps power-function averages. The
widths are swept for both. Choosing the width with the lowest held-out loss looks at the held-out images: the value at
a width fixed beforehand (0.10, kept while training) stands beside it.

    python benchmarks/experiments/edm2.py [--steps 450] [--seeds 3] [--runs DIR] [--out FILE.json]

Writes the JSON, and beside it pictures: -magnitudes.png (weights, updates and activations over training), -sweep.png
(of EDM2's first seed) and -held-out.png. A run that is already in --runs is not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from results import RESULTS, write_results

from vadiff.report.ema_sweep import sweep_figure, sweep_scores
from vadiff.report.magnitudes import magnitudes_figure
from vadiff.training import PRESETS, HeldOutLoss, Run, TrainConfig, open_run, train
from vadiff.training.post_hoc import held_out_of_averages, write_averages

NETWORKS = {"classic": "digits", "edm2": "digits-edm2"}
FIXED = 0.10
WIDTHS = (0.02, 0.03, 0.05, 0.07, FIXED, 0.13, 0.16, 0.20, 0.25)


def config_of(network: str, steps: int, seed: int) -> TrainConfig:
    shared: dict[str, Any] = {"weighting": "learned", "sigma_rel": (0.05, 0.10), "log_rms": True, "tensorboard": False}
    sizes = {"steps": steps, "seed": seed, "snapshot_every": max(1, steps // 64), "log_every": max(1, steps // 25)}
    return dataclasses.replace(PRESETS[NETWORKS[network]], **shared, **sizes)


def trained(network: str, steps: int, seed: int, folder: Path) -> Run:
    path = folder / f"{network}-{steps}-{seed}"
    train(config_of(network, steps, seed), out=path, resume=True)
    return open_run(path)


def measured(run: Run, steps: int) -> tuple[dict[float, HeldOutLoss], dict[str, HeldOutLoss]]:
    write_averages(run, WIDTHS, steps)
    return held_out_of_averages(run, WIDTHS, steps, torch.device("cpu"))


def held_out_figure(losses: dict[str, list[HeldOutLoss]]) -> Figure:
    """Loss per noise level of both networks at the fixed width, and the ratio seed by seed."""
    figure = Figure(figsize=(12, 4.4), dpi=120, facecolor="white", layout="constrained")
    absolute, ratio = figure.subplots(1, 2)
    colors = {"classic": "#0072B2", "edm2": "#D55E00"}
    sigma = (-0.5 * losses["edm2"][0].log_snr).exp()
    for name, seeds in losses.items():
        for place, loss in enumerate(seeds):
            absolute.plot(sigma, loss.mean, color=colors[name], label=None if place else name, linewidth=1.6)
    for classic, edm2 in zip(losses["classic"], losses["edm2"], strict=True):
        value, error = edm2.ratio_to(classic)
        ratio.errorbar(sigma, value, 2 * error, color=colors["edm2"], linewidth=1.6, capsize=2)
    ratio.axhline(1.0, color=colors["classic"], linewidth=1.6)
    absolute.set_ylabel("held-out EDM loss, mean per pixel")
    ratio.set_ylabel("EDM2 ÷ classic, one line per seed, ± 2 standard errors")
    absolute.legend(frameon=False)
    for panel in (absolute, ratio):
        panel.set_xscale("log")
        panel.set_xlabel(f"noise level σ   (averages of width {FIXED})")
        panel.grid(alpha=0.25)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/edm2"))
    parser.add_argument("--out", type=Path, default=RESULTS / "edm2.json", help="JSON file to write")
    arguments = parser.parse_args()
    started = time.monotonic()
    figures: dict[str, Any] = {"steps": arguments.steps, "seeds": arguments.seeds, "widths": WIDTHS, "networks": {}}
    fixed: dict[str, list[HeldOutLoss]] = {}
    first: dict[str, Run] = {}
    pictures = {}
    for network in NETWORKS:
        scores = []
        for seed in range(arguments.seeds):
            run = trained(network, arguments.steps, seed, arguments.runs)
            losses, others = measured(run, arguments.steps)
            scores.append({str(name): value for name, value in sweep_scores({**losses, **others}).items()})
            fixed.setdefault(network, []).append(losses[FIXED])
            if seed == 0:
                first[network] = run
                if network == "edm2":
                    pictures["sweep"] = sweep_figure(losses, others, run.config.sigma_rel)
        parameters = sum(value.numel() for value in first[network].denoiser().parameters())
        speeds = [line["images_per_second"] for line in first[network].metrics()[1:]]
        means = {name: statistics.fmean(score[name] for score in scores) for name in scores[0]}
        best = min(WIDTHS, key=lambda width: means[str(width)])
        figures["networks"][network] = {
            "parameters": parameters,
            "images_per_second": statistics.median(speeds) if speeds else None,
            "held_out_by_seed": scores,  # geometric mean over noise levels, by width, "ema" and "raw"
            "held_out": means,
            "best_width": best,
        }
        print(
            f"{network:>8}: {parameters:,} parameters; held-out loss {means['raw']:.4f} raw, {means['ema']:.4f} EMA of "
            f"the run, {means[str(FIXED)]:.4f} at width {FIXED}, lowest {means[str(best)]:.4f} at {best}"
        )
    pictures["magnitudes"] = magnitudes_figure({name: run.metrics() for name, run in first.items()})
    pictures["held-out"] = held_out_figure(fixed)
    figures["seconds"] = time.monotonic() - started
    written = write_results("edm2", figures, arguments.out)
    for name, picture in pictures.items():
        picture.savefig(written.with_name(f"{written.stem}-{name}.png"))
    print(f"{figures['seconds']:.0f} s; written to {written} and three pictures beside it")


if __name__ == "__main__":
    main()
