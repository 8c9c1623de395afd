"""A LightningModule that trains with F.mse_loss, and one with adaptive weights, logged per noise level.

    python examples/lightning_module.py --steps 200

The lines that change are the loss and the criterion, an attribute: Lightning moves, saves and restores the criterion.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import vadiff
from vadiff.integrations.lightning import StatisticsLogger


class Diffusion(pl.LightningModule):
    """Predicts the noise in x_t = cos(πt/2)·x0 + sin(πt/2)·eps."""

    def __init__(self, with_vadiff: bool, width: int = 48) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(width, 1, 3, padding=1)
        self.criterion = vadiff.DiffusionLoss() if with_vadiff else None  # changes
        self.times: list[float] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.first(x)
        time = self.time(t[:, None])[:, :, None, None]
        for block in self.blocks:
            hidden = hidden + block(F.silu(hidden + time))
        return self.last(F.silu(hidden))

    def predict_noise(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prediction, noise and log-SNR of noise levels t ~ U(0, 1)."""
        t, noise = torch.rand(len(clean), device=clean.device), torch.randn_like(clean)
        angle = t.clamp(1e-3, 1 - 1e-3)[:, None, None, None] * torch.pi / 2
        return self(angle.cos() * clean + angle.sin() * noise, t), noise, -2 * angle.flatten().tan().log()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        prediction, noise, log_snr = self.predict_noise(batch[0])
        if self.criterion is None:
            return F.mse_loss(prediction, noise)
        return self.criterion(prediction, noise, log_snr)  # changes

    def optimizer_step(self, *given: Any, **options: Any) -> None:
        start = time.perf_counter()
        super().optimizer_step(*given, **options)  # includes forward and backward
        self.times.append(time.perf_counter() - start)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


@torch.no_grad()
def held_out_loss(module: Diffusion, images: Tensor) -> float:
    """The plain objective on images that were not trained on, with the same noise every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        prediction, noise, _ = module.predict_noise(images.repeat(4, 1, 1, 1))
        return float(F.mse_loss(prediction, noise))


def train(name: str, steps: int, with_vadiff: bool, folder: str) -> None:
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1  # [1797, 1, 8, 8]
    data = TensorDataset(images[:1500])
    loader = DataLoader(data, batch_size=64, sampler=RandomSampler(data, replacement=True, num_samples=64 * steps))
    module = Diffusion(with_vadiff)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[StatisticsLogger(every_n_steps=50)] if with_vadiff else [],  # changes
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = held_out_loss(module, images[1500:])
    trainer.fit(module, loader)
    milliseconds = 1e3 * statistics.median(module.times)  # the first steps warm up
    after = held_out_loss(module, images[1500:])
    print(f"{name:<22} {before:>12.4f} {after:>12.4f} {milliseconds:>12.2f}")
    if with_vadiff:
        print(module.criterion.summary())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    print(f"{'trainer':<22} {'loss before':>12} {'loss after':>12} {'ms per step':>12}")
    with tempfile.TemporaryDirectory() as folder:
        train("Lightning", options.steps, with_vadiff=False, folder=folder)
        train("Lightning with vadiff", options.steps, with_vadiff=True, folder=folder)
    print("Loss: of held-out images, unweighted. One seed, few steps: a small difference shows nothing.")
