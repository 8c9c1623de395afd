"""`vadiff ablate`."""

import argparse
from pathlib import Path

NAME = "ablate"
HELP = "train a grid of configs over seeds, and compare them paired by seed"
DESCRIPTION = (
    "Train what a TOML file describes: arms (sets of fields of the config) times seeds, for one or more objectives. "
    "Finished runs are kept, interrupted ones resumed. With --evaluate each job also draws images of its run, from the "
    "same seeds for every run, and compares them with real ones, as [evaluate] in the file says (default: Fréchet "
    "distance and KID of 5,000 images). Then collect, for each arm against the baseline with the same objective and "
    "seed, the mean log ratio of held-out loss and of Fréchet distance with 95 percent confidence intervals, p-values "
    "corrected for the number of arms, and what may be claimed (nothing from fewer than five seeds): results.json, "
    "results.csv, results.txt and results.png; with --gap also each arm's held-out loss and gap to the optimal loss "
    "per noise level: gaps.csv, .txt and .png. Exit status 1 if a run failed; the others are collected."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("grid", type=Path, metavar="GRID.toml", help="the experiment")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=argparse.SUPPRESS,
        help="default: runs/NAME, or runs/NAME-N-steps with --steps N",
    )  # fmt: skip
    parser.add_argument("--data", metavar="PATH", default=argparse.SUPPRESS, help="path of the data set")
    parser.add_argument("--device", default=argparse.SUPPRESS, help="device of all runs: auto, cpu, cuda, cuda:N")
    parser.add_argument("--jobs", type=int, metavar="N", default=1, help="number of runs in parallel on the device")
    parser.add_argument("--seeds", type=int, metavar="N", default=argparse.SUPPRESS, help="the first N seeds only")
    parser.add_argument(
        "--steps", type=int, metavar="N", default=argparse.SUPPRESS, help="steps of all runs, for a trial"
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="also compare images of each run with real ones, unless already done"
    )
    parser.add_argument(
        "--inception-weights", type=Path, metavar="PATH", default=None,
        help="for --evaluate: torch-fidelity's weights file, for machines without internet",
    )  # fmt: skip
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", default=None, help="for --evaluate: cache of the real images' features"
    )
    parser.add_argument("--gap", action="store_true", help="also measure each run's gap to the optimal loss")
    parser.add_argument("--gap-images", type=int, metavar="N", default=1000, help="training images per run for --gap")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--index", type=int, metavar="I", default=argparse.SUPPRESS,
        help="train only run I (0, 1, ... as in --list) and the run it needs; for job arrays",
    )  # fmt: skip
    what.add_argument("--list", action="store_true", help="print the runs and their progress, train nothing")
    what.add_argument("--collect", action="store_true", help="collect the finished runs, train nothing")


def run(options: argparse.Namespace) -> None:
    from ..ablation import collect, collect_gaps, read_grid, results_table, train_all, write_gaps, write_results
    from ..ablation.output import check_outputs, next_steps_of
    from ..ablation.runner import GOING_ON, failures
    from ..training.stopping import stoppable

    if options.gap_images < 2:
        options.parser.error(f"argument --gap-images: {options.gap_images}, expected at least 2")
    if options.jobs < 1:
        options.parser.error(f"argument --jobs: {options.jobs}, expected at least 1")
    overrides = {name: getattr(options, name) for name in ("data", "device", "steps") if name in options}
    for name in ("inception_weights", "cache"):
        if getattr(options, name) is not None and not options.evaluate:
            options.parser.error(f"argument --{name.replace('_', '-')}: is for --evaluate, which is not given")
    if options.evaluate and (options.list or options.collect):
        options.parser.error("argument --evaluate: --list and --collect measure nothing")
    if options.inception_weights is not None and not options.inception_weights.is_file():
        options.parser.error(f"argument --inception-weights: {options.inception_weights} is not a file")
    grid = read_grid(options.grid, overrides, seeds=getattr(options, "seeds", None))
    name = f"{grid.name}-{options.steps}-steps" if "steps" in options else grid.name  # keeps trials apart
    out = options.out if "out" in options else Path("runs") / name
    if options.list:
        for index, planned in enumerate(grid.runs(out)):
            print(f"{index:4d}  {planned.steps_done():>7} of {planned.config.steps}  {planned.path}")
        return
    check_outputs(out)
    failed = []
    if not options.collect:
        with stoppable(GOING_ON):
            failed = train_all(
                grid,
                out,
                jobs=options.jobs,
                index=getattr(options, "index", None),
                evaluate=options.evaluate,
                inception_weights=options.inception_weights,
                cache=options.cache,
            )
    if "index" not in options:
        results = collect(grid, out)
        write_results(results, out)
        print(results_table(results))
        print(f"Written to {out / 'results'}.json, .csv, .txt and .png\n{next_steps_of(grid, out)}")
        if options.gap:
            gaps = collect_gaps(grid, out, images=options.gap_images)
            write_gaps(gaps, out)
            print(f"\n{gaps.as_text()}\nWritten to {out / 'gaps'}.csv, .txt and .png")
    if failed:
        options.parser.exit(1, f"vadiff: {failures(failed)}\n")
