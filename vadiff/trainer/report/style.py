"""Style of all charts of a report: plotly figures that are readable on a light and a dark page."""

import contextlib
import html
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...extras import import_extra
from .runs import Array

LOG_SNR = "log-SNR λ = −2 ln σ (nats)<br>← more noise · less noise →"
IMAGES = "training images seen"

_GROUNDS = {  # mode → ink, soft ink, grid, ground
    "light": ("#1f2933", "#52606d", "#e4e7eb", "#ffffff"),
    "dark": ("#e6e9ed", "#a9b4c0", "#333c47", "#171c23"),
}
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
_HEIGHT, _LEGEND_LINE = 380, 20  # pixels


class Line(NamedTuple):
    """Colour and dash of a group of runs."""

    color: str
    dash: str


# Okabe & Ito's colour-blind-safe colours, with grey for their black and the two palest darker: each has a contrast of
# at least 3 with both grounds, as WCAG 2.1 asks of graphics. Dashes for readers who see no colours.
_COLORS = ("#7d8590", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#b07d00", "#3a99d1")
_DASHES = ("solid", "dash", "dashdot", "dot")


ONLY, OTHER = Line("#0072B2", "solid"), Line("#D55E00", "dash")  # of a chart without groups, and a second line there


def line(index: int) -> Line:
    """The style of group number `index`; the first 28 are different."""
    return Line(_COLORS[index % len(_COLORS)], _DASHES[(index % len(_COLORS) + index // len(_COLORS)) % len(_DASHES)])


@dataclass(frozen=True)
class Chart:
    """One chart, with a title and a caption that says what to look for."""

    name: str  # unique on the page; names the file if the reader saves the chart
    title: str
    caption: str
    figure: Any  # a plotly Figure without a title


def new_figure(x_title: str, y_title: str, **layout: Any) -> Any:
    """An empty plotly Figure in the light template, with hover labels that list all lines at one x.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    figure = import_extra("plotly.graph_objects", "report").Figure(layout={"template": template("light")})
    figure.update_layout(height=_HEIGHT, **layout)
    figure.update_xaxes(title_text=x_title)
    figure.update_yaxes(title_text=y_title)
    return figure


def template(mode: str) -> dict[str, Any]:
    """The part of a layout that depends on the page's "light" or "dark" ground."""
    ink, soft, grid, ground = _GROUNDS[mode]
    axis = {
        "automargin": True, "gridcolor": grid, "linecolor": soft, "showline": True, "tickcolor": soft,
        "tickfont": {"size": 12}, "ticks": "outside", "title": {"font": {"size": 13}, "standoff": 8}, "zeroline": False,
    }  # fmt: skip
    font = {"size": 13, "color": ink}
    legend = {
        "orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "font": {"size": 13},
        "itemsizing": "trace",
    }  # fmt: skip
    return {
        "layout": {
            "font": {"family": _FONT, **font},
            "paper_bgcolor": ground,  # not transparent: a saved picture has its ground
            "plot_bgcolor": ground,
            "margin": {"l": 8, "r": 40, "t": 8, "b": 8},
            "hovermode": "x unified",
            "hoverlabel": {"bgcolor": ground, "bordercolor": soft, "font": font, "namelength": -1},
            "legend": legend,
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": soft, "activecolor": ink, "orientation": "v"},
            "updatemenudefaults": {"bgcolor": ground, "bordercolor": soft, "font": font},
            "xaxis": axis,
            "yaxis": {**axis, "exponentformat": "e"},
        }
    }


def text(label: str) -> str:
    """A label as plotly shows it unchanged: plotly reads texts as HTML."""
    return html.escape(label, quote=False)


def make_room_for_legend(figure: Any, number: int) -> None:
    """Higher figure for a legend of many lines, of which a phone shows one in a row."""
    figure.update_layout(height=_HEIGHT + _LEGEND_LINE * max(0, number - 2), showlegend=number > 1)


def log_snr_axis(figure: Any, limits: tuple[float, float] | None = None) -> None:
    """Name λ and, in a line without a mark, σ above the values that the pointer shows; call after drawing."""
    figure.update_xaxes(unifiedhovertitle_text="λ = %{x:.2f}", range=limits)
    first = figure.data[0]
    figure.add_scatter(
        x=first.x,
        y=first.y,
        customdata=np.exp(-0.5 * np.asarray(first.x, dtype=float)),
        name="σ",
        hovertemplate="%{customdata:.3~g}",
        mode="markers",
        marker={"color": "rgba(0,0,0,0)"},
        showlegend=False,
    )
    figure.data = (figure.data[-1], *figure.data[:-1])


def images_axis(figure: Any, last: float | None = None) -> None:
    """Axis of training images from 0."""
    figure.update_xaxes(
        tickformat="~s", rangemode="tozero", range=None if last is None else (0, last),
        unifiedhovertitle_text="%{x:,.0f} images",
    )  # fmt: skip


def log_axis(figure: Any, *values: Array) -> None:
    """Logarithmic vertical axis around these values, with plain numbers."""
    known = np.concatenate([np.ravel(each) for each in values]) if values else np.array([])
    known = known[np.isfinite(known) & (known > 0)]
    if not len(known):
        return
    low, high = float(known.min()), float(known.max())
    margin = max((high / low) ** 0.06, 1.01)
    low, high = low / margin, high * margin
    figure.update_yaxes(type="log", range=(np.log10(low), np.log10(high)), tickformat="~g")
    if high >= 10 * low:  # plotly would write 2 and 5 in small print
        figure.update_yaxes(tickvals=round_numbers(low, high))


def round_numbers(low: float, high: float) -> list[float]:
    """Up to eight round numbers from `low` > 0 to `high`, for a logarithmic axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for digits in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [float(f"{digit}e{power}") for power in powers for digit in digits]
        found = [value for value in found if low <= value <= high]
        if len(found) <= 8:
            break
    return found


def add_spread(
    figure: Any,
    x: Array,
    rows: Array,
    style: Line,
    label: str,
    *,
    unit: str = "",
    markers: bool = False,
    visible: bool | str = True,
) -> None:
    """Draw the mean over runs, `rows` [runs, X], and with several runs a band of ± 1 standard deviation.

    Args:
        label: in the legend, which hides line and band together.
        unit: after the number at the pointer.
        markers: whether points are marked.
        visible: as of a trace; "legendonly" until the reader chooses it.
    """
    with all_nan_is_no_value():
        middle = np.nanmean(rows, 0) if len(rows) else np.array([])
        spread = np.nanstd(rows, 0, ddof=1) if len(rows) > 1 else np.full(len(x), np.nan)
    known = [f" ± {value:.2g}" if np.isfinite(value) else "" for value in spread]
    add_line(
        figure, x, middle, style, label, unit=unit, markers=markers, spoken=known,
        visible=visible,
    )  # fmt: skip
    if np.isfinite(spread).any():
        add_band(figure, x, middle - spread, middle + spread, style.color, label, visible=visible)


def add_line(
    figure: Any,
    x: Array,
    y: Array,
    style: Line,
    label: str,
    *,
    unit: str = "",
    markers: bool = False,
    spoken: list[str] | None = None,
    visible: bool | str = True,
    width: float = 2.2,
) -> None:
    """A line whose values are shown at the pointer with four digits, followed by `spoken` and `unit`."""
    figure.add_scatter(
        x=x,
        y=y,
        name=text(label),
        legendgroup=text(label),
        mode="lines+markers" if markers or len(x) == 1 else "lines",
        line={"color": style.color, "dash": style.dash, "width": width},
        marker={"size": 6, "color": style.color},
        text=spoken,
        hovertemplate="%{y:.4~g}" + ("%{text}" if spoken is not None and any(spoken) else "") + unit,
        visible=visible,
    )


def add_band(
    figure: Any, x: Array, low: Array, high: Array, color: str, label: str, *, visible: bool | str = True
) -> None:
    """Shaded area between two lines, hidden with the line of that label."""
    known = np.isfinite(low) & np.isfinite(high)
    figure.add_scatter(
        x=np.concatenate([x[known], x[known][::-1]]),
        y=np.concatenate([high[known], low[known][::-1]]),
        name=text(label),
        legendgroup=text(label),
        showlegend=False,
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=f"rgba({', '.join(str(int(color[at : at + 2], 16)) for at in (1, 3, 5))}, 0.2)",
        hoverinfo="skip",
        visible=visible,
    )


@contextlib.contextmanager
def all_nan_is_no_value() -> Iterator[None]:
    """Silence the warning of means over no values, which are NaN."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Mean of empty slice|All-NaN|Degrees of freedom)", RuntimeWarning)
        yield
