"""`vadiff report`."""

from pathlib import Path

from .command import command
from .parameters import PATH, TEXT, Options, argument, flag, option, usage_error

NAME = "report"
HELP = "one HTML page about one run, or comparing several"
DESCRIPTION = (
    "Write one self-contained HTML page with charts of the loss, its spread and the weights per noise level, of the "
    "held-out loss, of metrics and of samples over training, and the same charts as PNG and SVG. Runs that differ only "
    "in their seed are shown as one, with their spread; all are compared with the first. With --from-log the page is "
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
    "page to write; its charts go to a folder of the same name beside it; default: RUN/report.html, for several runs "
    "report.html, for a log FILE with the ending .html",
)  # fmt: skip
@flag(
    "--overwrite", "replace the file in --out even if it is no report of vadiff's; an older report always is replaced"
)
@option("--title", TEXT, "TEXT", "title of the page")
def run(options: Options) -> None:
    from ...extras import import_extra
    from ..report import group_runs, read_history, write_log_report, write_report
    from ..training import open_run

    for module in ("jinja2", "matplotlib"):
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
    _check_page(options, page)
    if log is not None:
        files = write_log_report(log, page, title=options.title)
    else:
        groups = group_runs([read_history(open_run(path)) for path in paths])
        files = write_report(groups, page, title=options.title)
    print(f"{page}   ({len(files)} files with the same charts in {page.with_suffix('')})")


def _check_page(options: Options, page: Path) -> None:
    """Neither page nor charts take the log's place, and the page replaces nothing but a report, unless told to."""
    log = options.from_log
    if log is not None and log.resolve() in (page.resolve(), page.with_suffix("").resolve()):
        usage_error(f"argument --out: {page} or its folder of charts would replace the log, expected another")
    if page.is_dir():
        usage_error(f"argument --out: {page} is a folder, expected a file")
    if page.exists() and not options.overwrite and b"Made by vadiff" not in page.read_bytes():
        usage_error(f"argument --out: {page} exists and is no report: replace it with --overwrite, or name another")
