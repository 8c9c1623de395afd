"""Time and memory of one forward and backward pass of EDM2's networks on a CPU: the table of docs/edm2.md.

python benchmarks/experiments/network_cost.py img64-xs img512-latent-xs [--batch 8]

Each network runs in a process of its own, with and without gradient checkpointing, in float32 on two threads: the
fastest of `--rounds` passes, and the peak memory of the process, torch included.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import subprocess
import sys
import time

import torch

from vadiff.trainer.presets import PRESETS
from vadiff.trainer.training.assembly import build_criterion, build_denoiser
from vadiff.training import edm_objective

CLASSES = 1000
SIGMA = 0.5


def measure(preset: str, checkpointing: bool, batch: int, rounds: int) -> str:
    """A row of the table."""
    config = dataclasses.replace(PRESETS[preset], gradient_checkpointing=checkpointing)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    denoiser = build_denoiser(config, config.image_shape, CLASSES).train()
    criterion = build_criterion(config)
    x0, eps = torch.randn(2, batch, *config.image_shape).unbind()
    sigma, labels = torch.full((batch,), SIGMA), torch.zeros(batch, dtype=torch.int64)
    forward, backward = [], []
    for _ in range(rounds):
        denoiser.zero_grad(set_to_none=False)
        start = time.perf_counter()
        output = denoiser.training_output(x0, eps, sigma, labels)
        loss = edm_objective(criterion, output, x0, eps, sigma, config.sigma_data)
        middle = time.perf_counter()
        loss.backward()
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
    assert all(parameter.grad is not None for parameter in denoiser.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB
    name = "with gradient checkpointing" if checkpointing else f"`{preset}`"
    return f"| {name} | {batch} | {min(forward):.2f} s | {min(backward):.2f} s | {peak:.2f} GiB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+", choices=sorted(PRESETS), metavar="PRESET")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--checkpointing", type=int, choices=(0, 1), help="in this process, with or without")
    options = parser.parse_args()
    if options.checkpointing is not None:
        print(measure(options.presets[0], bool(options.checkpointing), options.batch, options.rounds))
        return
    print("| | batch | forward | backward | peak memory |\n| --- | --- | --- | --- | --- |", flush=True)
    for preset in options.presets:
        for checkpointing in "01":
            sizes = ["--batch", str(options.batch), "--rounds", str(options.rounds)]
            subprocess.run([sys.executable, __file__, preset, "--checkpointing", checkpointing, *sizes], check=True)


if __name__ == "__main__":
    main()
