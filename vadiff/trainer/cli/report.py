"""`vadiff report`."""

import argparse
from pathlib import Path

NAME = "report"
HELP = "one HTML page about one run, or comparing several"
DESCRIPTION = (
    "Write one self-contained HTML page with charts of the loss, its spread and the weights per noise level, of the "
    "held-out loss, of metrics and of samples over training: values at the pointer, zoom, and arms to hide. The page "
    "loads nothing. Runs that differ only in their seed are shown as one, with their spread; all are compared with the "
    "first, runs of different length at equal numbers of training images. With --from-log the page is "
    "about a training with any other loop, from the file that criterion.log_to(vadiff.MetricsFile(FILE), step) wrote."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_directories", type=Path, nargs="*", metavar="RUN", help="run directories of `vadiff train`"
    )
    parser.add_argument(
        "--from-log",
        type=Path,
        metavar="FILE",
        default=None,
        help="a log that vadiff.MetricsFile wrote, in place of runs",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", default=None,
        help="page to write; default: RUN/report.html, for several runs report.html, for a log FILE with the ending "
        ".html",
    )  # fmt: skip
    parser.add_argument("--title", default=None, help="title of the page")


def run(options: argparse.Namespace) -> None:
    from ...extras import import_extra
    from ..report import group_runs, read_history, write_log_report, write_report
    from ..training import open_run

    for module in ("jinja2", "plotly"):
        import_extra(module, "report")
    paths = list({path.resolve(): path for path in options.run_directories}.values())
    log = options.from_log
    if (log is None) == (not paths):
        options.parser.error("expected run directories, or --from-log FILE, and not both")
    if log is not None:
        default = log.with_suffix(".html")
    else:
        default = paths[0] / "report.html" if len(paths) == 1 else Path("report.html")
    page = options.out or default
    if page.suffix != ".html":
        options.parser.error(f"argument --out: {page}, expected a file ending in .html")
    if log is not None:
        _check_page_of_log(options, log, page)
        charts = write_log_report(log, page, title=options.title)
    else:
        groups = group_runs([read_history(open_run(path)) for path in paths])
        charts = write_report(groups, page, title=options.title)
    print(f"{page}   ({charts} charts)")


def _check_page_of_log(options: argparse.Namespace, log: Path, page: Path) -> None:
    """The page does not take the log's place, and replaces no page of others unless it is named."""
    if log.resolve() == page.resolve():
        options.parser.error(f"argument --out: {page} would replace the log, expected another")
    if options.out is None and page.exists() and b"Made by vadiff" not in page.read_bytes():
        options.parser.error(f"argument --out: {page} exists and is no report; give --out to choose the page")
