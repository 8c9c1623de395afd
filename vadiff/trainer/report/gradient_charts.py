"""Charts of gradients per noise level, from the table of `vadiff evaluate --gradients`."""

from collections.abc import Mapping

import numpy as np

from .runs import Array
from .style import (
    LOG_SNR,
    ONLY,
    OTHER,
    Chart,
    add_line,
    log_axis,
    log_snr_axis,
    make_room_for_legend,
    new_figure,
)

_OWN, _RUN = "own objective (1 ×)", "with the run's weighting"
_PULL = [[0, "#0072B2"], [0.5, "#e4e4e4"], [1, "#D55E00"]]


def gradient_charts(table: Mapping[str, Array]) -> list[Chart]:
    """Charts: norm per level, share of a training step, cosine with the step, and cosines between levels.

    Args:
        table: column → values per noise level [L], NaN where too few images were measured; as gradients.csv has them.
    """
    return [
        Chart(
            "gradient-norm-per-level",
            "Size of the gradient per noise level",
            "Norm of the gradient of one sample of a noise level. Look for levels far above the rest: they dominate "
            "the others. A balancing weighting makes the line flatter.",
            _lines(table, "norm", "weighted_norm", "norm of the gradient of one level", logarithmic=True),
        ),
        Chart(
            "gradient-share-per-level",
            "Share of each noise level in a training step",
            "Gradient norm times how often the level is drawn in training, as a share of the sum. Look for levels "
            "near 0: they are hardly learned, whatever their loss.",
            _lines(table, "step_share", "step_share_weighted", "share of a training step, %", percent=True),
        ),
        Chart(
            "gradient-agreement",
            "Does a training step help each noise level",
            "Cosine between the gradient of one level and the whole training step. Look for levels at or below 0: a "
            "step does nothing for them, or makes them worse.",
            _lines(table, "cosine_to_step", "cosine_to_step_weighted", "cosine with the training step"),
        ),
        Chart(
            "gradient-cosines",
            "Do noise levels pull in different directions",
            "Cosine between the gradients of two noise levels, which no weight changes. Look for blue, below 0: "
            "what helps one hurts the other. Near 0 the two are independent. Empty: too few images to tell.",
            _cosines(table),
        ),
    ]


def _lines(
    table: Mapping[str, Array], own: str, weighted: str, label: str, *, logarithmic: bool = False, percent: bool = False
) -> object:
    figure = new_figure(LOG_SNR, label)
    log_snr, scale = table["log_snr"], 100.0 if percent else 1.0
    for name, style, column in ((_RUN, ONLY, weighted), (_OWN, OTHER, own)):
        add_line(
            figure,
            log_snr,
            scale * table[column],
            style,
            name,
            unit=" %" if percent else "",
            markers=True,
        )
    log_snr_axis(figure)
    if logarithmic:
        log_axis(figure, table[own], table[weighted])
    else:
        figure.update_yaxes(rangemode="tozero", zeroline=True)
    make_room_for_legend(figure, 2)
    return figure


def _cosines(table: Mapping[str, Array]) -> object:
    level = "log-SNR λ (nats), less noise →"
    figure = new_figure(level, level, hovermode="closest")
    names = [f"{value:.2f}" for value in table["log_snr"]]
    bar = {"title": {"text": "cosine", "side": "right"}, "thickness": 12, "tickfont": {"size": 12}, "outlinewidth": 0}
    figure.add_heatmap(
        x=names,
        y=names,
        z=np.stack([table[f"cosine_to_{name}"] for name in names]),
        zmin=-1,
        zmax=1,
        colorscale=_PULL,
        colorbar=bar,
        hovertemplate="λ = %{x} and %{y}<br>cosine %{z:.3f}<extra></extra>",
    )
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    figure.update_layout(margin={"r": 12, "t": 40}, modebar_orientation="h")
    return figure
