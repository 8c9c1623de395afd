"""Do the adaptive weights depend on the parameterisation of a trainer's objective? They must not.

Trains the digits network with the EDM objective written four ways:

    D-error x lambda(sigma)    r = D - x0,                u = lambda = 1/c_out**2
    F-error                    r = F - F*,                u = 1
    eps-error x u              r = (x_t - D)/sigma - eps, u = lambda/S
    v-error x u                r = v(D) - v (VP form),    u = lambda/(1 + S)

with the same seed, then compares the variance-aware weights in bins with more than 50 samples. For comparison: the
difference between two data seeds (the accuracy of the weights), and the same four forms with u left out of the base
loss (passed as sample_weight), which the contract's rule 2 forbids.

    python benchmarks/experiments/parameterisations.py [--steps 200] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from results import write_results
from torch import Tensor

import vadiff
from vadiff.process import edm_preconditioning, loss_ratio
from vadiff.training import TrainConfig, train

FORMS = ("D-error x lambda", "F-error", "eps-error x u", "v-error x u")
MIN_COUNT = 50


def written_as(form: str, *, in_bins: bool):
    """The EDM objective in one of the FORMS; u as base weight or, without `in_bins`, as sample weight."""

    def objective(
        criterion: vadiff.DiffusionLoss,
        output: Tensor,
        x0: Tensor,
        eps: Tensor,
        sigma: Tensor,
        sigma_data: float,
        _: None,
    ) -> Tensor:
        log_snr = vadiff.log_snr.from_sigma(sigma)
        scale = edm_preconditioning(sigma, sigma_data)
        c_skip, c_out, s = (value.view(-1, 1, 1, 1) for value in (scale.c_skip, scale.c_out, sigma))
        noisy = x0 + s * eps
        denoised = c_skip * noisy + c_out * output
        lam = loss_ratio("edm", log_snr, sigma_data=sigma_data)
        if form == "D-error x lambda":
            prediction, target, u = denoised, x0, lam
        elif form == "F-error":
            prediction, target, u = output, (x0 - c_skip * noisy) / c_out, None
        elif form == "eps-error x u":
            prediction, target, u = (noisy - denoised) / s, eps, lam / loss_ratio("epsilon", log_snr)
        else:
            alpha, sine = (1 + s * s).rsqrt(), s * (1 + s * s).rsqrt()  # the VP process at this signal-to-noise ratio
            prediction = (alpha * (alpha * noisy) - denoised) / sine  # v = (alpha x_t - x0) / sigma
            target = alpha * eps - sine * x0
            u = lam / loss_ratio("v_prediction", log_snr)
        weights = {"base_weight": u} if in_bins else {"sample_weight": u}
        return criterion(prediction, target, log_snr, **weights)

    return objective


def trained_weights(form: str, steps: int, *, in_bins: bool, data_seed: int) -> tuple[Tensor, Tensor]:
    """Adaptive weights [K] and counts [K] after training."""
    config = TrainConfig(weighting="variance_aware", steps=steps, data_seed=data_seed)
    criterion = train(config, written_as(form, in_bins=in_bins), progress=False).criterion
    return criterion.weights.double(), criterion.statistics.count


def largest_ratio(runs: list[tuple[Tensor, Tensor]]) -> float:
    """Largest ratio between the weights of two runs, over bins with more than MIN_COUNT samples in all of them."""
    enough = torch.stack([count for _, count in runs]).amin(0) > MIN_COUNT
    return max(
        max((a[enough] / b[enough]).max().item(), (b[enough] / a[enough]).max().item())
        for (a, _), (b, _) in itertools.combinations(runs, 2)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/parameterisations.json)")
    arguments = parser.parse_args()
    runs = {}
    for in_bins in (True, False):
        for form in FORMS:
            runs[form, in_bins] = trained_weights(form, arguments.steps, in_bins=in_bins, data_seed=0)
            print(f"trained: {form}, u {'in' if in_bins else 'left out of'} the bins", flush=True)
    other_seed = trained_weights(FORMS[0], arguments.steps, in_bins=True, data_seed=1)
    figures = {
        "steps": arguments.steps,
        "bins_compared": int((runs[FORMS[0], True][1] > MIN_COUNT).sum()),
        "same_seed_four_forms": largest_ratio([runs[form, True] for form in FORMS]),
        "two_data_seeds": largest_ratio([runs[FORMS[0], True], other_seed]),
        "u_left_out_of_the_bins": largest_ratio([runs[form, False] for form in FORMS]),
    }
    print(f"\nlargest ratio of weights, bins with n > {MIN_COUNT} ({figures['bins_compared']} of 128), digits network,")
    print(f"{arguments.steps} steps:")
    print(f"  four forms, same seed, u in the bins       {figures['same_seed_four_forms']:.5f}   must be < 1.01")
    print(f"  one form, two data seeds                   {figures['two_data_seeds']:.3f}")
    print(f"  four forms, same seed, u left out          {figures['u_left_out_of_the_bins']:.2f}      must be > 2")
    print(f"written to {write_results('parameterisations', figures, arguments.out)}")
    if not (figures["same_seed_four_forms"] < 1.01 and figures["u_left_out_of_the_bins"] > 2):
        raise SystemExit("a bound does not hold")


if __name__ == "__main__":
    main()
