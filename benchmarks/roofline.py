"""Plot of each provider's bandwidth, against the copy bandwidth, over the bytes that must move.

python benchmarks/roofline.py benchmarks/results/<device>-<date>.json roofline.png

The loss does a few operations per byte: on every machine it is bound by memory, not by arithmetic. The horizontal axis
is therefore bytes instead of intensity: small calls are bound by the cost of a call, large ones by the bandwidth.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from measurements import Results, read
from providers import PROVIDERS

from vadiff.extras import import_extra

_MODES = {"fused": "o", "graph": "^", "deferred": "s"}  # mode → marker


def draw(results: Results, path: Path) -> None:
    """Draw the plot into a file of any format that matplotlib writes.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = import_extra("matplotlib", "report")
    matplotlib.use("Agg")
    pyplot = import_extra("matplotlib.pyplot", "report")
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for index, (name, provider) in enumerate(PROVIDERS.items()):
        for mode, marker in _MODES.items():
            points = sorted(
                (m.bytes, m.bandwidth / 1e9)
                for m in results.measurements
                if m.provider == name and m.mode == mode and m.bandwidth is not None
            )
            if points:
                label = provider.title if mode == "fused" else f"{provider.title}, {mode}"
                # One line for each provider; replays and deferred gradients are points beside it.
                line = "-" if mode == "fused" else ""
                axes.plot(*zip(*points, strict=True), line, color=f"C{index}", marker=marker, label=label, lw=1, ms=5)
    roof = results.copy.best / 1e9
    axes.axhline(roof, color="black", lw=1, ls="--", label=f"copy ({results.copy.kind}): {roof:.0f} GB/s")
    axes.set(
        xscale="log", yscale="log", xlabel="bytes that must move", ylabel="GB/s",
        title=f"{results.machine['device']}: forward + backward",
    )  # fmt: skip
    axes.grid(which="both", lw=0.2)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a result file of the benchmarks")
    parser.add_argument("picture", type=Path, help="where to draw, e.g. roofline.png")
    options = parser.parse_args(arguments)
    results = read(options.results)
    if results is None:
        parser.error(f"{options.results} is not a result file of the benchmarks")
    draw(results, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
