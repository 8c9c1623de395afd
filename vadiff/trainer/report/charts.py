"""Charts of the noise levels at the end of training: functions from groups of runs to a `Chart`."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from .runs import Array, Group, History
from .style import (
    LOG_SNR,
    ONLY,
    Chart,
    Line,
    add_band,
    add_line,
    add_spread,
    all_nan_is_no_value,
    line,
    log_snr_axis,
    make_room_for_legend,
    new_figure,
)


def styles_of(groups: Sequence[Group]) -> dict[str, Line]:
    """Colour and dash of each group, by its label: the same in all charts."""
    if len(groups) == 1:
        return {groups[0].label: ONLY}
    return {group.label: line(index) for index, group in enumerate(groups)}


def base_loss(group: Group) -> Chart:
    """Mean and spread between images of the base loss of one group."""
    figure = new_figure(LOG_SNR, "base loss, mean per pixel")
    centers, mean, std = group.first.centers, _last(group, "mean"), _last(group, "std")
    spoken = [f" ± {value:.3g}" for value in std]
    style = ONLY
    add_line(figure, centers, mean, style, group.label, spoken=spoken)
    add_band(figure, centers, np.clip(mean - std, 0, None), mean + std, style.color, group.label)
    log_snr_axis(figure, shown_range([group]))
    tops = (mean + std)[np.isfinite(mean + std)]
    top = 1.08 * float(np.quantile(tops, 0.98)) if len(tops) else 1.0  # outliers may exceed it
    figure.update_yaxes(range=(0, top))
    figure.update_layout(showlegend=False)
    return Chart(
        "base-loss",
        "Base loss per noise level",
        "Line: mean over recent training images at that noise level; band: ± 1 standard deviation between images. Look "
        "for where the line is high (hard to learn) and where the band is wide (the loss of one image says little "
        "about the level).",
        figure,
    )


def base_losses_compared(groups: Sequence[Group]) -> Chart:
    """The mean base loss of all groups."""
    return _over_log_snr(
        groups,
        lambda history: history.mean[-1],
        "base-loss",
        "Base loss per noise level",
        "Mean base loss of recent training images, before the weight." + band(groups) + " Look for where the lines "
        "part: a lower line has learned that noise level better. A gain at some levels is often a loss at others.",
        "base loss, mean per pixel",
    )


def relative_std_compared(groups: Sequence[Group]) -> Chart:
    """std / mean of the base loss of all groups, which does not depend on the size of the loss."""
    return _over_log_snr(
        groups,
        lambda history: history.relative_std[-1],
        "relative-std",
        "Relative spread of the base loss",
        "Standard deviation between images divided by the mean, which does not depend on how far training has come."
        + band(groups)
        + " Look for high values: there an image's loss is a poor guide, and weighting by spread differs most from "
        "weighting by size.",
        "std ÷ mean of the base loss",
        " ×",
    )


def weights_compared(groups: Sequence[Group]) -> Chart:
    """Final weight of each noise level."""
    chart = _over_log_snr(
        groups,
        lambda history: history.weights[-1],
        "weights",
        "Weight of each noise level at the end",
        "Factor of the base loss. Look for values above 1 ×: these noise levels count for more than in the trainer's "
        "own objective; below 1 × for less." + band(groups),
        "weight (1 × = own objective)",
        " ×",
    )
    chart.figure.update_yaxes(ticksuffix=" ×")
    return chart


def balance(groups: Sequence[Group]) -> Chart:
    """Standard deviation of the weighted loss over noise levels: what a balancing weighting makes equal."""
    with all_nan_is_no_value():
        ratios = [f"{group.label} {np.nanmean([run.imbalance for run in group.runs]):.1f} ×" for group in groups]
    return _over_log_snr(
        groups,
        lambda history: history.balance[-1],
        "balance",
        "Balance: spread of the weighted loss",
        "Standard deviation between images of weight × base loss. Look for a flat line, the aim of variance-aware "
        f"weighting: no noise level outweighs the others. Highest ÷ lowest: {', '.join(ratios)}." + band(groups),
        "std of weight × base loss",
    )


def share_of_samples(groups: Sequence[Group]) -> Chart:
    """Distribution of the training samples over the bins."""
    chart = _over_log_snr(
        groups,
        lambda history: 100.0 * history.share / (history.centers[1] - history.centers[0]),
        "share-of-samples",
        "Training samples per noise level",
        "Share of recent training samples at each noise level. Look at the flanks: levels with few samples learn "
        "slowly, and their statistics are noisy. The other charts omit bins with fewer than 20 samples.",
        "samples, % per nat of log-SNR",
        " %",
    )
    chart.figure.update_yaxes(ticksuffix=" %")
    return chart


def _over_log_snr(
    groups: Sequence[Group],
    values: Callable[[History], Array],
    name: str,
    title: str,
    caption: str,
    label: str,
    unit: str = "",
) -> Chart:
    figure = new_figure(LOG_SNR, label)
    for group, style in zip(groups, styles_of(groups).values(), strict=True):
        rows = np.stack([np.where(run.seen[-1], values(run), np.nan) for run in group.runs])
        centers = group.first.centers
        add_spread(figure, centers, rows, style, group.label, unit=unit)
    log_snr_axis(figure, shown_range(groups))
    figure.update_yaxes(rangemode="tozero")
    make_room_for_legend(figure, len(groups))
    return Chart(name, title, caption, figure)


def band(groups: Sequence[Group]) -> str:
    """Sentence that explains the band, or "" if there is none."""
    seeds = sorted({len(group.runs) for group in groups})
    if seeds[-1] == 1:
        return ""
    numbers = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    few = "; too few to say anything about the spread itself" if seeds[-1] < 10 else ""
    return f" Band: ± 1 standard deviation over {numbers} seeds{few}."


def _last(group: Group, name: str) -> Array:
    """Mean over the group's runs of a statistic at the end, NaN where too few samples were seen. [K]"""
    with all_nan_is_no_value():
        return np.nanmean([np.where(run.seen[-1], getattr(run, name)[-1], np.nan) for run in group.runs], 0)


def group_images(group: Group) -> Array:
    """Images seen at the entries that all runs of a group have in common."""
    return functools.reduce(np.intersect1d, [run.images for run in group.runs])


def shown_range(groups: Sequence[Group]) -> tuple[float, float]:
    """Lowest and highest log-SNR at which any run has enough samples."""
    lows, highs = [], []
    for group in groups:
        for run in group.runs:
            seen = run.centers[run.seen.any(0)]
            half = (run.centers[1] - run.centers[0]) / 2
            lows.append(seen.min(initial=run.centers[-1]) - half)
            highs.append(seen.max(initial=run.centers[0]) + half)
    low, high = float(min(lows)), float(max(highs))
    return (low, high) if low < high else (high, low)
