"""Charts of the held-out loss: per noise level, against another run, and over training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..training.held_out import level_mean
from .charts import aligned, band, draw_spread, images_axis, plain_log_ticks, slug, styles_of
from .runs import Array, Group, History
from .style import LOG_SNR, Chart

LOSS = "held-out EDM loss, per pixel"


def held_out_levels(
    log_snr: Array,
    raw: Array,
    ema: Array,
    name: str = "held-out",
    group: str = "",
    limits: tuple[float, float] | None = None,
) -> Chart:
    """Held-out loss per noise level, raw and averaged weights; log_snr [L], losses [L] or [seeds, L].

    `limits` are those of the vertical axis, for several such charts side by side.
    """

    def draw(panel: Any) -> None:
        for values, color, dash, label in (
            (raw, "#D55E00", "--", "raw weights"),
            (ema, "#0072B2", "-", "averaged weights (EMA)"),
        ):
            draw_spread(panel, log_snr, np.atleast_2d(values), color, dash, label, marker="o")
        panel.set_xlabel(LOG_SNR)
        panel.set_ylabel(LOSS)
        panel.set_yscale("log")
        panel.set_ylim(limits)
        plain_log_ticks(panel.yaxis)

    caption = (
        "Loss on images never trained on, with the same noise for every run and checkpoint. Look for levels where the "
        "averaged weights are worse than the raw ones: there the average is too long."
    )
    return Chart(name, "Held-out loss per noise level", caption, draw, group)


def final_levels(groups: Sequence[Group]) -> list[Chart]:
    """`held_out_levels` of each group's last measurement, with common axes."""
    losses = [[_last(group, name)[1] for name in ("loss_raw", "loss_ema")] for group in groups]
    everything = np.concatenate([values.ravel() for both in losses for values in both])
    limits = (0.93 * float(np.nanmin(everything)), 1.07 * float(np.nanmax(everything)))
    return [
        held_out_levels(_last(group, "log_snr")[0], raw, ema, f"held-out-{slug(group.label)}", group.label, limits)
        for group, (raw, ema) in zip(groups, losses, strict=True)
    ]


def ratio_to_first(groups: Sequence[Group]) -> Chart:
    """Held-out loss of averaged weights per noise level, relative to the first group; paired by seed where possible."""
    first = groups[0]

    def draw(panel: Any) -> None:
        panel.axhline(1.0, color=styles_of(groups)[first.label].color, linewidth=1.9, label=first.label)
        for group in groups[1:]:
            color, dash = styles_of(groups)[group.label]
            log_snr, rows = paired_ratios(group, first)
            draw_spread(panel, log_snr, rows, color, dash, group.label, marker="o")
        panel.set_xlabel(LOG_SNR)
        panel.set_ylabel(f"held-out loss ÷ that of {first.label}")

    caption = (
        f"Below 1: better than {first.label} on images never trained on, same images and noise. Look for gains at some "
        "noise levels that come with losses at others." + band(groups)
    )
    return Chart("held-out-ratio", f"Held-out loss relative to {first.label}", caption, draw)


def over_training(groups: Sequence[Group]) -> Chart:
    """Mean over the noise levels of the held-out loss (`level_mean`), averaged weights, against images seen."""

    def draw(panel: Any) -> None:
        for group, (color, dash) in zip(groups, styles_of(groups).values(), strict=True):
            images, rows = aligned(
                [[(at, mean_of(run, found, "ema")) for at, found in run.held_out] for run in group.runs]
            )
            draw_spread(
                panel, images, rows, color, dash, group.label if len(groups) > 1 else "averaged weights (EMA)", "o"
            )
            if len(groups) == 1:
                images, rows = aligned(
                    [[(at, mean_of(run, found, "raw")) for at, found in run.held_out] for run in group.runs]
                )
                draw_spread(panel, images, rows, "#D55E00", "--", "raw weights", "o")
        images_axis(panel)
        panel.set_ylabel("held-out x0 loss, per pixel")
        panel.set_yscale("log")
        plain_log_ticks(panel.yaxis)

    caption = (
        "Squared error of the estimated image on images never trained on: geometric mean over noise levels, so that "
        "every level counts alike. Look for "
        "a curve that turns upwards (overfitting), or one that still falls (train longer)." + band(groups)
    )
    return Chart("held-out-over-training", "Held-out loss over training", caption, draw)


def mean_of(run: History, measured: Mapping[str, Array], weights: str) -> float:
    """`level_mean` of one measurement of a run's held-out loss, with "ema" or "raw" weights."""
    loss, log_snr = (torch.from_numpy(measured[name]) for name in (f"loss_{weights}", "log_snr"))
    return float(level_mean(loss, log_snr, sigma_data=run.config["sigma_data"]))


def has_held_out(groups: Sequence[Group]) -> bool:
    """Whether every run was measured on held-out images."""
    return all(run.held_out for group in groups for run in group.runs)


def comparable(groups: Sequence[Group]) -> bool:
    """Whether all runs were last measured at the same noise levels."""
    levels = [run.held_out[-1][1]["log_snr"] for group in groups for run in group.runs if run.held_out]
    return all(len(found) == len(levels[0]) and np.allclose(found, levels[0]) for found in levels)


def _last(group: Group, name: str) -> tuple[Array, Array]:
    """(log_snr [L], last held-out losses [seeds, L])."""
    common = set.intersection(*({at for at, _ in run.held_out} for run in group.runs))
    found = [dict(run.held_out)[max(common)] if common else run.held_out[-1][1] for run in group.runs]
    return found[0]["log_snr"], np.stack([values[name] for values in found])


def paired_ratios(group: Group, first: Group) -> tuple[Array, Array]:
    """(log_snr [L], ratios [n, L]): paired by seed if both groups have the seed, else to the mean of the first."""
    log_snr, reference = _last(first, "loss_ema")
    by_seed = {run.config["seed"]: losses for run, losses in zip(first.runs, reference, strict=True)}
    _, losses = _last(group, "loss_ema")
    mean = np.exp(np.log(reference).mean(0))
    rows = [row / by_seed.get(run.config["seed"], mean) for run, row in zip(group.runs, losses, strict=True)]
    return log_snr, np.stack(rows)
