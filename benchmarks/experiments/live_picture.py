"""The picture of docs/live.md: `criterion.plot()` of the training on that page, whose code this runs.

python benchmarks/experiments/live_picture.py    # writes docs/live.svg, in seconds on a CPU
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import matplotlib
from looks import GREY, LOOKS, WIDTH
from matplotlib.figure import Figure

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = DOCS / "live.md"


def criterion_of_the_page() -> Any:
    """The criterion after the Python blocks above the heading "A picture"."""
    above = PAGE.read_text().partition("## A picture")[0]
    namespace: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```", above, re.M | re.S):
        exec(code, namespace)
    return namespace["criterion"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS / "live.svg", help="default: %(default)s")
    options = parser.parse_args(arguments)
    with matplotlib.rc_context(LOOKS):
        figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        criterion_of_the_page().plot((upper, lower))
        upper.set_title(upper.get_title(), color=GREY, fontsize=9, wrap=True)
        lower.set_xlabel(lower.get_xlabel(), fontsize=8)
        figure.savefig(options.out, metadata={"Date": None} if options.out.suffix == ".svg" else None)
    print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
