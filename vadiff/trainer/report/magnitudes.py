"""Magnitudes of weights, their updates and activations over training: the figure behind EDM2's argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...extras import import_extra
from .charts import styles_of
from .runs import Group
from .style import Chart, add_band, add_line, all_nan_is_no_value, log_axis, make_room_for_legend, new_figure

_ROWS = {"activations": "activations", "weights": "weights", "relative": "update ÷ weight, last step"}
_LOOK = {
    "activations": "Look for activations that grow or drift apart.",
    "weights": "Look for weights that grow, which makes the same update ever smaller in proportion.",
    "relative": "Update of the last step ÷ weight. Look for layers far from the others: they learn faster or slower.",
}
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


def magnitude_charts(groups: Sequence[Group]) -> list[Chart]:
    """A chart each of RMS of activations, weights and relative updates over training, of runs with `log_rms`.

    Of one run every layer is a line, of several the band reaches from the lowest layer to the highest.
    """
    shown = [group for group in groups if group.first.magnitudes]
    series = {group.label: rms_over_training(group.first.magnitudes) for group in shown}
    found = []
    for row, title in _ROWS.items():
        present = [group for group in shown if row in series[group.label][1]]
        if not present:
            continue
        figure = new_figure("step", f"RMS of {title}" if row != "relative" else title)
        for group in present:
            steps, values = series[group.label][0], series[group.label][1][row]
            style = styles_of(groups)[group.label]
            if len(groups) == 1:
                _add_layers(figure, steps, values)
            with all_nan_is_no_value():
                middle, low, high = (function(values, 1) for function in (np.nanmedian, np.nanmin, np.nanmax))
            spoken = [f" ({a:.3g} to {b:.3g})" for a, b in zip(low, high, strict=True)]
            label = "median of layers" if len(groups) == 1 else group.label
            add_line(figure, steps, middle, style, label, spoken=spoken)
            if len(groups) > 1:
                add_band(figure, steps, low, high, style.color, label)
        log_axis(figure, *(series[group.label][1][row] for group in present))
        figure.update_xaxes(rangemode="tozero", unifiedhovertitle_text="step %{x:,.0f}")
        make_room_for_legend(figure, len(present) if len(groups) > 1 else 2)
        shape = "thin lines: layers" if len(groups) == 1 else "band: from the lowest layer to the highest"
        found.append(
            Chart(
                f"magnitudes-{row}",
                f"Magnitude of {_ROWS[row]}" if row != "relative" else "Size of an update relative to the weight",
                f"Root mean square. Thick line: median of the layers; {shape}. {_LOOK[row]}",
                figure,
            )
        )
    return found


def _add_layers(figure: Any, steps: np.ndarray, values: np.ndarray) -> None:
    """A thin line for each layer, all hidden by one entry of the legend, without a value at the pointer."""
    gaps = np.full((1, values.shape[1]), np.nan)  # between one layer and the next
    figure.add_scatter(
        x=np.tile(np.append(steps.astype(float), np.nan), values.shape[1]),
        y=np.concatenate([values, gaps]).T.ravel(),
        mode="lines",
        line={"width": 0.8, "color": _LAYERS},
        opacity=0.7,
        name=f"{values.shape[1]} layers",
        hoverinfo="skip",
    )


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
