"""One figure of several runs that differ only in the weighting."""

import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...extras import import_extra
from ..pictures import image_grid
from ..training import TrainedRun
from ..training.metrics import stacked

# Okabe & Ito's colour-blind-safe colours; dashes for black-and-white prints.
_STYLES = (("#000000", "-"), ("#E69F00", "--"), ("#0072B2", "-"), ("#009E73", ":"))
_LOG_SNR = "log-SNR  λ = −2 ln σ  (nats)      ← more noise · less noise →"
_ENOUGH = 20.0  # effective number of samples from which a bin is drawn

Styles = Mapping[str, tuple[str, str]]


def comparison_figure(runs: Mapping[str, TrainedRun], samples: Mapping[str, Tensor], real: Tensor) -> Any:
    """Figure of base loss, weights, balance, held-out loss, variance over training and samples of each run.

    Args:
        runs: up to four runs by name, of the same bins and steps; the others are compared with the first.
        samples: of each run, [N, 1, H, W] in [-1, 1]; the same seeds in the same order.
        real: images of the data, [M, 1, H, W], to compare the samples with.

    Returns:
        A `matplotlib.figure.Figure`; `figure.savefig(path)` writes it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = import_extra("matplotlib.figure", "report").Figure(figsize=(16, 19.5), dpi=100, facecolor="white")
    heading, losses, weights, heatmaps, grids = figure.subfigures(5, 1, height_ratios=(1.6, 4.5, 4.5, 4.6, 4.3))
    styles = {name: _STYLES[i] for i, name in enumerate(runs)}
    _heading(heading, runs, styles)
    _base_losses(losses, runs, styles)
    _weights_and_their_effect(weights, runs, styles)
    _variance_heatmaps(heatmaps, runs)
    _sample_grids(grids, runs, samples, real)
    return figure


def _heading(area: Any, runs: Mapping[str, TrainedRun], styles: Styles) -> None:
    config = next(iter(runs.values())).config
    area.text(0.05, 0.86, "One loss, three ways to weight its noise levels", fontsize=20, weight="bold", va="top")
    text = (
        f"A small U-Net learned to remove noise from 8 × 8 handwritten digits, {len(runs)} times: {config.steps:,} "
        f"steps of {config.batch_size} images, starting from the same network, with the same images and noise. Only "
        "the weight w of each noise level differs. “Base loss” is the loss of one image before that weight. Constant: "
        "w = 1. Loss level: w ∝ 1 / mean of the base loss at that noise level. Variance aware: w ∝ 1 / standard "
        "deviation of the base loss at that noise level. The last two scale w such that the "
        "total loss stays as it is."
    )
    area.text(0.05, 0.56, textwrap.fill(text, 178), fontsize=11, va="top", linespacing=1.4)
    line = import_extra("matplotlib.lines", "report").Line2D
    handles = [
        line([], [], color=color, linestyle=dash, linewidth=3, label=_title_of(name))
        for name, (color, dash) in styles.items()
    ]
    area.legend(handles=handles, loc="upper right", bbox_to_anchor=(0.98, 0.97), ncols=4, frameon=False, fontsize=14)


def _base_losses(area: Any, runs: Mapping[str, TrainedRun], styles: Styles) -> None:
    panels = _panels(area, len(runs), sharey=True)
    first = next(iter(runs))
    for panel, (name, run) in zip(panels, runs.items(), strict=True):
        color, _ = styles[name]
        centers, mean, std, _ = _final(run)
        panel.fill_between(centers, (mean - std).clip(min=0), mean + std, color=color, alpha=0.25, linewidth=0)
        panel.plot(centers, mean, color=color, linewidth=2)
        if name != first:
            reference_centers, reference, _, _ = _final(runs[first])
            panel.plot(reference_centers, reference, color=styles[first][0], linewidth=0.8)
        caption = "Line: mean over recent training images; band: ± 1 standard deviation. Look for where "
        if name == first:
            caption += "the line is high (hard to learn) and the band wide (one image says little)."
        else:
            caption = caption.replace("deviation.", f"deviation; thin: mean with {_title_of(first)} weight.")
            caption += "the lines part: a lower line has learned better."
        _describe(panel, f"Base loss · {_title_of(name)}", caption)
        panel.set_ylim(bottom=0)
    panels[0].set_ylabel("base loss, per pixel  (1 ≈ untrained)")


def spread_of(run: TrainedRun) -> float:
    """Highest ÷ lowest standard deviation of the weighted loss, over the bins with enough samples."""
    _, _, std, weights = _final(run)
    return float((weights * std).max() / (weights * std).min())


def _weights_and_their_effect(area: Any, runs: Mapping[str, TrainedRun], styles: Styles) -> None:
    weight, balance, held_out = _panels(area, 3, sharey=False)
    first = next(iter(runs.values())).held_out
    spread = []
    for name, run in runs.items():
        color, dash = styles[name]
        centers, _, std, weights = _final(run)
        weight.plot(centers, weights, color=color, linestyle=dash, linewidth=2)
        balance.plot(centers, weights * std, color=color, linestyle=dash, linewidth=2)
        spread.append(f"{_title_of(name)} {spread_of(run):.1f}")
        ratio, error = (values.numpy() for values in run.held_out.ratio_to(first))
        levels = run.held_out.log_snr.numpy()
        held_out.set_xlim(levels.min() - 0.5, levels.max() + 0.5)
        held_out.plot(levels, ratio, color=color, linestyle=dash, linewidth=2, marker="o", markersize=4)
        held_out.fill_between(levels, ratio - error, ratio + error, color=color, alpha=0.2, linewidth=0)
    _describe(
        weight,
        "Weight of each noise level",
        "Factor of the base loss at the end of training. Look for values above 1: these noise levels now count for "
        "more than without weights.",
    )
    weight.set_ylabel("weight w")
    weight.set_ylim(bottom=0)
    _describe(
        balance,
        "Balance: spread of the weighted loss",
        f"Standard deviation of w × base loss. Look for a flat line, the aim of variance-aware weighting. "
        f"Highest ÷ lowest: {', '.join(spread)}.",
    )
    balance.set_ylabel("standard deviation of w × base loss")
    balance.set_ylim(bottom=0)
    _describe(
        held_out,
        f"Held-out loss, relative to {_title_of(next(iter(runs)))}",
        "Base loss on digits never trained on; below 1 is better. Look for gains at the cost of other levels. Band: "
        "standard error over images, one seed. Grey: outer 5 % of training.",
    )
    for outside in _seldom_trained(next(iter(runs.values()))):
        held_out.axvspan(*outside, color="0.92", zorder=0)
    held_out.set_ylabel("ratio of held-out losses")


def _variance_heatmaps(area: Any, runs: Mapping[str, TrainedRun]) -> None:
    panels = _panels(area, len(runs), sharey=True, right=0.915)
    maps = {}  # name → [R, K] log10 of the variance, NaN where too few samples were seen
    for name, run in runs.items():
        count, variance = (stacked(run.metrics, "statistics", key) for key in ("count", "variance"))
        maps[name] = variance.where(count >= _enough(count[-1]), torch.nan).clamp(min=1e-12).log10()
    everything = torch.cat([values[~values.isnan()] for values in maps.values()])
    low, high = torch.quantile(everything, torch.tensor([0.01, 0.99], dtype=everything.dtype)).tolist()
    for panel, (name, run) in zip(panels, runs.items(), strict=True):
        bins = run.criterion.statistics.bins
        image = panel.imshow(
            maps[name].T.numpy(),
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            extent=(0, run.metrics[-1]["step"], bins.low, bins.high),
            cmap="cividis",
            vmin=low,
            vmax=high,
        )
        _describe(
            panel,
            f"Variance over training · {_title_of(name)}",
            "Variance of the base loss between images, before the weight. Look for how it falls with training, and "
            "where it stays bright. White: too few images yet.",
        )
        panel.set_xlabel("training step")
        panel.set_ylim(*_shown_range(runs))
    panels[0].set_ylabel("log-SNR  λ  (nats)      less noise →")
    color_bar = area.colorbar(image, cax=area.add_axes((0.93, 0.13, 0.012, 0.59)), extend="both")
    color_bar.set_label("log₁₀ of the base loss's variance")


def _sample_grids(area: Any, runs: Mapping[str, TrainedRun], samples: Mapping[str, Tensor], real: Tensor) -> None:
    panels = area.subplots(1, len(runs) + 1)
    area.subplots_adjust(left=0.05, right=0.98, top=0.78, bottom=0.02, wspace=0.1)
    number = min(len(images) for images in samples.values())
    grids = {"Real digits": real[:number]} | {f"Samples · {_title_of(name)}": samples[name] for name in runs}
    captions = ["Held-out images: what samples should look like, in variety and in clean strokes."]
    captions += ["Each place starts from the same noise in every grid. Look for broken or smeared strokes."] * len(runs)
    for panel, (title, images), caption in zip(panels, grids.items(), captions, strict=True):
        panel.imshow(
            image_grid(images, columns=8).squeeze(2).numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest"
        )
        panel.set_axis_off()
        _title(panel, title, caption, width=48, lines=2)


def _panels(area: Any, number: int, *, sharey: bool, right: float = 0.98) -> Any:
    panels = area.subplots(1, number, sharey=sharey)
    area.subplots_adjust(left=0.05, right=right, top=0.72, bottom=0.13, wspace=0.08 if sharey else 0.18)
    return panels


def _describe(panel: Any, title: str, caption: str) -> None:
    _title(panel, title, caption, width=60, lines=3)
    panel.set_xlabel(_LOG_SNR)
    panel.grid(alpha=0.3, linewidth=0.6)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _title(panel: Any, title: str, caption: str, width: int, lines: int) -> None:
    """Write title in bold and a caption of at most `lines` lines above the panel."""
    place = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points", "va": "top"}
    panel.annotate(title, xytext=(0, 27 + 14 * lines), fontsize=13, weight="bold", **place)
    panel.annotate(textwrap.fill(caption, width), xytext=(0, 8 + 14 * lines), fontsize=10, linespacing=1.25, **place)


def _final(run: TrainedRun) -> tuple[Any, Any, Any, Any]:
    """Bin centres, mean and standard deviation of the base loss, and weights at the end of a run, as arrays [k].

    Only bins with enough samples are included.
    """
    statistics = run.criterion.statistics
    seen = (statistics.count >= _enough(statistics.count)).cpu()
    values = (run.criterion.bin_centers, statistics.mean, statistics.variance.sqrt(), run.criterion.weights)
    centers, mean, std, weights = (value.cpu()[seen].numpy() for value in values)
    return centers, mean, std, weights


def _shown_range(runs: Mapping[str, TrainedRun]) -> tuple[float, float]:
    """Lowest and highest log-SNR among the drawn bins of all runs."""
    centers = [_final(run)[0] for run in runs.values()]
    width = next(iter(runs.values())).criterion.statistics.bins.width
    return min(c.min() for c in centers) - width / 2, max(c.max() for c in centers) + width / 2


def _seldom_trained(run: TrainedRun) -> tuple[tuple[float, float], tuple[float, float]]:
    """The log-SNR below and above the central 95 % of the noise levels of training."""
    middle, reach = -2.0 * run.config.p_mean, 1.96 * 2.0 * run.config.p_std
    return (-100.0, middle - reach), (middle + reach, 100.0)


def _enough(count: Tensor) -> float:
    """Minimum number of samples for a bin to be drawn; fewer in very short runs."""
    return min(_ENOUGH, count.max().item() / 2)


def _title_of(name: str) -> str:
    return name.replace("_", " ")
