"""NVlabs' EDM loop: a denoiser with their calling convention, their loss, and that loss with adaptive weights.

    python examples/edm_loop.py --steps 200

The line that changes makes `loss_fn`. In NVlabs' repository the class is an option in train.py:
c.loss_kwargs.class_name = "vadiff.integrations.edm.EDMLoss".
"""

import argparse
import statistics
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from vadiff.integrations.edm import EDMLoss

SIGMA_DATA = 0.75  # standard deviation of the digits' pixels


class Denoiser(nn.Module):
    """D(x; sigma): EDM's preconditioning (arXiv 2206.00364, table 1) around a small network F."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.level = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1)
        total = sigma**2 + SIGMA_DATA**2
        hidden = self.first(x / total.sqrt())
        level = self.level(sigma.flatten(1).log() / 4)[:, :, None, None]
        for block in self.blocks:
            hidden = hidden + block(nn.functional.silu(hidden + level))
        return SIGMA_DATA**2 / total * x + sigma * SIGMA_DATA / total.sqrt() * self.last(nn.functional.silu(hidden))


class OwnLoss:
    """EDM's loss: ln(sigma) ~ N(-1.2, 1.2²), lambda(sigma)·(D - y)² (the paper's section 5), for each element."""

    def __call__(self, net: nn.Module, images: Tensor, labels: Tensor | None = None) -> Tensor:
        sigma = (-1.2 + 1.2 * torch.randn(len(images), 1, 1, 1)).exp()
        weight = 1 / sigma**2 + 1 / SIGMA_DATA**2
        return weight * (net(images + sigma * torch.randn_like(images), sigma, labels) - images) ** 2


@torch.no_grad()
def held_out_loss(net: nn.Module, images: Tensor) -> float:
    """EDM's own objective on images that were not trained on, with the same noise every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return float(OwnLoss()(net, images.repeat(4, 1, 1, 1)).mean())


def train(name: str, steps: int, with_vadiff: bool) -> None:
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1  # [1797, 1, 8, 8]
    net = Denoiser()

    loss_fn = OwnLoss()
    if with_vadiff:
        loss_fn = EDMLoss(sigma_data=SIGMA_DATA)  # the line that changes

    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    before, batch_size, loss_scaling = held_out_loss(net, images[1500:]), 64, 1.0
    times = []
    for _ in range(steps):
        batch = images[torch.randint(1500, (batch_size,))]
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = loss_fn(net=net, images=batch, labels=None)
        loss.sum().mul(loss_scaling / batch_size).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    milliseconds = 1e3 * statistics.median(times)  # the first steps warm up
    after = held_out_loss(net, images[1500:])
    print(f"{name:<22} {before:>12.4f} {after:>12.4f} {milliseconds:>12.2f}")
    if with_vadiff:
        print(loss_fn.criterion.summary())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    print(f"{'trainer':<22} {'loss before':>12} {'loss after':>12} {'ms per step':>12}")
    train("EDM", options.steps, with_vadiff=False)
    train("EDM with vadiff", options.steps, with_vadiff=True)
    print("Loss: of held-out images, unweighted. One seed, few steps: a small difference shows nothing.")
