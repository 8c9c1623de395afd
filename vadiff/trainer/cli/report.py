"""`vadiff report`."""

from pathlib import Path

from .command import command
from .parameters import PATH, TEXT, Options, argument, flag, option, usage_error

NAME = "report"
HELP = "one HTML page about one run, or comparing several"
DESCRIPTION = (
    "Write one self-contained HTML page with charts of the loss, its spread and the weights per noise level, of the "
    "held-out loss, of metrics and of samples over training: values at the pointer, zoom, and arms to hide. The page "
    "loads nothing. Runs that differ only in their seed are shown as one, with their spread; all are compared with the "
    "first, runs of different length at equal numbers of training images. With --from-log the page is "
    "about a training with any other loop, from the file that criterion.log_to(vadiff.MetricsFile(FILE), step) wrote."
)
EXAMPLES = (
    "vadiff report runs/digits                                      # runs/digits/report.html",
    "vadiff report runs/constant runs/digits --out compared.html    # compared with runs/constant",
    "vadiff report --from-log metrics.jsonl                         # of a training with your own loop",
)


@command(NAME, HELP, DESCRIPTION, EXAMPLES)
@argument("run_directories", "[RUN]...", "run directories of `vadiff train`", required=False, several=True)
@option("--from-log", PATH, "FILE", "a log that vadiff.MetricsFile wrote, in place of runs")
@option(
    "--out", PATH, "FILE",
    "page to write; default: RUN/report.html, for several runs report.html, for a log FILE with the ending .html",
)  # fmt: skip
@flag(
    "--overwrite", "replace the file in --out even if it is no report of vadiff's; an older report always is replaced"
)
@option("--title", TEXT, "TEXT", "title of the page")
def run(options: Options) -> None:
    from ...extras import import_extra
    from ...files import check_writable
    from ..report import group_runs, write_log_report, write_report
    from ..report.runs import read_histories

    for module in ("jinja2", "plotly"):
        import_extra(module, "report")
    paths = list({path.resolve(): path for path in options.run_directories}.values())
    log = options.from_log
    if (log is None) == (not paths):
        usage_error("expected run directories, or --from-log FILE, and not both")
    if log is not None:
        default = log.with_suffix(".html")
    else:
        default = paths[0] / "report.html" if len(paths) == 1 else Path("report.html")
    page = options.out or default
    if page.suffix != ".html":
        usage_error(f"argument --out: {page}, expected a file ending in .html")
    check_writable(page, folder=False)
    _check_page(options, page)
    if log is not None:
        charts = write_log_report(log, page, title=options.title)
    else:
        groups = group_runs(read_histories(paths))
        charts = write_report(groups, page, title=options.title)
    print(f"{page}   ({charts} charts)")


def _check_page(options: Options, page: Path) -> None:
    """The page does not take the log's place, and replaces nothing but a report, unless told to."""
    log = options.from_log
    if log is not None and log.resolve() == page.resolve():
        usage_error(f"argument --out: {page} would replace the log, expected another")
    if page.is_dir():
        usage_error(f"argument --out: {page} is a folder, expected a file")
    if page.exists() and not options.overwrite and b"Made by vadiff" not in page.read_bytes():
        usage_error(f"argument --out: {page} exists and is no report: replace it with --overwrite, or name another")
