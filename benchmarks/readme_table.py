"""The speed tables in README and docs, made from the committed result files.

python benchmarks/readme_table.py            # print them
python benchmarks/readme_table.py --write    # put them between the markers in README.md and docs/performance.md
python benchmarks/readme_table.py --add FILE # the same, with a result file that was written elsewhere
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Iterator
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
# README's: what the loss costs alone, and what of it is left in a training step.
_EXCERPT_ROWS = ("latents 64 × 4 × 64 × 64, fp32", "training step of a small U-Net, batch 64")
_EXCERPT_COLUMNS = ("mse_loss", "hand_written", "native", "triton")
_NOTHING = "No speeds are committed yet: `make bench` measures them on a CPU, `benchmarks/gpu.sh` on a GPU."


class MarkersError(ValueError):
    """A page lacks the markers for the tables."""


def tables(found: list[Results]) -> dict[Path, str]:
    """The text between the markers of each page."""
    return {README: excerpt(found, "docs/performance.md"), PERFORMANCE: markdown(found)}


def excerpt(found: list[Results], rest_in: str) -> str:
    """Two rows per device, of every GPU and the CPU that was measured last.

    Args:
        rest_in: link to the page with all rows and the design's figures.
    """
    if not found:
        return _NOTHING
    gpus = [results for results in found if "compute_capability" in results.machine]
    cpus = sorted((results for results in found if results not in gpus), key=lambda results: results.date)
    return "\n\n".join("\n".join(_excerpt(results, rest_in)) for results in [*gpus, *cpus[-1:]])


def markdown(found: list[Results]) -> str:
    """Per device a table of times and a table of the design's figures."""
    return "\n\n".join("\n".join(_device(results)) for results in found) if found else _NOTHING


def _excerpt(results: Results, rest_in: str) -> Iterator[str]:
    yield from _heading(results)
    names = [name for name in _EXCERPT_COLUMNS if any(m.provider == name for m in results.measurements)]
    yield from _table(results, names, _EXCERPT_ROWS)
    yield ""
    verdicts = [figure.passed for figure in figures.judge(results)]
    reached, missed, open_ = (verdicts.count(passed) for passed in (True, False, None))
    yield (
        f"[All rows]({rest_in}): other shapes, torch.compile, the reference, and the {len(verdicts)} figures that the "
        f"design asks for, of which {reached} are reached, {missed} missed, {open_} without a bound or not measured."
    )


def _heading(results: Results) -> Iterator[str]:
    machine = results.machine
    changed = ", with changes" if results.dirty else ""
    yield (
        f"**{machine['device']}**, torch {machine['torch']}, {results.date}, commit {results.commit[:10]}{changed}. "
        "Loss, gradient and statistics of one call, median; in brackets how many times as fast as `F.mse_loss`, which "
        "has neither statistics nor weights. Cached: the buffers in rotation fit in the last-level cache."
    )
    yield ""


def _table(results: Results, names: list[str], titles: Iterable[str]) -> Iterator[str]:
    yield f"| | {' | '.join(PROVIDERS[name].title for name in names)} |"
    yield f"| --- |{' --- |' * len(names)}"
    for title in titles:
        found = [results.find(*_ROWS[title], name) for name in names]
        cells = [_cell(measurement) for measurement in found]
        cached = ", cached" if any(m is not None and m.cached for m in found) else ""
        if any(cells):
            yield f"| {title}{cached} | {' | '.join(cells)} |"


def _device(results: Results) -> Iterator[str]:
    yield from _heading(results)
    names = [name for name in PROVIDERS if any(m.provider == name for m in results.measurements)]
    yield from _table(results, names, _ROWS)
    yield ""
    yield "| asked for by the design | | found | |"
    yield "| --- | --- | --- | --- |"
    for figure in figures.judge(results):
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
