"""The figures of edm2.py that `vadiff report` does not have."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from vadiff.trainer.data.digits import SIGMA_DATA
from vadiff.trainer.training.held_out import level_mean
from vadiff.trainer.training.metrics import stacked
from vadiff.training import HeldOutLoss

COLORS = {"classic": "#0072B2", "edm2": "#D55E00"}
LABELS = {"classic": "classic U-Net", "edm2": "EDM2, config G"}


def curves_figure(lines: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Figure:
    """Held-out x0 loss over training, geometric mean over noise levels: mean and range of the seeds.

    Args:
        lines: network → seed → lines of metrics.jsonl.
    """
    figure, panel = _panel("images seen", "held-out x0 loss, geometric mean over noise levels")
    for network, seeds in lines.items():
        measured = [[line for line in run if "held_out" in line] for run in seeds]
        images = [line["images"] for line in measured[0]]
        log_snr = torch.tensor(measured[0][0]["held_out"]["log_snr"])
        losses = np.stack(
            [
                level_mean(stacked(run, "held_out", "loss_ema"), log_snr, sigma_data=SIGMA_DATA).numpy()
                for run in measured
            ]
        )
        color = COLORS[network]
        panel.plot(images, losses.mean(0), color=color, linewidth=2, label=f"{LABELS[network]}: mean of {len(seeds)}")
        panel.fill_between(
            images, losses.min(0), losses.max(0), color=color, alpha=0.25, linewidth=0, label="lowest to highest seed"
        )
    panel.set_yscale("log")
    panel.legend(frameon=False)
    return figure


def rates_figure(scores: Mapping[str, Mapping[float, float]], chosen: Mapping[str, float]) -> Figure:
    """Validation loss of both networks by learning rate."""
    figure, panel = _panel("learning rate", "loss on the held-out images that choose")
    for network, rates in scores.items():
        color, best = COLORS[network], chosen[network]
        panel.plot(list(rates), list(rates.values()), color=color, marker="o", linewidth=2, label=LABELS[network])
        panel.plot([best], [rates[best]], "o", color=color, markersize=14, fillstyle="none", label=f"chosen: {best:g}")
    panel.set_xscale("log")
    panel.legend(frameon=False)
    return figure


def held_out_figure(losses: Mapping[str, Sequence[HeldOutLoss]]) -> Figure:
    """Loss per noise level of both networks, and their ratio paired by seed."""
    figure = Figure(figsize=(12, 4.4), facecolor="white", layout="constrained")
    absolute, ratio = figure.subplots(1, 2)
    sigma = (-0.5 * losses["edm2"][0].log_snr).exp()
    for network, seeds in losses.items():
        for place, loss in enumerate(seeds):
            label = None if place else LABELS[network]
            absolute.plot(sigma, loss.mean, color=COLORS[network], label=label, linewidth=1.6)
    for classic, edm2 in zip(losses["classic"], losses["edm2"], strict=True):
        value, error = edm2.ratio_to(classic)
        ratio.errorbar(sigma, value, 2 * error, color=COLORS["edm2"], linewidth=1.6, capsize=2)
    ratio.axhline(1.0, color=COLORS["classic"], linewidth=1.6)
    absolute.set_ylabel("held-out EDM loss, mean per pixel")
    ratio.set_ylabel("EDM2 ÷ classic, each seed, ± 2 s.e.")
    absolute.legend(frameon=False)
    for panel in (absolute, ratio):
        panel.set_xscale("log")
        panel.set_xlabel("noise level σ   (averages of the width chosen)")
        panel.grid(alpha=0.25)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Save as a PNG of few colours, to keep the file small."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=90)
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(64).save(path, optimize=True)


def _panel(xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.5, 4.6), facecolor="white", layout="constrained")
    panel = figure.subplots()
    panel.set_xlabel(xlabel)
    panel.set_ylabel(ylabel)
    panel.grid(alpha=0.25, which="both")
    return figure, panel
