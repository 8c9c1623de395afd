"""The training loop, top to bottom: config, data, network, criterion, steps, log, save."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..data import load_digits
from ..data.digits import SIGMA_DATA
from ..extras import import_extra
from ..loss import DiffusionLoss
from ..models import Denoiser, digits_unet
from ..weighting import Weighting, from_name, takes_prediction_type
from .checkpoint import save_checkpoint
from .config import TrainConfig
from .held_out import HeldOutLoss, held_out_loss
from .history import History, append_metrics
from .objective import Objective, edm_objective


@dataclass
class TrainedRun:
    """What training returns."""

    config: TrainConfig
    denoiser: Denoiser  # averaged weights, eval mode, on the training device
    criterion: DiffusionLoss
    history: History
    held_out: HeldOutLoss


def train(
    config: TrainConfig,
    objective: Objective = edm_objective,
    *,
    out: str | Path | None = None,
    progress: bool = True,
) -> TrainedRun:
    """Train a small U-Net on handwritten digits.

    Args:
        config: everything about the run.
        objective: how a step calls the criterion; EDM's objective by default.
        out: folder for `metrics.jsonl`, written as training goes, and `checkpoint.pt`, written at the end;
            files of these names are replaced. None writes nothing.
        progress: show a progress bar where stderr is a terminal.

    Returns:
        The averaged denoiser, the criterion, its history and the loss on held-out images.

    Raises:
        MissingExtraError: diffusers, scikit-learn or tqdm is not installed.
    """
    device = config.torch_device()
    seeds = _seeds(config)
    digits = load_digits()
    images = digits.train.to(device)
    denoiser = _initial_denoiser(config, seeds["weights"]).to(device)
    average = AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    criterion = DiffusionLoss(
        weighting=_weighting(config),
        bins=config.bins,
        log_snr_range=config.log_snr_range,
        half_life=config.half_life,
        backend=config.backend,
    ).to(device)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / config.warmup, 1.0) * (1.0 - step / config.steps)
    )

    batches = _batches(len(images), config.batch_size, seeds["order"])
    levels, noise = (torch.Generator().manual_seed(seeds[name]) for name in ("levels", "noise"))
    metrics = None if out is None else Path(out) / "metrics.jsonl"
    if metrics is not None:
        metrics.parent.mkdir(parents=True, exist_ok=True)
        metrics.write_text("")
    history = History()
    loss_sum = torch.zeros((), device=device)  # read only when logged, so that no step waits for the device
    tqdm = import_extra("tqdm", "train").tqdm
    quiet = None if progress else True  # None: a bar where stderr is a terminal
    with tqdm(total=config.steps, unit="step", desc=config.name, disable=quiet, file=sys.stderr) as bar:
        for step in range(1, config.steps + 1):
            x0 = images[next(batches).to(device)]  # [B, 1, 8, 8]
            sigma = (config.p_mean + config.p_std * torch.randn(len(x0), generator=levels)).exp().to(device)
            eps = torch.randn(x0.shape, generator=noise).to(device)
            output = denoiser.network_output(x0 + sigma.view(-1, 1, 1, 1) * eps, sigma)
            loss = objective(criterion, output, x0, eps, sigma, SIGMA_DATA)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(denoiser)

            loss_sum += loss.detach()
            bar.update()
            if step % config.log_every == 0 or step == config.steps:
                steps_since = step - (history.steps[-1] if history.steps else 0)
                history.add(step, loss_sum.item() / steps_since, criterion)
                loss_sum.zero_()
                append_metrics(metrics, step, step * config.batch_size, history.loss[-1], criterion)
                bar.set_postfix(loss=f"{history.loss[-1]:.4f}")

    averaged = cast(Denoiser, average.module).eval()
    held_out = held_out_loss(averaged, digits.held_out, draws=config.held_out_draws)
    append_metrics(metrics, step, step * config.batch_size, history.loss[-1], criterion, held_out)
    if out is not None:
        content = {"step": step, "config": config.as_dict(), "model": denoiser.state_dict()}
        content |= {"ema": averaged.state_dict(), "criterion": criterion.state_dict()}
        save_checkpoint(Path(out) / "checkpoint.pt", content | {"history": history.as_dict()})
    return TrainedRun(config, averaged, criterion, history, held_out)


def _weighting(config: TrainConfig) -> Weighting:
    if takes_prediction_type(config.weighting):  # the bare name means a loss in the form of eps; this one is in F's
        return from_name(config.weighting, prediction_type="edm", sigma_data=SIGMA_DATA)
    return from_name(config.weighting)


def _seeds(config: TrainConfig) -> dict[str, int]:
    """Independent streams, so that runs which differ in one thing share all the others."""
    data_seed = config.seed if config.data_seed is None else config.data_seed
    streams = {
        "weights": (config.seed, 0),
        "order": (data_seed, 1),
        "levels": (data_seed, 2),
        "noise": (data_seed, 3),
    }
    return {name: int(np.random.SeedSequence(key).generate_state(1)[0]) for name, key in streams.items()}


def _initial_denoiser(config: TrainConfig, seed: int) -> Denoiser:
    with torch.random.fork_rng(devices=[]):  # layers draw from the global generator, which stays as it was
        torch.default_generator.manual_seed(seed)
        return Denoiser(digits_unet(config.channels), SIGMA_DATA)


def _batches(size: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices [batch_size] into the images: one shuffled pass after the other, every batch full."""
    order = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < batch_size:
            waiting = torch.cat([waiting, torch.randperm(size, generator=order)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]
