"""A whole training step of a small U-Net with each provider as its loss: forward, loss, backward, optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import measure
import torch
from cases import MODES, Contest
from contest import make_losses, refuse_wrong, speed_ratios
from measure import Effort, Run
from measurements import Measurement, NotMeasured
from providers import Batch, Loss
from small_unet import SmallUNet
from torch import Tensor

MODE = "training-step"


class Size(NamedTuple):
    """Batch and network of a step."""

    batch: int
    channels: int
    patch: int


# About 5 ms per step on two cores of a Xeon with AVX-512, once with few and once, in patches, with many elements in the
# loss. On a GPU one step is 440 GFLOP of convolutions (0.86 per image, forward and backward) and some 60 passes over
# 134 MB: 5 to 8 ms, assuming 100 TFLOP/s in TF32, cuDNN's default, and memory of 4 TB/s, as of an H200. Its some 200
# launches take the host half of that, so the GPU determines the time.
SIZES = {
    "cpu": {Contest("unet-8", "fp32", MODE): Size(8, 8, 1), Contest("unet-64", "fp32", MODE): Size(64, 8, 4)},
    "cuda": {Contest("unet-512", "fp32", MODE): Size(512, 64, 1)},
}
_SETS = 16
# Per size. Several steps in a row, as in training: after the step of another provider a loss's code is not cached.
_EFFORT = {"cpu": Effort(40.0, 50, 2000, 0.03), "cuda": Effort(8.0, 25, 2000, 0.03)}


def make_step(
    network: SmallUNet, optimizer: torch.optim.Optimizer, loss: Loss, batches: Sequence[tuple[Tensor, Tensor]]
) -> Run:
    """One step on the next batch (clean images, log-SNR)."""
    rotation = itertools.cycle(batches)

    def step() -> None:
        clean, log_snr = next(rotation)
        sigma = (-0.5 * log_snr).exp()[:, None, None, None]
        noisy = (clean + sigma * torch.randn_like(clean)) / (1 + sigma.square()).sqrt()
        optimizer.zero_grad(set_to_none=True)
        loss(Batch(network(noisy, log_snr), clean, log_snr), False).backward()
        optimizer.step()

    return step


def hold(
    contest: Contest, names: Iterable[str], device: torch.device, *, quick: bool
) -> list[Measurement | NotMeasured]:
    """As `contest.hold`. All providers train one network: copies at other addresses differ by half a per cent in
    speed."""
    torch.manual_seed(0)
    batch, channels, patch = SIZES[device.type][contest]
    shape = (batch, 3, 32, 32)
    network = SmallUNet(channels, patch).to(device)
    data = [(torch.randn(shape, device=device), 4 * torch.randn(shape[0], device=device)) for _ in range(_SETS)]
    losses, unusable = make_losses(contest, names, device)
    outcomes: list[Measurement | NotMeasured] = [*unusable]
    with torch.no_grad():
        predictions = [network(clean, log_snr) for clean, log_snr in data[:3]]
    outputs = [Batch(p.requires_grad_(), *pair) for p, pair in zip(predictions, data, strict=False)]
    outcomes += refuse_wrong(contest, MODES["fused"], losses, outputs)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    runs = {name: make_step(network, optimizer, loss, data) for name, loss in losses.items()}
    for run in runs.values():
        run()
    effort = Effort.of(device, quick) if quick else _EFFORT[device.type]
    times = measure.race(runs, device, effort) if runs else {}
    ratios = speed_ratios(times)
    for name, found in times.items():
        outcomes.append(Measurement.of(contest, name, shape, found, bytes=0, sets=_SETS, times_as_fast_as=ratios[name]))
    return outcomes
