"""k-diffusion's loop: `Denoiser.loss`, and the same with adaptive weights.

    python examples/k_diffusion_loop.py --steps 200

The line that changes wraps the denoiser: in k-diffusion's train.py, after `make_denoiser_wrapper(config)(inner_model)`.
"""

import argparse
import statistics
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from vadiff.integrations.k_diffusion import WeightedDenoiser, import_k_diffusion

K = import_k_diffusion()  # import k_diffusion as K, also beside a setuptools without pkg_resources

SIGMA_DATA = 0.75  # standard deviation of the digits' pixels


class InnerModel(nn.Module):
    """F: the raw network, called with the scaled noisy images and sigma."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.level = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        hidden = self.first(x)
        level = self.level(sigma[:, None].log() / 4)[:, :, None, None]
        for block in self.blocks:
            hidden = hidden + block(nn.functional.silu(hidden + level))
        return self.last(nn.functional.silu(hidden))


@torch.no_grad()
def held_out_loss(inner_model: nn.Module, images: Tensor) -> float:
    """The denoiser's own objective on images that were not trained on, with the same noise every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        images = images.repeat(4, 1, 1, 1)
        sigma = K.utils.rand_log_normal([len(images)], -1.2, 1.2)
        return float(K.layers.Denoiser(inner_model, SIGMA_DATA).loss(images, torch.randn_like(images), sigma).mean())


def train(name: str, steps: int, with_vadiff: bool) -> None:
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1  # [1797, 1, 8, 8]
    inner_model = InnerModel()

    model = K.layers.Denoiser(inner_model, sigma_data=SIGMA_DATA)
    if with_vadiff:
        model = WeightedDenoiser(model)  # the line that changes

    optimizer = torch.optim.AdamW(inner_model.parameters(), lr=2e-3)
    before = held_out_loss(inner_model, images[1500:])
    times = []
    for _ in range(steps):
        reals = images[torch.randint(1500, (64,))]
        noise = torch.randn_like(reals)
        sigma = K.utils.rand_log_normal([len(reals)], -1.2, 1.2)
        start = time.perf_counter()
        optimizer.zero_grad()
        losses = model.loss(reals, noise, sigma)
        losses.mean().backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    milliseconds = 1e3 * statistics.median(times)  # the first steps warm up
    after = held_out_loss(inner_model, images[1500:])
    print(f"{name:<22} {before:>12.4f} {after:>12.4f} {milliseconds:>12.2f}")
    if with_vadiff:
        print(model.criterion.summary())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    print(f"{'trainer':<22} {'loss before':>12} {'loss after':>12} {'ms per step':>12}")
    train("k-diffusion", options.steps, with_vadiff=False)
    train("k-diffusion + vadiff", options.steps, with_vadiff=True)
    print("Loss: of held-out images, unweighted. One seed, few steps: a small difference shows nothing.")
