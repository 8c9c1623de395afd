"""A whole training step of a small U-Net with each provider as its loss: forward, loss, backward, optimizer."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence

import measure
import torch
from cases import MODES, Contest
from contest import make_losses, refuse_wrong, speed_ratios
from measure import Effort, Run
from measurements import Measurement, NotMeasured
from providers import Batch, Loss
from small_unet import SmallUNet
from torch import Tensor

CONTEST = Contest("unet", "fp32", "training-step")
# About 5 ms per step: the sizes were tried on two cores of a Xeon with AVX-512; on a GPU launches decide.
_BATCH = {"cpu": 8, "cuda": 128}
_CHANNELS = {"cpu": 8, "cuda": 64}
_SETS = 16
_SECONDS = {"cpu": 30.0, "cuda": 10.0}


def make_step(network: SmallUNet, loss: Loss, batches: Sequence[tuple[Tensor, Tensor]]) -> Run:
    """One step of AdamW on the next batch (clean images, log-SNR)."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    rotation = itertools.cycle(batches)

    def step() -> None:
        clean, log_snr = next(rotation)
        sigma = (-0.5 * log_snr).exp()[:, None, None, None]
        noisy = (clean + sigma * torch.randn_like(clean)) / (1 + sigma.square()).sqrt()
        optimizer.zero_grad(set_to_none=True)
        loss(Batch(network(noisy, log_snr), clean, log_snr), False).backward()
        optimizer.step()

    return step


def hold(names: Iterable[str], device: torch.device, *, quick: bool) -> list[Measurement | NotMeasured]:
    """As `contest.hold`; each provider trains a copy of the same network."""
    torch.manual_seed(0)
    shape = (_BATCH[device.type], 3, 32, 32)
    network = SmallUNet(_CHANNELS[device.type]).to(device)
    data = [(torch.randn(shape, device=device), 4 * torch.randn(shape[0], device=device)) for _ in range(_SETS)]
    losses, unusable = make_losses(CONTEST, names, device)
    outcomes: list[Measurement | NotMeasured] = [*unusable]
    with torch.no_grad():
        predictions = [network(clean, log_snr) for clean, log_snr in data[:3]]
    outputs = [Batch(p.requires_grad_(), *pair) for p, pair in zip(predictions, data, strict=False)]
    outcomes += refuse_wrong(CONTEST, MODES["fused"], losses, outputs)
    runs = {name: make_step(copy.deepcopy(network), loss, data) for name, loss in losses.items()}
    for run in runs.values():
        run()
    effort = Effort.of(device, quick) if quick else Effort(_SECONDS[device.type], 50, 2000, 0.0)
    times = measure.race(runs, device, effort) if runs else {}
    ratios = speed_ratios(times)
    for name, found in times.items():
        outcomes.append(Measurement.of(CONTEST, name, shape, found, bytes=0, sets=_SETS, times_as_fast_as=ratios[name]))
    return outcomes
