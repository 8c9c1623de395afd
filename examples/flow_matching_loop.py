"""Flow matching with torchcfm: the mean squared error of the velocity, and the same with adaptive weights.

    python examples/flow_matching_loop.py --steps 200

The line that changes is the loss. With facebookresearch's flow_matching, `ut` is `path_sample.dx_t`.
"""

import argparse
import statistics
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchcfm import ConditionalFlowMatcher

from vadiff.integrations.flow_matching import FlowMatchingLoss


class Velocity(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        hidden = self.first(x)
        time = self.time(t[:, None])[:, :, None, None]
        for block in self.blocks:
            hidden = hidden + block(nn.functional.silu(hidden + time))
        return self.last(nn.functional.silu(hidden))


@torch.no_grad()
def held_out_loss(model: nn.Module, images: Tensor) -> float:
    """The plain objective on images that were not trained on, with the same noise every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        x1 = images.repeat(4, 1, 1, 1)
        t, xt, ut = ConditionalFlowMatcher().sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        return float(torch.mean((model(t, xt) - ut) ** 2))


def train(name: str, steps: int, with_vadiff: bool) -> None:
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1  # [1797, 1, 8, 8]
    model, matcher, criterion = Velocity(), ConditionalFlowMatcher(sigma=0.0), FlowMatchingLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    before = held_out_loss(model, images[1500:])
    times = []
    for _ in range(steps):
        x1 = images[torch.randint(1500, (64,))]
        x0 = torch.randn_like(x1)
        t, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1)
        start = time.perf_counter()
        optimizer.zero_grad()
        vt = model(t, xt)
        if with_vadiff:
            loss = criterion(vt, ut, t)  # the line that changes
        else:
            loss = torch.mean((vt - ut) ** 2)
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    milliseconds = 1e3 * statistics.median(times)  # the first steps warm up
    after = held_out_loss(model, images[1500:])
    print(f"{name:<22} {before:>12.4f} {after:>12.4f} {milliseconds:>12.2f}")
    if with_vadiff:
        print(criterion.criterion.summary())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    print(f"{'trainer':<22} {'loss before':>12} {'loss after':>12} {'ms per step':>12}")
    train("torchcfm", options.steps, with_vadiff=False)
    train("torchcfm with vadiff", options.steps, with_vadiff=True)
    print("Loss: of held-out images, unweighted. One seed, few steps: a small difference shows nothing.")
