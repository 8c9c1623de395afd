"""`vadiff ablate`."""

import argparse
import signal
from pathlib import Path

NAME = "ablate"
HELP = "train a grid of configs over seeds, and compare them pair by pair"
DESCRIPTION = (
    "Train what a TOML file describes: arms (sets of fields of the config) times seeds. What is trained already is "
    "left alone, what broke off goes on. Then collect, for each arm against the baseline with the same seed, the mean "
    "difference and its 95 percent confidence interval: results.json, results.csv, results.txt and results.png; with "
    "--gap also the loss of each arm per noise level, held out and above the optimal one: gaps.csv, .txt and .png. "
    "Exit status 1 where a run failed; the others are collected."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("grid", type=Path, metavar="GRID.toml", help="the experiment")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=argparse.SUPPRESS,
        help="default: runs/NAME, or runs/NAME-N-steps with --steps N",
    )  # fmt: skip
    parser.add_argument("--data", metavar="PATH", default=argparse.SUPPRESS, help="where the data set is")
    parser.add_argument("--device", default=argparse.SUPPRESS, help="of all runs: auto, cpu, cuda, cuda:N")
    parser.add_argument("--jobs", type=int, metavar="N", default=1, help="runs at a time, side by side on the device")
    parser.add_argument("--seeds", type=int, metavar="N", default=argparse.SUPPRESS, help="the first N seeds only")
    parser.add_argument("--steps", type=int, metavar="N", default=argparse.SUPPRESS, help="of all runs, for a trial")
    parser.add_argument("--gap", action="store_true", help="measure each run's loss above the optimal one, too")
    parser.add_argument("--gap-images", type=int, metavar="N", default=1000, help="training images it is measured on")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--index", type=int, metavar="I", default=argparse.SUPPRESS,
        help="train run I only (0, 1, ... as --list has them), and what it depends on; for job arrays",
    )  # fmt: skip
    what.add_argument("--list", action="store_true", help="print the runs and how far they are, train nothing")
    what.add_argument("--collect", action="store_true", help="collect what is there, train nothing")


def run(options: argparse.Namespace) -> None:
    from ..ablation import collect, collect_gaps, read_grid, train_all, write_gaps, write_results

    if options.gap_images < 2:
        options.parser.error(f"argument --gap-images: {options.gap_images}, expected at least 2")
    if options.jobs < 1:
        options.parser.error(f"argument --jobs: {options.jobs}, expected at least 1")
    overrides = {name: getattr(options, name) for name in ("data", "device", "steps") if name in options}
    grid = read_grid(options.grid, overrides, seeds=getattr(options, "seeds", None))
    name = f"{grid.name}-{options.steps}-steps" if "steps" in options else grid.name  # a trial is another experiment
    out = options.out if "out" in options else Path("runs") / name
    if options.list:
        for index, planned in enumerate(grid.runs(out)):
            print(f"{index:4d}  {planned.steps_done():>7} of {planned.config.steps}  {planned.path}")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs leave checkpoints
    failed = [] if options.collect else train_all(grid, out, jobs=options.jobs, index=getattr(options, "index", None))
    if "index" not in options:
        results = collect(grid, out)
        write_results(results, out)
        print(results.as_text())
        print(f"Written to {out / 'results'}.json, .csv, .txt and .png")
        if options.gap:
            gaps = collect_gaps(grid, out, images=options.gap_images)
            write_gaps(gaps, out)
            print(f"\n{gaps.as_text()}\nWritten to {out / 'gaps'}.csv, .txt and .png")
    if failed:
        options.parser.exit(1, f"vadiff: {len(failed)} runs failed: {', '.join(str(path) for path in failed)}\n")
