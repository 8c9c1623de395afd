"""How many references a batch needs: noise of its mean target, for references that all samples of the batch share.

Digits of 8 × 8, batches of 256, 200 batches for each number of references M, which includes the batch's own samples
where M allows. Printed: mean square, over elements, of the batch's mean of x0_hat - E[x0 | x_t], E over all training
images, as a share of the same for the plain target x0.

    python benchmarks/experiments/shared_references.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from vadiff.targets.posterior import Draws, References, posterior
from vadiff.trainer.data import load_digits

BATCH, BATCHES = 256, 200
NUMBERS = (64, 256, 1024)
SIGMAS = (1.0, 2.0, 5.0, 10.0)


def targets(draws: Draws, rows: Tensor, data: Tensor) -> Tensor:
    """Posterior means [B, D] over the own sample and the rows of the data."""
    references = References(data[rows], rows, None, torch.ones(len(rows), dtype=torch.bool))
    return posterior(draws, [references], 4096).mean


def main() -> None:
    data = load_digits().train.flatten(1)
    everything = torch.arange(len(data))
    print("| σ | " + " | ".join(f"M = {number:,}" for number in NUMBERS) + " |")
    print("| --- |" + " --- |" * len(NUMBERS))
    for sigma in SIGMAS:
        noise: dict[int, list[Tensor]] = {number: [] for number in (0, *NUMBERS)}
        for seed in range(BATCHES):
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(data), generator=generator)
            rows = order[:BATCH]
            x0 = data[rows]
            noisy = x0 + sigma * torch.randn(x0.shape, generator=generator)
            draws = Draws(x0, noisy, torch.ones(BATCH), torch.full((BATCH,), sigma), rows, None, None)
            full = targets(draws, everything, data)
            noise[0].append((x0 - full).mean(0))
            for number in NUMBERS:
                noise[number].append((targets(draws, order[:number], data) - full).mean(0))
        plain, *others = (float(torch.stack(values).square().mean()) for values in noise.values())
        print(f"| {sigma:g} | " + " | ".join(f"{other / plain:.2f}" for other in others) + " |")


if __name__ == "__main__":
    main()
