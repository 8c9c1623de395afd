"""Magnitudes of weights, their updates and activations over training: the figure behind EDM2's argument."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...extras import import_extra

_ROWS = {"activations": "activations", "weights": "weights", "relative": "update ÷ weight, last step"}
_LAYERS, _MEDIAN = "#56B4E9", "#D55E00"  # Okabe & Ito's


def magnitudes_figure(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """RMS per layer over training: rows for activations, weights and relative updates, a column for each run.

    The axes of a row are shared, so that networks can be compared. Points where a layer's RMS is 0 (a gain that starts
    from 0) are not drawn.

    Args:
        runs: name → lines of metrics.jsonl of a run with `log_rms`; lines without RMS are ignored.

    Returns:
        A `matplotlib.figure.Figure`; `figure.savefig(path)` writes it.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: a run without such lines.
    """
    series = {name: rms_over_training(lines) for name, lines in runs.items()}
    for name, (steps, _) in series.items():
        if not len(steps):
            raise ValueError(f"{name} has logged no magnitudes, expected a run with log_rms: train with --log-rms")
    rows = [row for row in _ROWS if any(row in found for _, found in series.values())]
    figure = import_extra("matplotlib.figure", "report").Figure(
        figsize=(4.6 * len(series) + 0.6, 2.9 * len(rows) + 0.4), dpi=120, facecolor="white", layout="constrained"
    )
    panels = figure.subplots(len(rows), len(series), squeeze=False, sharex="col", sharey="row")
    for column, (name, (steps, found)) in enumerate(series.items()):
        panels[0][column].set_title(name)
        panels[-1][column].set_xlabel("step")
        for row, panel in zip(rows, panels[:, column], strict=True):
            panel.set_yscale("log")
            panel.grid(alpha=0.25)
            if row != "relative":
                panel.axhline(1.0, color="#888888", linewidth=1, linestyle=":")
            if row in found:
                _draw(panel, steps, found[row])
    for row, panel in zip(rows, panels[:, 0], strict=True):
        panel.set_ylabel(f"RMS of {_ROWS[row]}" if row != "relative" else _ROWS[row])
    panels[0][0].legend(frameon=False)
    return figure


def magnitudes_svg(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """`magnitudes_figure` as SVG; the same data give the same bytes."""
    file = io.BytesIO()
    with import_extra("matplotlib", "report").rc_context({"svg.hashsalt": "vadiff"}):
        magnitudes_figure(runs).savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def rms_over_training(lines: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps [R], and RMS of "activations", "weights" and "relative" updates of L layers, [R, L] each; NaN for none."""
    logged = [line for line in lines if "rms" in line]
    steps = np.array([line["step"] for line in logged])
    found = {}
    for what in ("activations", "weights", "updates"):
        if logged and all(what in line["rms"] for line in logged):
            layers = list(logged[0]["rms"][what])
            found[what] = np.array([[line["rms"][what][layer] for layer in layers] for line in logged], dtype=float)
    if "updates" in found:
        with np.errstate(divide="ignore", invalid="ignore"):
            found["relative"] = found.pop("updates") / found["weights"]
    return steps, {what: np.where(values > 0, values, np.nan) for what, values in found.items()}


def _draw(panel: Any, steps: np.ndarray, values: np.ndarray) -> None:
    panel.plot(steps, values, color=_LAYERS, linewidth=0.7, alpha=0.6)
    panel.lines[-1].set_label("one layer")
    known = np.isfinite(values).any(1)
    panel.plot(steps[known], np.nanmedian(values[known], 1), color=_MEDIAN, linewidth=2.2, label="median of layers")
