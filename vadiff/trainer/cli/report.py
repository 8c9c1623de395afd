"""`vadiff report`."""

import argparse
from pathlib import Path

NAME = "report"
HELP = "one HTML page about one run, or comparing several"
DESCRIPTION = (
    "Write one self-contained HTML page with charts of the loss, its spread and the weights per noise level, of the "
    "held-out loss, of metrics and of samples over training, and the same charts as PNG and SVG. Runs that differ only "
    "in their seed are shown as one, with their spread; all are compared with the first."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_directories", type=Path, nargs="+", metavar="RUN", help="run directories of `vadiff train`"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", default=None,
        help="page to write; its charts go to a folder of the same name beside it; default: RUN/report.html, for "
        "several runs report.html",
    )  # fmt: skip
    parser.add_argument("--title", default=None, help="title of the page")


def run(options: argparse.Namespace) -> None:
    from ...extras import import_extra
    from ..report import group_runs, read_history, write_report
    from ..training import open_run

    for module in ("jinja2", "matplotlib"):
        import_extra(module, "report")
    paths = list({path.resolve(): path for path in options.run_directories}.values())
    page = options.out or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    if page.suffix != ".html":
        options.parser.error(f"argument --out: {page}, expected a file ending in .html")
    groups = group_runs([read_history(open_run(path)) for path in paths])
    files = write_report(groups, page, title=options.title)
    print(f"{page}   ({len(files)} files with the same charts in {page.with_suffix('')})")
