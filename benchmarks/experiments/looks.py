"""Colours and sizes of the docs' SVG pictures: readable on white and on dark pages, and at 400 px.

A page shows one file in both modes, so the background is transparent and every colour has a contrast of at least 3.3
with white and with the dark pages of the site and of GitHub. Figures are about 400 px wide
(1 inch is 96 px), so that a phone hardly shrinks them.
"""

from __future__ import annotations

from typing import Any

GREY = "#808080"
BLUE, GREEN, ORANGE = "#3a87c2", "#1f9a70", "#c97b12"
WIDTH = 4.2  # inches
LOOKS: dict[str, Any] = {
    "svg.hashsalt": "vadiff", "savefig.transparent": True, "font.size": 10, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": GREY,
    "axes.titlecolor": GREY, "axes.titlesize": 10, "text.color": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "grid.color": GREY, "grid.alpha": 0.3, "lines.linewidth": 1.8,
}  # fmt: skip
