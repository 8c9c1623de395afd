"""Style of all charts of a report."""

import contextlib
import io
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...extras import import_extra

LOG_SNR = "log-SNR λ = −2 ln σ  (nats)      ← more noise · less noise →"
IMAGES = "training images seen"

_INK, _FAINT = "#1f2933", "#dfe3e8"
_RC = {
    "font.size": 10,
    "axes.edgecolor": "#7b8794",
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _FAINT,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.9,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "legend.frameon": False,
    "svg.hashsalt": "vadiff",  # the same data give the same file
}


class Line(NamedTuple):
    """Colour and dash of a group of runs."""

    color: str
    dash: str


# Okabe & Ito's colour-blind-safe colours without the pale yellow; dashes for black-and-white prints.
_COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":")


def line(index: int) -> Line:
    """The style of group number `index`; the first 28 are different."""
    return Line(_COLORS[index % len(_COLORS)], _DASHES[(index % len(_COLORS) + index // len(_COLORS)) % len(_DASHES)])


@dataclass(frozen=True)
class Chart:
    """One chart, with a title and a caption that says what to look for."""

    name: str  # file name without its ending
    title: str
    caption: str
    draw: Callable[[Any], None]  # draws on a matplotlib Axes
    group: str = ""  # label of its group, if each group has such a chart

    def picture(self, kind: str, *, described: bool, compact: bool = False) -> bytes:
        """The chart as "svg" or "png", with or without its title and caption; `compact` for charts side by side.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        matplotlib = import_extra("matplotlib", "report")
        figure_module = import_extra("matplotlib.figure", "report")
        with matplotlib.rc_context(_RC):
            width, height = (4.9, 3.5) if compact else (6.4, 4.1)
            lines = textwrap.wrap(self.caption, 92) if described else []
            head = 0.36 + 0.19 * len(lines) if described else 0.0
            figure = figure_module.Figure(figsize=(width, height + head), layout="constrained", facecolor="white")
            area = figure
            if described:
                heading, area = figure.subfigures(2, 1, height_ratios=(head, height))
                heading.text(
                    0.015,
                    1.0 - 0.1 / head,
                    f"{self.title} · {self.group}" if self.group else self.title,
                    fontsize=12,
                    weight="bold",
                    va="top",
                )
                heading.text(0.015, 1.0 - 0.37 / head, "\n".join(lines), fontsize=9, va="top", linespacing=1.35)
            panel = area.subplots()
            self.draw(panel)
            handles, labels = panel.get_legend_handles_labels()
            if handles:
                columns = max(1, min(len(labels), 78 // (max(map(len, labels)) + 7)))
                area.legend(handles, labels, loc="outside lower left", ncols=columns, fontsize=9, handlelength=2.6)
            return _written(figure, kind)


def _written(figure: Any, kind: str) -> bytes:
    file = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None  # no date: the same data give the same file
    figure.savefig(file, format=kind, dpi=170, metadata=metadata)
    return file.getvalue()


@contextlib.contextmanager
def all_nan_is_no_value() -> Iterator[None]:
    """Silence the warning of means over no values, which are NaN."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Mean of empty slice|All-NaN|Degrees of freedom)", RuntimeWarning)
        yield
