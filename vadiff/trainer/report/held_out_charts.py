"""Charts of the held-out loss: per noise level, against another run, and over training."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..training.held_out import level_mean
from .charts import band, styles_of
from .runs import Array, Group, History
from .style import (
    IMAGES,
    LOG_SNR,
    ONLY,
    OTHER,
    Chart,
    add_spread,
    images_axis,
    log_axis,
    log_snr_axis,
    make_room_for_legend,
    new_figure,
    text,
)
from .training_charts import aligned

_LOSS = "held-out EDM loss, per pixel"
_EMA, _RAW = "averaged weights (EMA)", "raw weights"


def final_levels(groups: Sequence[Group]) -> Chart:
    """Held-out loss per noise level at each group's last measurement; of several, raw weights when they are chosen."""
    figure = new_figure(LOG_SNR, _LOSS)
    everything = []
    for group, style in zip(groups, styles_of(groups).values(), strict=True):
        for name in ("loss_ema", "loss_raw"):
            log_snr, rows = _last(group, name)
            everything.append(rows)
            raw = name == "loss_raw"
            label = f"{group.label}, raw" if raw else group.label
            if len(groups) == 1:
                label, style = (_RAW, OTHER) if raw else (_EMA, ONLY)
            shown = "legendonly" if raw and len(groups) > 1 else True
            drawn = style._replace(dash="dot") if raw else style
            add_spread(figure, log_snr, rows, drawn, label, markers=True, visible=shown)
    log_snr_axis(figure)
    log_axis(figure, *everything)
    make_room_for_legend(figure, 2 * len(groups))
    caption = (
        "Loss on images never trained on, with the same noise for every run and checkpoint. Look for levels where the "
        "averaged weights are worse than the raw ones: there the average is too long."
    )
    if len(groups) > 1:
        caption += " Averaged weights (EMA) are shown; choose raw ones in the legend."
    return Chart("held-out", "Held-out loss per noise level", caption + band(groups), figure)


def ratio_to_first(groups: Sequence[Group]) -> Chart:
    """Held-out loss of averaged weights per noise level, relative to the first group; paired by seed where possible."""
    first = groups[0]
    figure = new_figure(LOG_SNR, f"held-out loss ÷ that of {text(first.label)}")
    for group, style in zip(groups, styles_of(groups).values(), strict=True):
        log_snr, rows = paired_ratios(group, first)
        rows = np.ones((1, len(log_snr))) if group is first else rows
        add_spread(
            figure,
            log_snr,
            rows,
            style,
            group.label,
            unit=" ×",
            markers=group is not first,
        )
    log_snr_axis(figure)
    figure.update_yaxes(ticksuffix=" ×")
    make_room_for_legend(figure, len(groups))
    caption = (
        f"Below 1 ×: better than {first.label} on images never trained on, same images and noise. Look for gains at "
        "some noise levels that come with losses at others." + band(groups)
    )
    return Chart("held-out-ratio", f"Held-out loss relative to {first.label}", caption, figure)


def over_training(groups: Sequence[Group]) -> Chart:
    """Mean over the noise levels of the held-out loss (`level_mean`), averaged weights, against images seen."""
    figure = new_figure(IMAGES, "held-out x0 loss, per pixel")
    everything = []
    for group, style in zip(groups, styles_of(groups).values(), strict=True):
        for weights in ("ema", "raw") if len(groups) == 1 else ("ema",):
            images, rows = aligned(
                [[(at, mean_of(run, found, weights)) for at, found in run.held_out] for run in group.runs]
            )
            everything.append(rows)
            label = group.label
            if len(groups) == 1:
                label, style = (_EMA, ONLY) if weights == "ema" else (_RAW, OTHER)
            add_spread(figure, images, rows, style, label, markers=True)
    images_axis(figure)
    log_axis(figure, *everything)
    make_room_for_legend(figure, max(2, len(groups)))
    caption = (
        "Squared error of the estimated image on images never trained on: geometric mean over noise levels, so that "
        "every level counts alike. Look for "
        "a curve that turns upwards (overfitting), or one that still falls (train longer)." + band(groups)
    )
    return Chart("held-out-over-training", "Held-out loss over training", caption, figure)


def mean_of(run: History, measured: Mapping[str, Array], weights: str) -> float:
    """`level_mean` of one measurement of a run's held-out loss, with "ema" or "raw" weights."""
    loss, log_snr = (torch.from_numpy(measured[name]) for name in (f"loss_{weights}", "log_snr"))
    return float(level_mean(loss, log_snr, sigma_data=run.config["sigma_data"]))


def has_held_out(groups: Sequence[Group]) -> bool:
    """Whether every run was measured on held-out images."""
    return all(run.held_out for group in groups for run in group.runs)


def comparable(groups: Sequence[Group]) -> bool:
    """Whether all runs were last measured at the same noise levels, on as many images, with as many draws of noise."""
    runs = [run for group in groups for run in group.runs if run.held_out]
    levels = [run.held_out[-1][1]["log_snr"] for run in runs]
    numbers = {(_held_out_images(run), run.config["held_out_draws"]) for run in runs}
    return len(numbers) <= 1 and all(len(one) == len(levels[0]) and np.allclose(one, levels[0]) for one in levels)


def _held_out_images(run: History) -> int:
    """Images that the loss was measured on: as many as the config allows, of those that there are."""
    allowed = int(run.config["held_out_images"])
    return allowed if run.held_out_number is None else min(allowed, run.held_out_number)


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
