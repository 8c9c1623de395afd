"""A criterion's statistics for people: a plot, a text table, and scalars for an experiment tracker.

All are methods of `DiffusionLoss`; `as_html` is what a notebook shows of it. Each copies the statistics to the host,
which synchronises with the GPU once: call them every 100 steps or so.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import itertools
import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from .bands import BANDS, Bands, Criterion, band_of_bins, bands_of
from .diagnosis import diagnose
from .extras import MissingExtraError, import_extra
from .metrics_file import MetricsFile
from .regression_target import removed_error, target_of
from .watch import judge_at_read

LOG_SNR = "log-SNR  λ = ln(α²/σ²)  (nats)      ← more noise · less noise →"

_LOSS_COLOR, _WEIGHT_COLOR = "#0072B2", "#D55E00"
_WIDE = 10.0  # max/min above which the axis is logarithmic


def summary(criterion: Criterion, bands: int = BANDS) -> str:
    """A text table with one line per band of log-SNR that has samples.

    Columns: share of samples, mean, std, std/mean of the base loss, mean weight. Then skipped samples and verdict.

    Args:
        bands: number of intervals of `log_snr_range`.

    Raises:
        ValueError: bands is not a positive integer.
    """
    found = bands_of(criterion, bands)
    judge_at_read(criterion)
    statistics = criterion.statistics
    lines = [f"{criterion.weighting}: base loss by noise level, {found.samples.sum():,.0f} samples after forgetting"]
    if found.samples.sum() > 0:
        edges = [f"{edge:.4g}" for edge in found.edges.tolist()]
        lines.append(f"{'log-SNR':>17}  samples       mean        std  std/mean   weight")
        columns = (found.share, found.mean, found.std, found.std / found.mean, found.weight)
        for low, high, values in zip(edges, edges[1:], zip(*map(Tensor.tolist, columns), strict=True), strict=False):
            share, mean, std, relative, weight = values
            if share > 0:
                lines.append(
                    f"{low:>7} to {high:>6}  {share:6.1%}  {mean:9.4g}  {std:9.4g}  {relative:8.2f}  {_number(weight)}"
                )
    else:
        lines.append(_why_none(int(statistics.skipped)))
    target = target_of(criterion)
    if target is not None:
        lines.append(f"target: {target.description}; the losses are errors against it")
    skipped = int(statistics.skipped)
    if skipped:
        lines.append(f"skipped: {skipped:,} samples with a NaN log-SNR or a non-finite loss or weight")
    if found.samples.sum() > 0 or skipped:
        lines.append(f"verdict: {diagnose(criterion).verdict}")
    return "\n".join(lines)


def _why_none(skipped: int) -> str:
    """Why no sample is recorded, of so many that were skipped."""
    if skipped == 0:
        return "no samples recorded yet: recording needs training mode and grad enabled"
    return f"no samples recorded: all {skipped:,} were non-finite, in loss, weight or log-SNR"


def plot(criterion: Criterion, ax: Any = None) -> tuple[Any, Any]:
    """Draw base loss (mean ± standard deviation) and weight against log-SNR, without empty bins.

    Args:
        ax: matplotlib axes (the weight gets a second y-axis on the right); a pair of axes, the first for the loss;
            or None for a new pyplot figure with two panels.

    Returns:
        The axes of the loss and those of the weight; `axes.figure.savefig(path)` saves the figure.

    Raises:
        MissingExtraError: matplotlib is not installed; the message says how to install it.
        TypeError: ax is none of these.
    """
    if ax is None:
        pyplot = import_extra("matplotlib.pyplot", "report")
        _, panels = pyplot.subplots(2, 1, sharex=True, figsize=(6.4, 5.2), layout="constrained")
    elif hasattr(ax, "twinx"):
        panels = (ax, ax.twinx())
    else:
        panels = ax
    try:
        loss_axes, weight_axes = panels
    except (TypeError, ValueError):
        raise TypeError(f"ax is a {type(ax).__name__}, expected matplotlib axes, a pair of them, or None") from None
    judge_at_read(criterion)
    _draw(criterion, loss_axes, weight_axes)
    return loss_axes, weight_axes


def as_html(criterion: Criterion) -> str:
    """The summary, with the picture of `plot` if matplotlib is installed, as HTML for a notebook."""
    page = f'<pre style="overflow-x: auto">{html.escape(summary(criterion))}</pre>'
    with contextlib.suppress(MissingExtraError):
        file = io.BytesIO()
        _figure(criterion).savefig(file, format="png", dpi=100)
        picture = base64.b64encode(file.getvalue()).decode()
        page += f'<img alt="base loss and weight per noise level" src="data:image/png;base64,{picture}">'
    return page


def log_to(criterion: Criterion, writer: Any, step: int, prefix: str = "vadiff", bands: int = BANDS) -> None:
    """Log the statistics to an experiment tracker. Synchronises with the GPU once: call it every 100 steps or so.

    The scalars are `<prefix>/<what>/log_snr_<low>_to_<high>` for every band with samples, <what> being `base_loss`,
    `std`, `relative_std`, `weight`, `share`, and with posterior-mean targets `removed_x0_error`, what these take out;
    `<prefix>/samples`, `skipped`, `level_free_loss` (which it reads).
    A SummaryWriter also gets the figure of `plot`, if matplotlib is installed, and a histogram of log-SNR.

    Args:
        writer: a torch or tensorboardX SummaryWriter; anything with `.log(values, step=...)` (Weights & Biases,
            `accelerate.Accelerator`) or `.log_metrics(values, step=...)` (Lightning's loggers, MLflow, Comet); or a
            function of (values, step). With several processes, call it in one of them.
        step: optimiser steps so far.
        prefix: first part of the names.
        bands: number of intervals of `log_snr_range`.

    Raises:
        TypeError: the writer is none of these, or step is not an integer; nothing is written then.
        ValueError: bands is not a positive integer.
    """
    values: dict[str, Any] = dict(_scalars(criterion, bands_of(criterion, bands), prefix))
    if isinstance(writer, MetricsFile):  # which takes text
        values[f"{prefix}/weighting"] = str(criterion.weighting)
        target = target_of(criterion)
        if target is not None:
            values[f"{prefix}/target"] = target.description
        values[f"{prefix}/verdict"] = diagnose(criterion).verdict
    log_values(writer, values, step)
    judge_at_read(criterion)
    if hasattr(writer, "add_figure"):
        with contextlib.suppress(MissingExtraError):  # without matplotlib only scalars are logged
            writer.add_figure(f"{prefix}/noise_levels", _figure(criterion), int(step))
    if hasattr(writer, "add_histogram_raw"):
        _add_histogram(criterion, writer, int(step), prefix)


def log_values(writer: Any, values: dict[str, float], step: int) -> None:
    """Log numbers by name to any of the trackers that `DiffusionLoss.log_to` knows.

    Raises:
        TypeError: not a tracker, or a step that is not an integer.
    """
    log = _logger(writer)
    if not isinstance(step, numbers.Integral) or isinstance(step, bool):
        raise TypeError(f"step is {step!r}, expected an integer: the number of optimiser steps")
    log(values, int(step))


def _logger(writer: Any) -> Callable[[dict[str, float], int], object]:
    """Function that logs a dict of numbers at a step to this kind of tracker."""
    if hasattr(writer, "add_scalar"):  # torch.utils.tensorboard.SummaryWriter and its kin

        def scalar_by_scalar(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        return scalar_by_scalar
    if isinstance(writer, nn.Module):  # a LightningModule, whose `log` takes a name and one value
        raise TypeError(f"writer is a module ({type(writer).__name__}): pass its tracker, in Lightning self.logger")
    if hasattr(writer, "log_metrics"):  # Lightning's loggers, MLflow, Comet
        return lambda values, step: writer.log_metrics(values, step=step)
    if hasattr(writer, "log"):  # W&B, Accelerate, Trackio
        return lambda values, step: writer.log(values, step=step)
    if callable(writer):
        return lambda values, step: writer(values, step)
    raise TypeError(
        f"writer is a {type(writer).__name__}, expected a SummaryWriter, something with .log(values, step=...) or "
        ".log_metrics(values, step=...), or a function of (values, step)"
    )


def _scalars(criterion: Criterion, found: Bands, prefix: str) -> Iterator[tuple[str, float]]:
    """(name, value) of every finite statistic; the names use only characters that every tracker accepts."""
    edges = [f"{edge:.4g}" for edge in found.edges.tolist()]
    columns = {
        "base_loss": found.mean,
        "std": found.std,
        "relative_std": found.std / found.mean,
        "weight": found.weight,
        "share": found.share,
    }
    for name, values in columns.items():
        for low, high, count, value in zip(edges, edges[1:], found.samples.tolist(), values.tolist(), strict=False):
            if count > 0 and math.isfinite(value):
                yield f"{prefix}/{name}/log_snr_{low}_to_{high}", value
    if target_of(criterion) is not None:
        removed = removed_error(criterion, criterion.bin_centers).cpu()
        band = band_of_bins(len(removed), len(edges) - 1)
        for number, (low, high) in enumerate(itertools.pairwise(edges)):
            if found.samples[number] > 0:
                yield f"{prefix}/removed_x0_error/log_snr_{low}_to_{high}", removed[band == number].mean().item()
    yield f"{prefix}/samples", found.samples.sum().item()
    yield f"{prefix}/skipped", float(criterion.statistics.skipped)
    level_free = float(criterion.statistics.read_level_free_loss())
    if not math.isnan(level_free) or found.samples.sum() > 0:  # NaN of non-finite losses is not hidden
        yield f"{prefix}/level_free_loss", level_free


def _add_histogram(criterion: Criterion, writer: Any, step: int, prefix: str) -> None:
    """Log a TensorBoard histogram of the samples' log-SNR."""
    bins, counts = criterion.statistics.bins, criterion.statistics.count.cpu()
    if counts.sum() > 0:
        centers = criterion.bin_centers.cpu().double()
        writer.add_histogram_raw(
            f"{prefix}/log_snr",
            min=bins.low,
            max=bins.low + bins.size * bins.width,
            num=counts.sum().item(),
            sum=(counts * centers).sum().item(),
            sum_squares=(counts * centers.square()).sum().item(),
            bucket_limits=(centers + bins.width / 2).tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )


def _figure(criterion: Criterion) -> Any:
    """A figure outside pyplot's registry, which needs no `close`."""
    figure = import_extra("matplotlib.figure", "report").Figure(figsize=(6.4, 5.2), layout="constrained")
    _draw(criterion, *figure.subplots(2, 1, sharex=True))
    return figure


def _draw(criterion: Criterion, loss_axes: Any, weight_axes: Any) -> None:
    statistics = criterion.statistics
    count, mean, variances = (values.cpu() for values in (statistics.count, statistics.mean, statistics.variance))
    centers, weight = criterion.bin_centers.cpu().double(), criterion.weights.cpu().double()  # [K]
    seen = count > 0
    drawn = seen if seen.any() else ~seen  # without samples, the weights of all bins
    centers, mean, std, weight = (values[drawn] for values in (centers, mean, variances.sqrt(), weight))
    if seen.any():
        loss_axes.fill_between(centers, mean - std, mean + std, color=_LOSS_COLOR, alpha=0.25, linewidth=0)
        loss_axes.plot(centers, mean, color=_LOSS_COLOR, marker=".", label="mean")
        if _wide(mean):
            loss_axes.set_yscale("log", nonpositive="clip")
            loss_axes.set_ylim(mean.min().item() / 3, (mean + std).max().item() * 1.5)
    else:
        why = _why_none(int(statistics.skipped)).replace(": ", ":\n")
        loss_axes.text(0.5, 0.5, why, ha="center", va="center", transform=loss_axes.transAxes)
    loss_axes.set_ylabel("base loss, mean ± std\nover samples", color=_LOSS_COLOR)
    if not weight.isnan().all():
        weight_axes.axhline(1.0, color="0.7", linewidth=0.8)
        weight_axes.plot(centers, weight, color=_WEIGHT_COLOR, linestyle="--", marker=".")
        if _wide(weight):
            weight_axes.set_yscale("log")
    else:
        weight_axes.text(
            0.5, 0.25, "weights depend on the whole batch", ha="center", va="center", transform=weight_axes.transAxes
        )
    weight_axes.set_ylabel("weight w\n(1 = own objective)", color=_WEIGHT_COLOR)
    weight_axes.set_xlabel(LOG_SNR)
    loss_axes.grid(alpha=0.3)
    loss_axes.set_title(f"{criterion.weighting}", fontsize="medium", wrap=True)


def _wide(values: Tensor) -> bool:
    """Whether the values (ignoring NaN) are positive and spread over more than an order of magnitude."""
    values = values[~values.isnan()]
    return bool(len(values) and values.min() > 0 and values.max() > _WIDE * values.min())


def _number(value: float) -> str:
    return f"{value:7.3g}" if value == value else f"{'-':>7}"
