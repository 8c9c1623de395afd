"""The picture of README and docs: the effect of one changed line on a DDPM trainer's loss.

Digits of 8 × 8, noise prediction, linear betas, uniform timesteps: the usual trainer, with a small network, trained
twice from the same weights on the same images, timesteps and noise, with w = 1 and with the default weighting.

    python benchmarks/experiments/picture.py    # writes docs/picture.svg (a minute on two CPU cores)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from looks import BLUE, GREY, LOOKS, WIDTH
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor, nn

import vadiff
from vadiff.trainer.data import load_digits

DOCS = Path(__file__).parent.parent.parent / "docs"
BINS, RANGE = 24, (-10.5, 9.5)  # log-SNR of a schedule of a thousand linear betas
ENOUGH = 20  # minimum number of samples for a bin to be drawn
COLORS = {"constant": GREY, "variance_aware": BLUE}
NAMES = {"constant": "F.mse_loss", "variance_aware": "vadiff.DiffusionLoss()"}


class Network(nn.Module):
    """Predicts the noise in a vector from the vector and its log-SNR: three layers and a skip."""

    def __init__(self, size: int, width: int = 512) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(torch.linspace(0.1, 3.0, 32))
        self.layers = nn.Sequential(
            nn.Linear(size + 64, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width),
            nn.SiLU(), nn.Linear(width, size),
        )  # fmt: skip

    def forward(self, noisy: Tensor, log_snr: Tensor) -> Tensor:
        phase = log_snr[:, None] * self.frequencies
        return self.layers(torch.cat([noisy, phase.sin(), phase.cos()], dim=1))


def train(weighting: str, images: Tensor, steps: int, batch: int = 256) -> vadiff.DiffusionLoss:
    """The criterion after `steps` of training on images [N, D] in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = Network(images.shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    criterion = vadiff.DiffusionLoss(weighting, bins=BINS, log_snr_range=RANGE, half_life=4096)
    for _ in range(steps):
        x0 = images[torch.randint(len(images), (batch,), generator=generator)]
        timesteps = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        alpha_bar = alphas_cumprod[timesteps].float()[:, None]
        log_snr = vadiff.log_snr.from_alphas_cumprod(alphas_cumprod, timesteps).float()
        prediction = network(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, log_snr)
        optimizer.zero_grad()
        criterion(prediction, noise, log_snr).backward()
        optimizer.step()
        schedule.step()
    return criterion


def picture(criteria: dict[str, vadiff.DiffusionLoss], path: Path) -> dict[str, float]:
    """Draw the picture; returns highest ÷ lowest standard deviation of the weighted loss, by weighting."""
    spread = {}
    with matplotlib.rc_context(LOOKS):
        figure = Figure(figsize=(WIDTH, 5.6))  # no constrained layout: its last digits vary from run to run
        figure.subplots_adjust(left=0.18, right=0.98, bottom=0.13, top=0.95, hspace=0.32)
        loss, weight, balance = figure.subplots(3, 1, sharex=True, height_ratios=(1.3, 1, 1))
        for name, criterion in criteria.items():
            statistics, color = criterion.statistics, COLORS[name]
            seen = statistics.count >= ENOUGH
            centers, mean, weights = criterion.bin_centers[seen], statistics.mean[seen], criterion.weights[seen]
            std = statistics.variance.sqrt()[seen]
            if name == "constant":
                loss.plot(centers, mean, color=color, label="mean")
                loss.plot(centers, std, color=color, linestyle="--", label="std")
            weight.plot(centers, weights, color=color)
            balance.plot(centers, weights * std, color=color, label=NAMES[name])
            spread[name] = float((weights * std).max() / (weights * std).min())
        loss.set_title("The loss depends on the noise level …")
        loss.set_ylabel("loss of one image")
        loss.legend(loc="lower right")
        weight.set_title("… vadiff weights each level by 1/std …")
        weight.set_ylabel("weight w")
        balance.set_title("… and the spread is even")
        balance.set_ylabel("std of\nweighted loss")
        for panel in (loss, weight, balance):
            panel.set_yscale("log", nonpositive="clip")
            panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_locator(NullLocator())
            panel.grid(visible=True)
        balance.set_xlabel("log-SNR (nats)    less noise →")
        figure.legend(*balance.get_legend_handles_labels(), loc="lower center", ncols=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return spread


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS / "picture.svg", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=2000, help="default: %(default)s")
    options = parser.parse_args(arguments)
    images = load_digits().train.flatten(1)
    criteria = {name: train(name, images, options.steps) for name in NAMES}
    for name, factor in picture(criteria, options.out).items():
        print(f"{NAMES[name]:<24} std of the weighted loss, highest ÷ lowest noise level: {factor:.1f}")
    print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
