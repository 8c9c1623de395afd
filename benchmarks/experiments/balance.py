"""Does the adaptive table balance the noise levels, and preserve the expected loss?

Measured on stationary streams of base losses: synthetic EDM-like ones with 5 % outliers, and those of a frozen digits
network. The criterion records ten half-lives with clip = inf; then its table is frozen and a million new samples are
drawn. Printed, over bins whose statistics have an effective count n above 500, without the two end bins:

    std ratio      largest over smallest standard deviation of w*g, under variance-aware and under constant weighting
    E[w g]/E[g]    mean of 4 seeds, with the objective's own level sampler, and with a skewed one corrected by 1/p

Also printed, without a bound: the std ratio over all bins with more than 500 of the new samples. The outer ones have an
effective count of 25 to 50, and the prior (32 samples) keeps their weights nearer to 1, as intended.

For a network in training, whose losses fall unevenly, E[w g]/E[g] is printed, without a bound.

    python benchmarks/experiments/balance.py [--fresh 1000000] [--seeds 4] [--out FILE.json]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import write_results
from torch import Tensor

import vadiff
from vadiff.ops.reference import bin_index
from vadiff.process import coefficients, loss_ratio
from vadiff.trainer.data import load_digits
from vadiff.trainer.data.digits import SIGMA_DATA
from vadiff.trainer.training.objective import edm_objective
from vadiff.training import TrainConfig, train

HALF_LIFE, BATCH, MIN_COUNT = 256.0, 512, 500
P_MEAN, P_STD = -1.2, 1.2  # ln sigma of the objective's level sampler
SKEWED_MEAN, SKEWED_STD = -0.6, 1.6  # of the skewed level sampler: wider, so that 1/p is bounded

Stream = Callable[[Tensor, torch.Generator], Tensor]  # (sigma [B], generator) -> base losses [B]


def synthetic_losses(sigma: Tensor, generator: torch.Generator) -> Tensor:
    """Base losses [B] shaped like EDM's: largest at both ends, std/mean from .2 to .5, and 5 % outliers of 5 times."""
    log_snr = vadiff.log_snr.from_sigma(sigma)
    mean = 0.05 * (0.3 * (log_snr - 1.8)).cosh()
    spread = 0.2 + 0.3 * torch.sigmoid(log_snr / 2)
    outlier = 1.0 + 4.0 * (torch.rand(sigma.shape, generator=generator) < 0.05)
    normal = torch.randn(sigma.shape, generator=generator)
    return mean * outlier * (spread * normal - spread**2 / 2).exp()


def frozen_network_losses(steps: int) -> Stream:
    """Per-sample EDM losses lambda(sigma) * |D - x0|**2 of a trained network that does not change."""
    images = load_digits().train
    denoiser = train(TrainConfig(weighting="constant", steps=steps, channels=(16, 16)), progress=False).denoiser

    @torch.no_grad()
    def losses(sigma: Tensor, generator: torch.Generator) -> Tensor:
        x0 = images[torch.randint(len(images), sigma.shape, generator=generator)]
        eps = torch.randn(x0.shape, generator=generator)
        output = denoiser.network_output(x0 + sigma.view(-1, 1, 1, 1) * eps, sigma)
        a, b, c = (part.view(-1, 1, 1, 1) for part in coefficients("edm", 1.0, sigma, sigma_data=SIGMA_DATA))
        error = (a * output + b * x0 + c * eps).square().flatten(1).mean(1)
        return loss_ratio("edm", vadiff.log_snr.from_sigma(sigma), sigma_data=SIGMA_DATA) * error

    return losses


def draw(stream: Stream, skewed: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """One batch: base losses g, log-SNR, sample weights v (1/p correction of a skewed sampler), each [BATCH]."""
    mean, std = (SKEWED_MEAN, SKEWED_STD) if skewed else (P_MEAN, P_STD)
    log_sigma = mean + std * torch.randn(BATCH, generator=generator)

    def log_density(m: float, s: float) -> Tensor:
        return -0.5 * ((log_sigma - m) / s) ** 2 - torch.tensor(s).log()

    v = (log_density(P_MEAN, P_STD) - log_density(mean, std)).exp()
    sigma = log_sigma.exp()
    return stream(sigma, generator), vadiff.log_snr.from_sigma(sigma), v


def balance(stream: Stream, skewed: bool, seed: int, fresh: int) -> dict[str, float]:
    """Record ten half-lives of `stream`, then measure the frozen table on new samples."""
    generator = torch.Generator().manual_seed(seed)
    weighting = vadiff.weighting.VarianceAware(clip=float("inf"))
    criterion = vadiff.DiffusionLoss(weighting, half_life=HALF_LIFE)
    bins = criterion.statistics.bins
    for _ in range(int(10 * HALF_LIFE * bins.size / BATCH)):
        criterion.reweight(*draw(stream, skewed, generator))
    criterion.eval()
    drawn = [draw(stream, skewed, generator) for _ in range(fresh // BATCH)]
    g, log_snr, v = (torch.cat(parts).double() for parts in zip(*drawn, strict=True))
    weighted = criterion.weight_at(log_snr).double() * g
    index = bin_index(log_snr.float(), bins)

    def std_ratio(values: Tensor, counts: Tensor) -> float:
        stds = torch.stack([values[index == k].std() for k in range(1, bins.size - 1) if counts[k] > MIN_COUNT])
        return (stds.max() / stds.min()).item()

    count = criterion.statistics.count
    return {
        "variance_aware": std_ratio(weighted, count),
        "constant": std_ratio(g, count),
        "bins": int((count[1:-1] > MIN_COUNT).sum()),
        "variance_aware_wide": std_ratio(weighted, torch.bincount(index, minlength=bins.size)),
        "constant_wide": std_ratio(g, torch.bincount(index, minlength=bins.size)),
        "preserved": ((v * weighted).sum() / (v * g).sum()).item(),
    }


def lag_in_training(steps: int) -> list[float]:
    """E[w g]/E[g] of a network in training, averaged over each tenth of the steps."""
    ratios: list[float] = []

    def objective(criterion: vadiff.DiffusionLoss, *arguments: Any) -> Tensor:
        *_, sigma, sigma_data, _ = arguments
        log_snr = vadiff.log_snr.from_sigma(sigma)
        weight = criterion.weight_at(log_snr)
        loss = edm_objective(criterion, *arguments)
        g = criterion.per_sample_loss * loss_ratio("edm", log_snr, sigma_data=sigma_data)
        ratios.append(((weight * g).sum() / g.sum()).item())
        return loss

    train(TrainConfig(weighting="variance_aware", steps=steps), objective, progress=False)
    tenth = len(ratios) // 10
    return [sum(ratios[i * tenth : (i + 1) * tenth]) / tenth for i in range(10)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", type=int, default=1_000_000, help="new samples to measure the frozen table on")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400, help="training steps of the digits networks")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/balance.json)")
    arguments = parser.parse_args()
    figures: dict[str, object] = {"fresh": arguments.fresh, "seeds": arguments.seeds}
    failed = []
    print("                         std ratio, n > 500          n > 500 of the fresh")
    print("stream     levels  bins  variance-aware  constant    variance-aware  constant   E[w g]/E[g]")
    for name, stream in (("synthetic", synthetic_losses), ("digits", frozen_network_losses(arguments.steps))):
        for skewed in (False, True):
            runs = [balance(stream, skewed, seed, arguments.fresh) for seed in range(arguments.seeds)]
            worst = max(run["variance_aware"] for run in runs)
            constant = min(run["constant"] for run in runs)
            wide = max(run["variance_aware_wide"] for run in runs)
            constant_wide = min(run["constant_wide"] for run in runs)
            preserved = sum(run["preserved"] for run in runs) / len(runs)
            levels = "skewed" if skewed else "own"
            print(
                f"{name:10} {levels:7} {runs[0]['bins']:4}  {worst:14.3f}  {constant:8.2f}  {wide:16.3f}"
                f"  {constant_wide:8.2f}  {preserved:12.4f}",
                flush=True,
            )
            figures[f"{name}, {levels} levels"] = runs
            if worst > 1.5 or abs(preserved - 1) > 0.01:
                failed.append(f"{name}, {levels} levels")
    lag = lag_in_training(arguments.steps)
    figures["lag"] = lag
    tenths = " ".join(f"{ratio:.3f}" for ratio in lag)
    print(f"network in training, E[w g]/E[g] over each tenth of {arguments.steps} steps: {tenths}")
    print(f"written to {write_results('balance', figures, arguments.out)}")
    if failed:
        raise SystemExit(f"a bound does not hold: {', '.join(failed)} (std ratio <= 1.5, E[w g]/E[g] within 1 %)")


if __name__ == "__main__":
    main()
