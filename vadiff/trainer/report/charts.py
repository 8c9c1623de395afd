"""The charts of a report: functions from groups of runs to a `Chart`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...extras import import_extra
from .runs import Array, Group, History
from .style import IMAGES, LOG_SNR, Chart, Line, all_nan_is_no_value, line

Styles = Mapping[str, Line]

METRICS = {
    "fid": ("FID", "lower is better"),
    "fd": ("Fréchet distance", "lower is better"),
    "kid": ("KID", "lower is better"),
    "isc": ("Inception score", "higher is better"),
    "precision": ("Precision", "higher is better: more of the samples look like data"),
    "recall": ("Recall", "higher is better: samples cover more of the data"),
}


def metric_names(groups: Sequence[Group]) -> list[str]:
    """Metrics measured on generated images, such as fid or fid-768, without their standard deviations."""
    found = {name for group in groups for run in group.runs for _, values in run.evaluation for name in values}
    order = list(METRICS)
    known = [name for name in found if name.split("-")[0] in METRICS]
    return sorted(known, key=lambda name: (order.index(name.split("-")[0]), name))


def metric_title(name: str) -> str:
    """fid-768 → FID-768, kid-digits → KID (digits)."""
    base, _, features = name.partition("-")
    suffix = f"-{features}" if features.isdigit() else f" ({features})"
    return METRICS[base][0] + (suffix if features else "")


def styles_of(groups: Sequence[Group]) -> dict[str, Line]:
    """Colour and dash of each group, by its label."""
    return {group.label: line(index) for index, group in enumerate(groups)}


def base_loss(group: Group, top: float) -> Chart:
    """Mean and spread of the base loss of one group, up to `top` on the vertical axis."""

    def draw(panel: Any) -> None:
        centers, mean, std = group.first.centers, _last(group, "mean"), _last(group, "std")
        panel.fill_between(centers, np.clip(mean - std, 0, None), mean + std, color="#56B4E9", alpha=0.35, lw=0)
        panel.plot(centers, mean, color="#0072B2")
        _log_snr_axis(panel, [group])
        panel.set_ylim(0, top)
        panel.set_ylabel("base loss, mean per pixel")

    return Chart(
        f"base-loss-{slug(group.label)}",
        "Base loss per noise level",
        "Line: mean over recent training images at that noise level; band: ± 1 standard deviation between images. Look "
        "for where the line is high (hard to learn) and where the band is wide (one image says little: its gradient is "
        "mostly noise).",
        draw,
        group.label,
    )


def base_loss_top(groups: Sequence[Group]) -> float:
    """Common upper limit of the base-loss charts; outliers may exceed it."""
    tops = np.concatenate([_last(group, "mean") + _last(group, "std") for group in groups])
    tops = tops[np.isfinite(tops)]
    return float(1.08 * np.quantile(tops, 0.98)) if len(tops) else 1.0


def base_losses_compared(groups: Sequence[Group]) -> Chart:
    """The mean base loss of all groups in one picture."""
    return _over_log_snr(
        groups,
        lambda history: history.mean[-1],
        "base-loss-compared",
        "Base loss per noise level, compared",
        "Mean base loss of recent training images, before the weight." + band(groups) + " Look for where the lines "
        "part: a lower line has learned that noise level better. A gain at some levels is often a loss at others.",
        "base loss, mean per pixel",
    )


def relative_std_compared(groups: Sequence[Group]) -> Chart:
    """std / mean of the base loss of all groups, which does not depend on the size of the loss."""
    return _over_log_snr(
        groups,
        lambda history: history.relative_std[-1],
        "relative-std-compared",
        "Relative spread of the base loss, compared",
        "Standard deviation between images divided by the mean, which does not depend on how far training has come."
        + band(groups)
        + " Look for high values: there an image's loss is a poor guide, and weighting by spread differs most from "
        "weighting by size.",
        "std ÷ mean of the base loss",
    )


def weights_compared(groups: Sequence[Group]) -> Chart:
    """Final weight of each noise level."""
    return _over_log_snr(
        groups,
        lambda history: history.weights[-1],
        "weights",
        "Weight of each noise level at the end",
        "Factor of the base loss. Look for values above 1: these noise levels count for more than in the trainer's own "
        "objective; below 1 for less." + band(groups),
        "weight w (1 = own objective)",
    )


def share_of_samples(groups: Sequence[Group]) -> Chart:
    """Distribution of the training samples over the bins."""
    return _over_log_snr(
        groups,
        lambda history: 100.0 * history.share / (history.centers[1] - history.centers[0]),
        "share-of-samples",
        "Training samples per noise level",
        "Share of recent training samples at each noise level. Look at the flanks: levels with few samples learn "
        "slowly, and their statistics are noisy. The other charts omit bins with fewer than 20 samples.",
        "samples, % per nat of log-SNR",
    )


def heatmap(group: Group, what: str, limits: tuple[float, float], spans: tuple[float, float, float]) -> Chart:
    """`what` ("std", "relative_std" or "weights") of a group over training.

    Args:
        limits: of log10 of the values, common to heatmaps side by side.
        spans: (lowest log-SNR, highest log-SNR, last image) of the axes, common to them too.
    """
    title, caption, label, colors = _HEATMAPS[what]

    def draw(panel: Any) -> None:
        values = log_values(group, what)
        images, centers = group_images(group), group.first.centers
        half = (centers[1] - centers[0]) / 2
        edges = np.concatenate([[0.0], images])
        mesh = panel.pcolormesh(
            edges,
            np.concatenate([centers - half, centers[-1:] + half]),
            values.T,
            cmap=colors,
            vmin=limits[0],
            vmax=limits[1],
            rasterized=True,  # else the SVG has 100,000 squares
        )
        panel.set_xlim(0, spans[2])
        panel.set_ylim(spans[0], spans[1])
        panel.grid(False)
        _thousands(panel.xaxis)
        panel.set_xlabel(IMAGES)
        panel.set_ylabel("log-SNR λ (nats)      less noise →")
        bar = panel.figure.colorbar(mesh, ax=panel, extend="both", pad=0.02)
        bar.set_label(label)
        bar.outline.set_visible(False)

    over_seeds = f" Mean of {len(group.runs)} seeds." if len(group.runs) > 1 else ""
    name = f"{what.replace('_', '-')}-heatmap-{slug(group.label)}"
    return Chart(name, title, caption + over_seeds, draw, group.label)


_HEATMAPS = {
    "std": (
        "Spread of the base loss over training",
        "Standard deviation of the base loss between images, before the adaptive weight. Left to right: training. Look "
        "for bands that stay bright: noise levels that never become predictable. White: too few samples yet.",
        "log₁₀ std of the base loss",
        "cividis",
    ),
    "relative_std": (
        "Relative spread of the base loss over training",
        "Standard deviation ÷ mean of the base loss between images, before the adaptive weight, so that runs can be "
        "compared whatever their loss. Look for bands that stay bright, and for differences between the runs. White: "
        "too few samples yet.",
        "log₁₀ of std ÷ mean",
        "cividis",
    ),
    "weights": (
        "Weight of each noise level over training",
        "Look for when the colours stop changing: from there on the weighting is settled. 0 is weight 1 (the trainer's "
        "own objective), blue is less, red is more.",
        "log₁₀ weight w",
        "RdBu_r",
    ),
}


def changing(groups: Sequence[Group]) -> list[Group]:
    """The groups whose weights change over training; all groups if none do."""
    return [group for group in groups if np.ptp(group.first.weights, axis=0).any()] or list(groups)


def heatmap_limits(groups: Sequence[Group], what: str) -> tuple[float, float]:
    """Common colour limits: the 1 % and 99 % quantiles; for weights, symmetric about weight 1."""
    values = np.concatenate([log_values(group, what).ravel() for group in groups])
    values = values[np.isfinite(values)]
    if not len(values):
        return -1.0, 1.0
    low, high = (float(limit) for limit in np.quantile(values, [0.01, 0.99]))
    if what == "weights":
        reach = max(abs(low), abs(high), 0.1)
        return -reach, reach
    return (low, high) if high - low > 0.02 else (low - 0.01, high + 0.01)


def heatmap_spans(groups: Sequence[Group]) -> tuple[float, float, float]:
    """Common axes: lowest and highest log-SNR with samples, and the last image."""
    low, high = _shown(groups)
    return low, high, max(float(group_images(group)[-1]) for group in groups)


def has_scalar(groups: Sequence[Group], scalar: str) -> bool:
    """Whether any run has a finite value of it: older runs lack some, and some cannot be measured."""
    return any(np.isfinite(run.scalars.get(scalar, np.nan)).any() for group in groups for run in group.runs)


def curve(groups: Sequence[Group], scalar: str, name: str, title: str, caption: str, label: str) -> Chart:
    """A scalar of metrics.jsonl against images seen."""

    def draw(panel: Any) -> None:
        for group, (color, dash) in zip(groups, styles_of(groups).values(), strict=True):
            images = group_images(group)
            rows = [
                run.scalars.get(scalar, np.full(len(run.images), np.nan))[run.rows_at(images)] for run in group.runs
            ]
            draw_spread(panel, images, np.stack(rows), color, dash, group.label if len(groups) > 1 else "")
        images_axis(panel)
        panel.set_ylabel(label)
        if scalar in ("base_loss", "level_free_loss", "loss"):
            panel.set_yscale("log")
            plain_log_ticks(panel.yaxis)

    return Chart(name, title, caption + band(groups), draw)


def metric(groups: Sequence[Group], name: str) -> Chart:
    """A metric of generated images against training images seen."""
    title, better = metric_title(name), METRICS[name.split("-")[0]][1]

    def draw(panel: Any) -> None:
        for group, (color, dash) in zip(groups, styles_of(groups).values(), strict=True):
            images, rows = aligned([_series(run, name) for run in group.runs])
            draw_spread(panel, images, rows, color, dash, group.label if len(groups) > 1 else "", marker="o")
        images_axis(panel)
        panel.set_ylabel(f"{title} ({better.partition(':')[0]})")

    caption = (
        f"{title} of generated images; {better}. Look for which run reaches a given value with fewer training images."
    )
    return Chart(f"metric-{name}", f"{title} against images seen", caption + band(groups), draw)


def _series(run: History, metric: str) -> list[tuple[int, float]]:
    return [(images, values[metric]) for images, values in run.evaluation if metric in values]


def _over_log_snr(
    groups: Sequence[Group], values: Callable[[History], Array], name: str, title: str, caption: str, label: str
) -> Chart:
    def draw(panel: Any) -> None:
        for group, (color, dash) in zip(groups, styles_of(groups).values(), strict=True):
            rows = np.stack([np.where(run.seen[-1], values(run), np.nan) for run in group.runs])
            draw_spread(panel, group.first.centers, rows, color, dash, group.label if len(groups) > 1 else "")
        _log_snr_axis(panel, groups)
        panel.set_ylim(bottom=0)
        panel.set_ylabel(label)

    return Chart(name, title, caption, draw)


def draw_spread(
    panel: Any, x: Array, rows: Array, color: str, dash: str, label: str, marker: str | None = None
) -> None:
    """Draw the mean over runs, `rows` [runs, X], and with several runs a band of ± 1 standard deviation."""
    if not len(x):
        return
    with all_nan_is_no_value():
        middle = np.nanmean(rows, 0)
        panel.plot(x, middle, color=color, linestyle=dash, label=label or None, marker=marker, markersize=4)
        if len(rows) > 1:
            spread = np.nanstd(rows, 0, ddof=1)
            panel.fill_between(x, middle - spread, middle + spread, color=color, alpha=0.18, linewidth=0)


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


def log_values(group: Group, what: str) -> Array:
    """log10 of a statistic over training, mean over the group's runs, [R, K], NaN where too few samples were seen."""
    images = group_images(group)
    with np.errstate(divide="ignore", invalid="ignore"), all_nan_is_no_value():
        logs = [np.log10(np.where(run.seen, getattr(run, what), np.nan))[run.rows_at(images)] for run in group.runs]
        mean: Array = np.nanmean(logs, 0)
    return np.where(np.isfinite(mean), mean, np.nan)


def group_images(group: Group) -> Array:
    """Images seen at the entries that all runs of a group have in common."""
    return functools.reduce(np.intersect1d, [run.images for run in group.runs])


def aligned(series: Sequence[Sequence[tuple[int, float]]]) -> tuple[Array, Array]:
    """Points of several runs on one x axis: (x [X], values [runs, X], NaN where a run has no point)."""
    places = sorted({at for points in series for at, _ in points})
    rows = np.full((len(series), len(places)), np.nan)
    for row, points in enumerate(series):
        for at, value in points:
            rows[row, places.index(at)] = value
    return np.array(places), rows


def _shown(groups: Sequence[Group]) -> tuple[float, float]:
    """Lowest and highest log-SNR at which any run has enough samples."""
    lows, highs = [], []
    for group in groups:
        for run in group.runs:
            seen = run.centers[run.seen.any(0)]
            half = (run.centers[1] - run.centers[0]) / 2
            lows.append(seen.min(initial=run.centers[-1]) - half)
            highs.append(seen.max(initial=run.centers[0]) + half)
    low, high = min(lows), max(highs)
    return (low, high) if low < high else (high, low)


def _log_snr_axis(panel: Any, groups: Sequence[Group]) -> None:
    panel.set_xlabel(LOG_SNR)
    panel.set_xlim(*_shown(groups))


def images_axis(panel: Any) -> None:
    panel.set_xlabel(IMAGES)
    panel.set_xlim(left=0)
    _thousands(panel.xaxis)


def _thousands(axis: Any) -> None:
    axis.set_major_formatter(number_label)


def number_label(value: float, _: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def plain_log_ticks(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, also if it spans less than a decade; call after drawing."""
    ticker = import_extra("matplotlib.ticker", "report")
    low, high = axis.get_view_interval()
    axis.set_major_locator(
        ticker.MaxNLocator(6, steps=[1, 2, 5, 10]) if high < 5 * low else ticker.LogLocator(subs=(1.0, 2.0, 5.0))
    )
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(ticker.NullLocator())


def slug(label: str) -> str:
    return "-".join("".join(c if c.isalnum() or c in ".-" else " " for c in label.lower()).split()) or "run"
