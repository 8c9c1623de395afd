"""The optimal loss of a data set as a figure and a table, optionally with models' losses and gaps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...extras import import_extra
from ...files import check_writable, replacing
from ...optimal_loss import ModelGap, OptimalLoss
from ..next_steps import next_steps
from ..training import Run

_COLORS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")  # Okabe & Ito's


STOPPED = "nothing is kept of the estimate, which is written at its end; fewer --levels or a lower --limit take less"


def check_outputs(out: Path, run: Run | None) -> None:
    """Raise unless a curve and its picture can be written to a folder, and the gap of a run measured: before the work.

    Raises:
        OSError: the folder cannot be written.
        MissingExtraError: matplotlib is not installed.
        UserError: the run has no checkpoint that can be read.
    """
    check_writable(out, folder=True)
    check_writable(out / "optimal_loss.csv", folder=False)
    import_extra("matplotlib", "report")
    if run is not None:
        run.denoiser()


def write_figure(optimal: OptimalLoss, gaps: Mapping[str, ModelGap], out: Path) -> None:
    """Write optimal_loss.png to a folder."""
    with replacing(out / "optimal_loss.png") as partial:
        optimal_loss_figure(optimal, gaps).savefig(partial, format="png")


def next_steps_of(out: Path, run: Run | None) -> str:
    """What a curve can be used for: the diagnosis of the run that it was estimated for, or of any other."""
    if run is None:
        return "A run on these images reads it by `vadiff diagnose RUN --optimal CSV`"
    return next_steps(("diagnose", run.path, "--optimal", out / "optimal_loss.csv"))


def optimal_loss_figure(optimal: OptimalLoss, gaps: Mapping[str, ModelGap] | None = None) -> Any:
    """Figure of J*/D over noise levels and, for given models, of their loss and gap.

    Args:
        optimal: the data set's J*.
        gaps: name → gap of a model, up to six.

    Returns:
        A `matplotlib.figure.Figure`; `figure.savefig(path)` writes it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    gaps = gaps or {}
    figure = import_extra("matplotlib.figure", "report").Figure(
        figsize=(13 if gaps else 7, 5), dpi=120, facecolor="white", layout="constrained"
    )
    panels = figure.subplots(1, 2 if gaps else 1, squeeze=False)[0]
    sigma, order = optimal.sigma.sort()
    loss, stderr = (value[order] / optimal.elements for value in (optimal.loss, optimal.stderr))
    top = optimal.total_variance / optimal.elements
    panels[0].axhline(top, color="#888888", linewidth=1, linestyle=":", label="variance of the data")
    panels[0].plot(sigma, loss, color="black", linewidth=2, marker="o", markersize=3, label="optimal loss J*/D")
    panels[0].fill_between(sigma, (loss - 2 * stderr).clamp(min=0), loss + 2 * stderr, color="black", alpha=0.2, lw=0)
    for (name, gap), color in zip(gaps.items(), _COLORS, strict=False):
        panels[0].plot(gap.sigma, gap.loss, color=color, linewidth=2, marker="o", markersize=3, label=f"{name}: loss")
        panels[1].plot(gap.sigma, gap.gap, color=color, linewidth=2, marker="o", markersize=3, label=name)
        band = (gap.gap - 2 * gap.stderr, gap.gap + 2 * gap.stderr)
        panels[1].fill_between(gap.sigma, *band, color=color, alpha=0.2, linewidth=0)
    panels[0].set_title("x0 loss, mean over elements")
    if gaps:
        panels[1].set_title("gap: loss − J*/D, which training can still reduce")
        panels[1].axhline(0.0, color="#888888", linewidth=1)
    for panel in panels:
        panel.set_xscale("log")
        panel.set_yscale("symlog", linthresh=max(1e-3 * top, 1e-12))
        panel.set_xlabel("noise level σ      ← less noise · more noise →")
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
    panels[0].set_ylim(bottom=0.0)
    figure.suptitle(
        f"{optimal.samples:,} samples, estimator {optimal.estimator}; bands: ± 2 standard errors", fontsize=10
    )
    return figure


def optimal_loss_table(optimal: OptimalLoss, gap: ModelGap | None = None, other: OptimalLoss | None = None) -> str:
    """One line per noise level: J*, its standard error and share of the total variance, and a model's gap.

    With `other`, a curve at the same levels, also the difference from it, in percent of its total variance.
    """
    lines = [f"{'sigma':>10}  {'J*':>12}  {'std. error':>10}  {'J*/D':>10}  {'of variance':>11}  {'draws':>7}"]
    columns = (optimal.sigma, optimal.loss, optimal.stderr, optimal.draws)
    for sigma, loss, stderr, draws in zip(*(column.tolist() for column in columns), strict=True):
        share = loss / optimal.total_variance
        lines.append(
            f"{sigma:10.4g}  {loss:12.5g}  {stderr:10.2g}  {loss / optimal.elements:10.4g}  {share:11.4%}  {draws:7d}"
        )
    if gap is not None:
        lines[0] += f"  {'model loss':>10}  {'gap':>10}  {'std. error':>10}"
        for place, values in enumerate(torch.stack([gap.loss, gap.gap, gap.stderr], 1).tolist()):
            lines[place + 1] += "".join(f"  {value:10.4g}" for value in values)
    if other is not None:
        difference = 100.0 * (optimal.loss - other.loss) / other.total_variance
        error = 100.0 * (optimal.stderr.square() + other.stderr.square()).sqrt() / other.total_variance
        lines[0] += f"  {'difference':>17}"
        for place, (value, uncertain) in enumerate(zip(difference.tolist(), error.tolist(), strict=True)):
            lines[place + 1] += f"  {value:+7.2f} % ± {uncertain:.2f}"
        lines.append(
            f"Largest difference from {other.estimator}: {float(difference.abs().max()):.2f} % of the total variance"
        )
    return "\n".join(lines)
