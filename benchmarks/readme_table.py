"""The speed tables in README and docs, made from the committed result files.

python benchmarks/readme_table.py            # print them
python benchmarks/readme_table.py --write    # put them between the markers in README.md and docs/performance.md
python benchmarks/readme_table.py --add FILE # the same, with a result file that was written elsewhere
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import figures
import machine
from measurements import RESULTS, Measurement, Results, newest_by_device, read
from providers import PROVIDERS
from table import seconds

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- speed: made by benchmarks/readme_table.py -->", "<!-- end of speed -->"

_ROWS = {
    "CIFAR, batch 128, fp32": ("cifar-128", "fp32", "fused"),
    "CIFAR, batch 512, fp32": ("cifar-512", "fp32", "fused"),
    "the same, CUDA graph replay": ("cifar-512", "fp32", "graph"),
    "latents 64 × 4 × 64 × 64, fp32": ("latents-64", "fp32", "fused"),
    "latents 64 × 4 × 128 × 128, bf16": ("latents-128", "bf16", "fused"),
    "video latents 8 × 16 × 16 × 60 × 90, bf16": ("video", "bf16", "fused"),
    "larger than any cache, fp32": ("huge", "fp32", "fused"),
    "training step of a small U-Net, batch 8": ("unet-8", "fp32", "training-step"),
    "training step of a small U-Net, batch 64": ("unet-64", "fp32", "training-step"),
    "training step of a small U-Net, batch 512": ("unet-512", "fp32", "training-step"),
}


class MarkersError(ValueError):
    """A page lacks the markers for the tables."""


def tables(found: list[Results]) -> dict[Path, str]:
    """The text between the markers of each page."""
    return {README: markdown(found, figures_in="docs/performance.md"), PERFORMANCE: markdown(found)}


def markdown(found: list[Results], figures_in: str | None = None) -> str:
    """Per device a table of times and a table of the design's figures, or only their number.

    Args:
        figures_in: link to the page with the table of figures; None includes it here.
    """
    if not found:
        return "No speeds are committed yet: `make bench` measures them on a CPU, `benchmarks/gpu.sh` on a GPU."
    return "\n\n".join("\n".join(_device(results, figures_in)) for results in found)


def _device(results: Results, figures_in: str | None) -> Iterator[str]:
    machine = results.machine
    changed = ", with changes" if results.dirty else ""
    yield (
        f"**{machine['device']}**, torch {machine['torch']}, {results.date}, commit {results.commit[:10]}{changed}. "
        "Loss, gradient and statistics of one call, median; in brackets how many times as fast as `F.mse_loss`, which "
        "has neither statistics nor weights. Cached: the buffers in rotation fit in the last-level cache."
    )
    yield ""
    names = [name for name in PROVIDERS if any(m.provider == name for m in results.measurements)]
    yield f"| | {' | '.join(PROVIDERS[name].title for name in names)} |"
    yield f"| --- |{' --- |' * len(names)}"
    for title, key in _ROWS.items():
        found = [results.find(*key, name) for name in names]
        cells = [_cell(measurement) for measurement in found]
        cached = ", cached" if any(m is not None and m.cached for m in found) else ""
        if any(cells):
            yield f"| {title}{cached} | {' | '.join(cells)} |"
    yield ""
    judged = figures.judge(results)
    if figures_in is not None:
        reached, missed, open_ = ([figure.passed for figure in judged].count(passed) for passed in (True, False, None))
        yield (
            f"Of the [{len(judged)} figures]({figures_in}) that the design asks for or reports, {reached} are reached, "
            f"{missed} missed, {open_} without a bound or not measured."
        )
        return
    yield "| asked for by the design | bound | found | result |"
    yield "| --- | --- | --- | --- |"
    for figure in judged:
        verdict = {True: "reached", False: "**missed**", None: ""}[figure.passed]
        yield f"| {figure.title} | {figure.required} | {figure.found} | {verdict} |"


def _cell(measurement: Measurement | None) -> str:
    if measurement is None:
        return ""
    against = measurement.times_as_fast_as.get("mse_loss")
    return seconds(measurement.wall.median) + (f" ({against.value:.2f} ×)" if against else "")


def inserted(page: str, table: str) -> str:
    """A page with `table` between the markers.

    Raises:
        MarkersError: the markers are not present once each and in order.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in head + tail:
        raise MarkersError(f"the page must hold the lines {BEGIN!r} and {END!r}, once each and in this order")
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into README.md and docs/performance.md")
    parser.add_argument(
        "--add", type=Path, metavar="FILE", help="first copy a result file to the others, then as --write"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.add is not None:
        results = read(options.add)
        if results is None or results.quick:
            parser.error(f"{options.add} is {'of a --quick run' if results else 'not a result file of the benchmarks'}")
        shutil.copyfile(options.add, options.results / machine.file_name(results.machine["device"], results.date))
    found = newest_by_device(options.results)
    if options.write or options.add is not None:
        written = {page: inserted(page.read_text(), table) for page, table in tables(found).items()}
        for page, text in written.items():
            page.write_text(text)
    else:
        print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
