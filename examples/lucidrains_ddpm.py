"""lucidrains' denoising-diffusion-pytorch: `GaussianDiffusion` unchanged, and with adaptive weights.

    python examples/lucidrains_ddpm.py --steps 50

The line that changes attaches a criterion to the diffusion; with the library's `Trainer` it is the same line.
"""

import argparse
import statistics
import time

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from sklearn.datasets import load_digits
from torch import Tensor, nn

from vadiff.integrations import lucidrains


@torch.no_grad()
def held_out_loss(diffusion: nn.Module, images: Tensor) -> float:
    """The library's own objective on images that were not trained on, with the same noise every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        clean = diffusion.normalize(images.repeat(2, 1, 1, 1))
        times = torch.randint(diffusion.num_timesteps, (len(clean),))
        return float(diffusion.p_losses(clean, times))  # p_losses stays the library's own with a criterion


def train(name: str, steps: int, with_vadiff: bool) -> None:
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16  # [1797, 1, 8, 8] in [0, 1]
    network = Unet(dim=16, dim_mults=(1, 2), channels=1, flash_attn=False)

    diffusion = GaussianDiffusion(network, image_size=8, timesteps=1000, objective="pred_v")
    if with_vadiff:
        lucidrains.attach(diffusion)  # the line that changes

    optimizer = torch.optim.Adam(diffusion.parameters(), lr=2e-3)
    before = held_out_loss(diffusion, images[1500:])
    times = []
    for _ in range(steps):
        batch = images[torch.randint(1500, (32,))]
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = diffusion(batch)
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    milliseconds = 1e3 * statistics.median(times)  # the first steps warm up
    after = held_out_loss(diffusion, images[1500:])
    print(f"{name:<22} {before:>12.4f} {after:>12.4f} {milliseconds:>12.2f}")
    if with_vadiff:
        print(diffusion.criterion.summary())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    print(f"{'trainer':<22} {'loss before':>12} {'loss after':>12} {'ms per step':>12}")
    train("GaussianDiffusion", options.steps, with_vadiff=False)
    train("with vadiff", options.steps, with_vadiff=True)
    print("Loss: of held-out images, unweighted. One seed, few steps: a small difference shows nothing.")
