"""Charts over training: scalars, metrics of generated images, and heat maps of the noise levels."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .charts import band, group_images, shown_range, styles_of
from .runs import Array, Group, History
from .style import (
    IMAGES,
    Chart,
    add_spread,
    all_nan_is_no_value,
    images_axis,
    log_axis,
    make_room_for_legend,
    new_figure,
    round_numbers,
    text,
)

METRICS = {
    "fid": ("FID", "lower is better"),
    "fd": ("Fréchet distance", "lower is better"),
    "kid": ("KID", "lower is better"),
    "isc": ("Inception score", "higher is better"),
    "precision": ("Precision", "higher is better: more of the samples look like data"),
    "recall": ("Recall", "higher is better: samples cover more of the data"),
}
_COLUMNS = 200  # of a heat map: as many as can be told apart on a screen
_LOGARITHMIC = ("base_loss", "level_free_loss", "loss")
_CIVIDIS = [[0, "#00224e"], [0.25, "#434e6c"], [0.5, "#7d7c78"], [0.75, "#bcaf6f"], [1, "#fee838"]]
_LESS_AND_MORE = [[0, "#0072B2"], [0.5, "#e4e4e4"], [1, "#D55E00"]]  # Okabe & Ito's blue and vermilion


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


def has_scalar(groups: Sequence[Group], scalar: str) -> bool:
    """Whether any run has a finite value of it: older runs lack some, and some cannot be measured."""
    return any(np.isfinite(run.scalars.get(scalar, np.nan)).any() for group in groups for run in group.runs)


def curve(groups: Sequence[Group], scalar: str, name: str, title: str, caption: str, label: str) -> Chart:
    """A scalar of metrics.jsonl against images seen."""
    figure = new_figure(IMAGES, label)
    everything = []
    for group, style in zip(groups, styles_of(groups).values(), strict=True):
        images = group_images(group)
        rows = [run.scalars.get(scalar, np.full(len(run.images), np.nan))[run.rows_at(images)] for run in group.runs]
        everything += rows
        add_spread(figure, images, np.stack(rows), style, group.label)
    images_axis(figure)
    if scalar in _LOGARITHMIC:
        log_axis(figure, *everything)
    make_room_for_legend(figure, len(groups))
    return Chart(name, title, caption + band(groups), figure)


def metric(groups: Sequence[Group], name: str) -> Chart:
    """A metric of generated images against training images seen."""
    title, better = metric_title(name), METRICS[name.split("-")[0]][1]
    figure = new_figure(IMAGES, f"{title} ({better.partition(':')[0]})")
    for group, style in zip(groups, styles_of(groups).values(), strict=True):
        images, rows = aligned([_series(run, name) for run in group.runs])
        add_spread(figure, images, rows, style, group.label, markers=True)
    images_axis(figure)
    make_room_for_legend(figure, len(groups))
    caption = (
        f"{title} of generated images; {better}. Look for which run reaches a given value with fewer training images."
    )
    return Chart(f"metric-{name}", f"{title} against images seen", caption + band(groups), figure)


def _series(run: History, metric: str) -> list[tuple[int, float]]:
    return [(images, values[metric]) for images, values in run.evaluation if metric in values]


def aligned(series: Sequence[Sequence[tuple[int, float]]]) -> tuple[Array, Array]:
    """Points of several runs on one x axis: (x [X], values [runs, X], NaN where a run has no point)."""
    places = sorted({at for points in series for at, _ in points})
    rows = np.full((len(series), len(places)), np.nan)
    for row, points in enumerate(series):
        for at, value in points:
            rows[row, places.index(at)] = value
    return np.array(places), rows


def heatmap(groups: Sequence[Group], what: str) -> Chart:
    """`what` ("std", "relative_std" or "weights") over training, of one group at a time: a menu chooses which.

    Colours and axes are the same for all groups.
    """
    title, caption, label, unit, colors = _HEATMAPS[what]
    figure = new_figure(IMAGES, "log-SNR λ (nats), less noise →", hovermode="closest")
    low, high = _limits([log_values(group, what) for group in groups], symmetric=what == "weights")
    ticks = round_numbers(10**low, 10**high)
    bar = {
        "title": {"text": label, "side": "right"}, "thickness": 12, "tickfont": {"size": 12}, "outlinewidth": 0,
        "tickvals": np.log10(ticks), "ticktext": [f"{value:g}{unit}" for value in ticks],
    }  # fmt: skip
    figure.update_layout(coloraxis={"cmin": low, "cmax": high, "colorscale": colors, "colorbar": bar})
    for group in groups:
        values, images = log_values(group, what), group_images(group)
        kept = np.unique(np.linspace(0, len(images) - 1, min(len(images), _COLUMNS)).round().astype(int))
        centers = group.first.centers
        half, sigmas = (centers[1] - centers[0]) / 2, np.exp(-0.5 * centers)
        figure.add_heatmap(
            x=np.concatenate([[0], images[kept]]),
            y=np.concatenate([centers - half, centers[-1:] + half]),
            z=values[kept].T.astype(np.float32),
            customdata=np.stack(np.broadcast_arrays(10 ** values[kept].T, sigmas[:, None], images[kept]), -1),
            hovertemplate="%{customdata[2]:,.0f} images<br>λ = %{y:.2f}, σ = %{customdata[1]:.3g}<br>"
            f"{label}: %{{customdata[0]:.3~g}}{unit}<extra>{text(group.label) if len(groups) > 1 else ''}</extra>",
            name=text(group.label),
            coloraxis="coloraxis",
            visible=group is groups[0],
        )
    images_axis(figure, max(float(group_images(group)[-1]) for group in groups))
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(range=shown_range(groups), showgrid=False)
    # buttons in a row above the colour bar, and a row for the menu
    row = 40
    figure.update_layout(height=figure.layout.height + 2 * row, margin={"r": 12, "t": row}, modebar_orientation="h")
    if len(groups) > 1:
        _menu(figure, [group.label for group in groups])
    over_seeds = " Mean of the seeds." if any(len(group.runs) > 1 for group in groups) else ""
    return Chart(f"{what.replace('_', '-')}-over-training", title, caption + over_seeds, figure)


def _menu(figure: Any, labels: Sequence[str]) -> None:
    """Menu above the chart that shows one trace and hides the others."""
    buttons = [
        {"label": text(label), "method": "restyle", "args": ["visible", [each == place for each in range(len(labels))]]}
        for place, label in enumerate(labels)
    ]
    place = {"x": 0, "xanchor": "left", "y": 1.03, "yanchor": "bottom", "pad": {"b": 4}}
    figure.update_layout(updatemenus=[{"buttons": buttons, "direction": "down", "showactive": True, **place}])
    figure.update_layout(margin_t=2 * figure.layout.margin.t)


_HEATMAPS: dict[str, tuple[str, str, str, str, list[list[Any]]]] = {
    "std": (
        "Spread of the base loss over training",
        "Standard deviation of the base loss between images, before the adaptive weight. Left to right: training. Look "
        "for bands that stay bright: noise levels that never become predictable. Empty: too few samples yet.",
        "std of the base loss",
        "",
        _CIVIDIS,
    ),
    "relative_std": (
        "Relative spread of the base loss over training",
        "Standard deviation ÷ mean of the base loss between images, before the adaptive weight, so that runs can be "
        "compared whatever their loss. Look for bands that stay bright, and for differences between the runs. Empty: "
        "too few samples yet.",
        "std ÷ mean",
        " ×",
        _CIVIDIS,
    ),
    "weights": (
        "Weight of each noise level over training",
        "Look for when the colours stop changing: from there on the weighting is settled. 1 × is the trainer's own "
        "objective, blue is less, orange is more.",
        "weight",
        " ×",
        _LESS_AND_MORE,
    ),
}


def changing(groups: Sequence[Group]) -> list[Group]:
    """The groups whose weights change over training; all groups if none do."""
    return [group for group in groups if np.ptp(group.first.weights, axis=0).any()] or list(groups)


def _limits(maps: Sequence[Array], *, symmetric: bool) -> tuple[float, float]:
    """Common colour limits: the 1 % and 99 % quantiles; `symmetric` about 0, which is weight 1."""
    values = np.concatenate([each.ravel() for each in maps])
    values = values[np.isfinite(values)]
    if not len(values):
        return -1.0, 1.0
    low, high = (float(limit) for limit in np.quantile(values, [0.01, 0.99]))
    if symmetric:
        reach = max(abs(low), abs(high), 0.31)  # a factor of two at least, so that small changes look small
        return -reach, reach
    return (low, high) if high - low > 0.02 else (low - 0.01, high + 0.01)


def log_values(group: Group, what: str) -> Array:
    """log10 of a statistic over training, mean over the group's runs, [R, K], NaN where too few samples were seen."""
    images = group_images(group)
    with np.errstate(divide="ignore", invalid="ignore"), all_nan_is_no_value():
        logs = [np.log10(np.where(run.seen, getattr(run, what), np.nan))[run.rows_at(images)] for run in group.runs]
        mean: Array = np.nanmean(logs, 0)
    return np.where(np.isfinite(mean), mean, np.nan)
