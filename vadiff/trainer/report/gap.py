"""A run's gap to the optimal loss per noise level: rows, table and chart of `vadiff evaluate --gap`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ...optimal_loss import ModelGap
from ...process import loss_ratio
from .runs import Array
from .style import (
    LOG_SNR,
    ONLY,
    OTHER,
    Chart,
    add_band,
    add_line,
    log_axis,
    log_snr_axis,
    make_room_for_legend,
    new_figure,
)


def gap_rows(gap: ModelGap, sigma_data: float) -> list[dict[str, float]]:
    """One row per noise level, in EDM's unit λ(σ)·mean((D - x0)²)."""
    unit = _edm_unit(gap, sigma_data)
    columns = {
        "sigma": gap.sigma,
        "log_snr": -2.0 * gap.sigma.log(),
        "loss": unit * gap.loss,
        "optimal": unit * gap.optimal,
        "gap": unit * gap.gap,
        "gap_standard_error": unit * gap.stderr,
    }
    names, values = list(columns), [column.tolist() for column in columns.values()]
    return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]


def gap_table(gap: ModelGap, sigma_data: float) -> str:
    """The rows as a text table."""
    lines = [f"{'sigma':>9} {'log-SNR':>8} {'loss':>10} {'optimal':>10}   {'gap':>20}"]
    for row in gap_rows(gap, sigma_data):
        lines.append(
            f"{row['sigma']:9.4f} {row['log_snr']:8.2f} {row['loss']:10.5f} {row['optimal']:10.5f}   "
            f"{row['gap']:10.5f} ± {row['gap_standard_error']:.5f}"
        )
    return "\n".join(lines)


def gap_chart(table: Mapping[str, Array]) -> Chart:
    """Loss on training images and optimal loss per noise level, with the gap between them.

    Args:
        table: column → values per noise level [L], as gap.csv has them.
    """
    order = np.argsort(table["log_snr"])
    log_snr, loss, optimal, error = (
        table[name][order] for name in ("log_snr", "loss", "optimal", "gap_standard_error")
    )
    lowest = 0.3 * float(loss.min())  # at low noise J* is 0
    figure = new_figure(LOG_SNR, "EDM loss on training images, per pixel")
    run, gap = ONLY, [f", gap {low:.3g} ± {wide:.2g}" for low, wide in zip(loss - optimal, error, strict=True)]
    add_line(figure, log_snr, loss, run, "loss of the run", markers=True, spoken=gap)
    add_line(figure, log_snr, optimal.clip(lowest), OTHER, "optimal loss")
    figure.data[-1].update(text=[f"{value:.4g}" for value in optimal], hovertemplate="%{text}")
    add_band(figure, log_snr, optimal.clip(lowest), loss, run.color, "gap")
    log_snr_axis(figure)
    log_axis(figure, loss, optimal.clip(lowest))
    make_room_for_legend(figure, 2)
    caption = (
        "Loss on images that were trained on, and the lowest that any network can have there. Look for levels where "
        "the gap is wide: only there can training lower the loss. Where the gap is the whole loss, the optimum "
        "memorises the images."
    )
    return Chart("gap", "Loss above the optimal loss", caption, figure)


def _edm_unit(gap: ModelGap, sigma_data: float) -> Tensor:
    return loss_ratio("edm", -2.0 * gap.sigma.log(), sigma_data=sigma_data)
