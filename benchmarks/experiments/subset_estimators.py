"""Error of the corrected subset estimator of J*, by its correction C.

    python benchmarks/experiments/subset_estimators.py [--draws 4096] [--out FILE.json]

Compares cDOL with the full estimate at 16 noise levels from 0.1 to 40, on three data sets whose full estimate is quick:
all handwritten digits, a mixture of 20 Gaussians, one Gaussian. Prints the largest difference over the levels, in
percent of the total variance, with its standard error (of two independent estimates). A minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from results import write_results
from sklearn.datasets import load_digits
from torch import Tensor

from vadiff.optimal_loss import estimate

SIGMAS = torch.logspace(math.log10(0.1), math.log10(40), 16)
FACTORS = (1.0, 2.0, 4.0)  # C in units of N/L


def data_sets() -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """Samples [N, D] and sizes of subsets."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    digits = torch.from_numpy(load_digits().data).float() / 8 - 1
    centres = normal(20, 64)
    mixture = centres[torch.randint(20, (6000,), generator=generator)] + 0.2 * normal(6000, 64)
    return {"digits": (digits, (180, 45)), "mixture": (mixture, (600, 150)), "Gaussian": (normal(4000, 64), (200,))}


def worst_differences(data: Tensor, subset: int, draws: int) -> dict[str, dict[str, float]]:
    """For each factor: the largest difference from the full estimate over the levels, and its standard error, in %."""
    full = estimate(data, SIGMAS, draws)
    found = {}
    for factor in FACTORS:
        other = estimate(data, SIGMAS, draws, "cdol", subset, factor * len(data) / subset, seed=1)
        difference = 100 * (other.loss - full.loss) / full.total_variance
        worst = int(difference.abs().argmax())
        error = 100 * math.hypot(float(other.stderr[worst]), float(full.stderr[worst])) / full.total_variance
        found[f"{factor:g} N/L"] = {"percent": float(difference[worst]), "stderr": error}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4096)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/subset_estimators.json")
    arguments = parser.parse_args()
    figures = {}
    for name, (data, subsets) in data_sets().items():
        for subset in subsets:
            case = f"{name} {len(data)}/{subset}"
            figures[case] = worst_differences(data, subset, arguments.draws)
            values = "  ".join(f"C = {c}: {v['percent']:+.1f} ± {v['stderr']:.1f}" for c, v in figures[case].items())
            print(f"{case:18} {values}", flush=True)
    print(
        f"written to {write_results('subset_estimators', {'draws': arguments.draws, 'worst': figures}, arguments.out)}"
    )


if __name__ == "__main__":
    main()
