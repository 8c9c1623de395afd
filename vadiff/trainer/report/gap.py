"""A run's gap to the optimal loss per noise level: rows, table and chart of `vadiff evaluate --gap`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...optimal_loss import ModelGap
from ...process import loss_ratio
from .charts import plain_log_ticks
from .style import LOG_SNR, Chart


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


def gap_chart(gap: ModelGap, sigma_data: float) -> Chart:
    """Loss on training images and optimal loss per noise level, with the gap between them."""
    log_snr = (-2.0 * gap.sigma.log()).numpy()
    unit = _edm_unit(gap, sigma_data)
    loss, optimal = (unit * gap.loss).numpy(), (unit * gap.optimal).numpy()
    lowest = 0.3 * float(loss.min())  # at low noise J* is 0

    def draw(panel: Any) -> None:
        panel.plot(log_snr, loss, color="#0072B2", marker="o", markersize=4, label="loss of the run")
        panel.plot(log_snr, optimal.clip(lowest), color="#000000", linestyle="--", label="optimal loss")
        panel.fill_between(log_snr, optimal.clip(lowest), loss, color="#0072B2", alpha=0.15, linewidth=0, label="gap")
        panel.set_xlabel(LOG_SNR)
        panel.set_ylabel("EDM loss on training images, per pixel")
        panel.set_yscale("log")
        panel.set_ylim(bottom=lowest)
        plain_log_ticks(panel.yaxis)

    caption = (
        "Loss on images that were trained on, and the lowest that any network can have there. Look for levels where "
        "the gap is wide: only there can training lower the loss. Where the gap is 0, the images are memorised."
    )
    return Chart("gap", "Loss above the optimal loss", caption, draw)


def _edm_unit(gap: ModelGap, sigma_data: float) -> Tensor:
    return loss_ratio("edm", -2.0 * gap.sigma.log(), sigma_data=sigma_data)
