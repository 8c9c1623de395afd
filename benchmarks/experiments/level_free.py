"""How much noise of the logged loss is noise of the levels drawn? Raw against level-free, while a network trains.

Digits, the networks and objectives of objectives_digits.toml with constant weighting and independent levels: epsilon
with linear betas and uniform t, flow with uniform t, EDM; batches of 4 and of 64; five seeds. Every step is logged by
itself.

Primary figure, fixed beforehand: the relative noise of a logged value, std of the difference of neighbouring steps over
sqrt(2) times their mean, over the second half of the steps: raw, the mean base loss of the batch; level-free,
`criterion.level_free_loss`. The criterion's bins are 0.25 wide, as `DiffusionLoss.for_process` makes them; the first
half is longer than the 32 samples per bin until which both are the same. Reported: mean over seeds and its standard
error, the ratio raw / level-free, and its square, by which a batch would have to be larger for the same noise. Also
whether the two agree: mean of level-free / mean of raw over the second half, 1 if it is unbiased.

    python benchmarks/experiments/level_free.py [--jobs 2] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import itertools
import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from results import write_results

from vadiff.trainer.training.metrics import stacked
from vadiff.training import TrainConfig, train

OBJECTIVES: dict[str, dict[str, Any]] = {
    "epsilon, linear, uniform t": {"process": "vp_linear", "prediction": "epsilon"},
    "flow, uniform t": {"process": "flow", "levels": "uniform_time"},
    "EDM": {"p_mean": -1.2},
}
STEPS = {4: 3000, 64: 600}  # by batch size
SEEDS = range(5)


def relative_noise(values: torch.Tensor) -> float:
    """Std of the difference of neighbours, over sqrt(2) and the mean: free of the trend."""
    return float(values.diff().std() / (math.sqrt(2) * values.mean()))


def measure(job: tuple[str, int, int]) -> dict[str, float]:
    """Train one network; noise of both values over the second half."""
    objective, batch_size, seed = job
    torch.set_num_threads(1)
    steps = STEPS[batch_size]
    config = TrainConfig(
        weighting="constant", seed=seed, steps=steps, batch_size=batch_size, log_every=1, held_out_every=0,
        samples_every=0, tensorboard=False, device="cpu", **OBJECTIVES[objective],
    )  # fmt: skip
    entries = train(config, progress=False).metrics[steps // 2 :]
    raw, level_free = stacked(entries, "loss"), stacked(entries, "level_free_loss")
    return {
        "raw": relative_noise(raw),
        "level_free": relative_noise(level_free),
        "agreement": float(level_free.mean() / raw.mean()),
    }


def summarise(seeds: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and standard error over seeds of each figure and of the ratio."""
    columns = {name: torch.tensor([seed[name] for seed in seeds], dtype=torch.float64) for name in seeds[0]}
    columns["ratio"] = columns["raw"] / columns["level_free"]
    columns["as_many_samples"] = columns["ratio"].square()
    found: dict[str, Any] = {}
    for name, values in columns.items():
        found[name] = {"mean": float(values.mean()), "stderr": float(values.std() / math.sqrt(len(values)))}
    return {**found, "seeds": seeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--out", type=Path, help="file for the results (benchmarks/results/level_free.json)")
    arguments = parser.parse_args()
    jobs = list(itertools.product(OBJECTIVES, STEPS, SEEDS))
    results: dict[tuple[str, int], list[dict[str, float]]] = {}
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for (objective, batch_size, seed), found in zip(jobs, pool.map(measure, jobs), strict=True):
            results.setdefault((objective, batch_size), []).append(found)
            print(f"{objective}, batch {batch_size}, seed {seed}: {found}", flush=True)
    table = {f"{objective}, batch {size}": summarise(found) for (objective, size), found in results.items()}
    print(f"{'':40} {'raw':>15} {'level-free':>15} {'ratio':>6} {'as samples':>10} {'agreement':>16}")
    for name, row in table.items():
        raw, free, agreement = (
            f"{row[key]['mean']:.4f} ± {row[key]['stderr']:.4f}" for key in ("raw", "level_free", "agreement")
        )
        print(
            f"{name:40} {raw:>15} {free:>15} {row['ratio']['mean']:6.2f} {row['as_many_samples']['mean']:9.1f}x "
            f"{agreement:>16}"
        )
    print(f"written to {write_results('level_free', {'rows': table}, arguments.out)}")


if __name__ == "__main__":
    main()
