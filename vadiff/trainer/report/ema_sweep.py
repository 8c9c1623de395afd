"""Quality of a run's averaged weights as a function of the width of the average."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...extras import import_extra
from ...files import check_writable, replacing
from ...sampling.generation import Generation, with_options
from ..training import HeldOutLoss, Run
from ..training.stopping import stoppable
from .comparison import Comparison, Reference, check_drawn, compare, prepared, read_reference
from .drawn_images import draw_images
from .training_charts import METRICS, metric_title


def sweep_scores(losses: Mapping[Any, HeldOutLoss]) -> dict[Any, float]:
    """Mean over noise levels of each held-out loss, see `level_mean`."""
    return {name: loss.level_mean for name, loss in losses.items()}


def lowest_of(widths: Mapping[float, float], others: Mapping[str, float]) -> str:
    """Name of the weights with the lowest of `sweep_scores`: "ema-0.1", or "ema" and "raw" of the run's own."""
    scores = {f"ema-{width:g}": score for width, score in widths.items()} | dict(others)
    return min(scores, key=lambda name: scores[name])


def scores_table(widths: Mapping[float, float], others: Mapping[str, float]) -> str:
    """`sweep_scores` of the widths and of the run's own weights as text; the lowest of all is marked."""
    rows = {f"ema-{width:g}": widths[width] for width in sorted(widths)} | dict(others)
    lowest = lowest_of(widths, others)
    lines = [f"  {name:>9} {score:.5f}{'  lowest' if name == lowest else ''}" for name, score in rows.items()]
    return "\n".join(["x0 loss on held-out images, geometric mean over noise levels:", *lines])


def check_sweep(folder: Path, *, sweep: bool) -> None:
    """Raise unless averages can be written to a folder, and a sweep be drawn: before minutes of measuring.

    Raises:
        OSError: the folder cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    check_writable(folder, folder=True)
    if sweep:
        import_extra("matplotlib", "report")


@contextmanager
def sweep_written(
    folder: Path, content: dict[str, Any], figure: Callable[[], Any]
) -> Iterator[Callable[[Mapping[float | str, Mapping[str, float]]], None]]:
    """Write sweep.json now and each time that the function is called, and sweep.png at the end.

    Args:
        folder: of both.
        content: of sweep.json without metrics.
        figure: makes the picture.

    Yields:
        Writes sweep.json with the metrics of the weights that are measured so far.

    Raises:
        Stopped: SIGTERM or SIGINT.
    """

    def write(metrics: Mapping[float | str, Mapping[str, float]]) -> None:
        named = {name if isinstance(name, str) else f"ema-{name:g}": values for name, values in metrics.items()}
        with replacing(folder / "sweep.json") as partial:
            partial.write_text(json.dumps(content | ({"metrics": named} if named else {})) + "\n")

    write({})
    with stoppable(f"what was measured is in {folder / 'sweep.json'}; the same command measures all anew"):
        yield write
    with replacing(folder / "sweep.png") as partial:
        figure().savefig(partial, format="png")


def prepared_sweep(run: Run, number: int, comparison: Comparison) -> tuple[Comparison, Reference]:
    """Find what `sweep_metrics` needs, before anything is measured.

    Args:
        run: what `open_run` returned.
        number: of images to draw with each of the weights.
        comparison: with real images, see `Comparison`.

    Returns:
        The comparison as `prepared` makes it, and the real images or their statistics.

    Raises:
        ValueError: invalid options of the comparison.
        UserError: the data set is missing, or the weights of the network could not be downloaded.
        MissingExtraError: torch-fidelity is not installed.
    """
    comparison, _ = prepared(comparison, run.config.dataset)
    chosen = comparison.reference
    reference = run.images().train[:] if chosen is None else read_reference(chosen, comparison)
    check_drawn(run.encoding.picture_shape(run.config.image_shape), number, reference, comparison)
    return comparison, reference


def sweep_metrics(
    run: Run,
    weights: Sequence[float | str],
    step: int,
    seeds: Sequence[int],
    comparison: Comparison,
    reference: Reference,
    generation: Generation,
) -> Iterator[tuple[float | str, dict[str, float]]]:
    """Image metrics (FID, ...) for each of the given weights, drawn from the same seeds; also printed.

    Args:
        run: what `open_run` returned.
        weights: widths of averages that `write_averages` made, or "ema" and "raw".
        step: of these weights.
        seeds: one per image.
        comparison, reference: what `prepared_sweep` returned.
        generation: how images are drawn; its weights and step are not read. They are compared on its first device.

    Yields:
        Each of the weights, and metric → value.
    """
    for each in weights:
        name = each if isinstance(each, str) else f"ema-{each:g}"
        images = draw_images(run, seeds, with_options(generation, weights=name, step=step))
        print(f"\n{name}: ", end="")
        yield each, compare(images, reference, comparison, generation.devices[0])


def sweep_figure(
    losses: Mapping[float, HeldOutLoss],
    others: Mapping[str, HeldOutLoss],
    kept: tuple[float, ...] = (),
    metrics: Mapping[float | str, Mapping[str, float]] | None = None,
) -> Any:
    """Held-out loss over σ_rel: mean over noise levels, each level relative to its lowest loss, then each metric.

    Args:
        losses: held-out loss of each width, on the same images, levels and noise.
        others: held-out loss of other weights of the run, drawn as horizontal lines.
        kept: the widths tracked during training; marked.
        metrics: what `sweep_metrics` gave, for the same widths and other weights.

    Returns:
        A `matplotlib.figure.Figure`; `figure.savefig(path)` writes it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = import_extra("matplotlib", "report")
    names = [name for name in next(iter(metrics.values()), {}) if name.split("-")[0] in METRICS] if metrics else []
    figure = import_extra("matplotlib.figure", "report").Figure(
        figsize=(6.25 * (2 + len(names)), 4.6), dpi=120, facecolor="white", layout="constrained"
    )
    overall, by_level, *panels = figure.subplots(1, 2 + len(names))
    widths = sorted(losses)
    _curve(overall, sweep_scores(losses) | sweep_scores(others), widths, kept)
    overall.set_ylabel("held-out x0 loss, geometric mean over noise levels")
    per_level = np.stack([losses[width].mean.double().numpy() for width in widths])  # [W, L]
    ratio = per_level / per_level.min(0)
    sigmas = np.exp(-0.5 * losses[widths[0]].log_snr.double().numpy())
    colors = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.92, len(sigmas)))
    for level, (sigma, color) in enumerate(zip(sigmas, colors, strict=True)):
        by_level.plot(widths, ratio[:, level], color=color, linewidth=1.5, label=f"σ = {sigma:.2g}")
    by_level.set_ylabel("held-out loss ÷ lowest at that noise level")
    by_level.legend(frameon=False, fontsize=8, ncols=2)
    for name, panel in zip(names, panels, strict=True):
        assert metrics is not None
        _curve(panel, {weights: values[name] for weights, values in metrics.items()}, widths, kept)
        better = METRICS[name.split("-")[0]][1].partition(":")[0]
        panel.set_ylabel(f"{metric_title(name)} ({better})")
    for panel in (overall, by_level, *panels):
        panel.set_xlabel("width of the average, σ_rel      ← less averaging · more averaging →")
        panel.grid(alpha=0.25)
    return figure


def _curve(panel: Any, values: Mapping[Any, float], widths: Sequence[float], kept: tuple[float, ...]) -> None:
    """Draw a value over the widths, and horizontal lines for other weights."""
    panel.plot(widths, [values[width] for width in widths], color="#0072B2", marker="o", markersize=4, linewidth=2)
    stored = [width for width in widths if width in kept]
    if stored:
        panel.plot(stored, [values[width] for width in stored], "s", color="#D55E00", label="kept while training")
    others = [name for name in values if isinstance(name, str)]
    for name, dash in zip(others, ("--", ":", "-."), strict=False):
        panel.axhline(values[name], color="#888888", linestyle=dash, linewidth=1.5, label=name)
    if stored or others:
        panel.legend(frameon=False)
