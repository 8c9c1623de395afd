"""How good a run's averaged weights are, over the width of the average."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..extras import import_extra
from ..training import HeldOutLoss


def sweep_scores(losses: Mapping[Any, HeldOutLoss]) -> dict[Any, float]:
    """Geometric mean over the noise levels of each held-out loss."""
    return {name: math.exp(float(loss.mean.double().log().mean())) for name, loss in losses.items()}


def sweep_figure(
    losses: Mapping[float, HeldOutLoss], others: Mapping[str, HeldOutLoss], kept: tuple[float, ...] = ()
) -> Any:
    """Held-out loss over σ_rel: of all noise levels together, and of each one against its lowest.

    Args:
        losses: of each width, on the same images, levels and noise.
        others: of other weights of the run, drawn as horizontal lines.
        kept: the widths that were kept while training; marked.

    Returns:
        A `matplotlib.figure.Figure`; `figure.savefig(path)` writes it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = import_extra("matplotlib", "report")
    figure = import_extra("matplotlib.figure", "report").Figure(
        figsize=(12.5, 4.6), dpi=120, facecolor="white", layout="constrained"
    )
    overall, by_level = figure.subplots(1, 2)
    widths = sorted(losses)
    scores = sweep_scores(losses)
    overall.plot(widths, [scores[width] for width in widths], color="#0072B2", marker="o", markersize=4, linewidth=2)
    stored = [width for width in widths if width in kept]
    if stored:
        overall.plot(stored, [scores[width] for width in stored], "s", color="#D55E00", label="kept while training")
    for (name, score), dash in zip(sweep_scores(others).items(), ("--", ":", "-."), strict=False):
        overall.axhline(score, color="#888888", linestyle=dash, linewidth=1.5, label=name)
    overall.set_ylabel("held-out EDM loss, geometric mean over noise levels")
    overall.legend(frameon=False)
    per_level = np.stack([losses[width].mean.double().numpy() for width in widths])  # [W, L]
    ratio = per_level / per_level.min(0)
    sigmas = np.exp(-0.5 * losses[widths[0]].log_snr.double().numpy())
    colors = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.92, len(sigmas)))
    for level, (sigma, color) in enumerate(zip(sigmas, colors, strict=True)):
        by_level.plot(widths, ratio[:, level], color=color, linewidth=1.5, label=f"σ = {sigma:.2g}")
    by_level.set_ylabel("held-out loss ÷ lowest at that noise level")
    by_level.legend(frameon=False, fontsize=8, ncols=2)
    for panel in (overall, by_level):
        panel.set_xlabel("width of the average, σ_rel      ← less averaging · more averaging →")
        panel.grid(alpha=0.25)
    return figure
