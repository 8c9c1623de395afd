"""`vadiff ablate`."""

import sys
from pathlib import Path

from .command import command
from .parameters import (
    PATH,
    TEXT,
    WHOLE_NUMBER,
    Options,
    argument,
    flag,
    group,
    not_together,
    option,
    usage_error,
)

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
EXAMPLES = (
    "vadiff ablate grid.toml --list                     # the runs and their progress",
    "vadiff ablate grid.toml --steps 50 --seeds 2       # a trial, in a folder of its own",
    "vadiff ablate grid.toml --evaluate --jobs 2",
)


@command(NAME, HELP, DESCRIPTION, EXAMPLES)
@argument("grid", "GRID.toml", "the experiment")
@group(
    "Runs",
    option("--out", PATH, "DIR", "default: runs/NAME, or runs/NAME-N-steps with --steps N"),
    option("--data", TEXT, "PATH", "path of the data set"),
    option("--device", TEXT, "DEVICE", "device of all runs: auto, cpu, cuda, cuda:N"),
    option("--jobs", WHOLE_NUMBER, "N", "number of runs in parallel on the device", default=1),
    option("--seeds", WHOLE_NUMBER, "N", "the first N seeds only"),
    option("--steps", WHOLE_NUMBER, "N", "steps of all runs, for a trial"),
)
@group(
    "Instead of training all",
    option(
        "--index", WHOLE_NUMBER, "I",
        "train only run I (0, 1, ... as in --list) and the run it needs; for job arrays",
    ),
    flag("--list", "print the runs and their progress, train nothing"),
    flag("--collect", "collect the finished runs, train nothing"),
)  # fmt: skip
@group(
    "Images and gaps",
    flag("--evaluate", "also compare images of each run with real ones, unless already done"),
    option(
        "--inception-weights", PATH, "PATH",
        "for --evaluate: torch-fidelity's weights file, for machines without internet",
    ),
    option("--cache", PATH, "DIR", "for --evaluate: cache of the real images' features"),
    flag("--gap", "also measure each run's gap to the optimal loss"),
    option("--gap-images", WHOLE_NUMBER, "N", "training images per run for --gap", default=1000),
)  # fmt: skip
@not_together("index", "list", "collect")
def run(options: Options) -> None:
    from ..ablation import collect, collect_gaps, read_grid, results_table, train_all, write_gaps, write_results
    from ..ablation.output import check_outputs, next_steps_of
    from ..ablation.runner import GOING_ON, failures
    from ..training.stopping import stoppable

    if options.gap_images < 2:
        usage_error(f"argument --gap-images: {options.gap_images}, expected at least 2")
    if options.jobs < 1:
        usage_error(f"argument --jobs: {options.jobs}, expected at least 1")
    given = {name: getattr(options, name) for name in ("data", "device", "steps")}
    overrides = {name: value for name, value in given.items() if value is not None}
    for name in ("inception_weights", "cache"):
        if getattr(options, name) is not None and not options.evaluate:
            usage_error(f"argument --{name.replace('_', '-')}: is for --evaluate, which is not given")
    if options.evaluate and (options.list or options.collect):
        usage_error("argument --evaluate: --list and --collect measure nothing")
    if options.inception_weights is not None and not options.inception_weights.is_file():
        usage_error(f"argument --inception-weights: {options.inception_weights} is not a file")
    grid = read_grid(options.grid, overrides, seeds=options.seeds)
    name = f"{grid.name}-{options.steps}-steps" if options.steps is not None else grid.name  # keeps trials apart
    out = options.out if options.out is not None else Path("runs") / name
    if options.list:
        for index, planned in enumerate(grid.runs(out)):
            print(f"{index:4d}  {planned.steps_done():>7} of {planned.config.steps}  {planned.path}")
        return
    check_outputs(grid, out)
    failed = []
    if not options.collect:
        with stoppable(GOING_ON):
            failed = train_all(
                grid,
                out,
                jobs=options.jobs,
                index=options.index,
                evaluate=options.evaluate,
                inception_weights=options.inception_weights,
                cache=options.cache,
            )
    if options.index is None:
        results = collect(grid, out)
        write_results(results, out)
        print(results_table(results))
        print(f"Written to {out / 'results'}.json, .csv, .txt and .png\n{next_steps_of(grid, out)}")
        if options.gap:
            gaps = collect_gaps(grid, out, images=options.gap_images)
            write_gaps(gaps, out)
            print(f"\n{gaps.as_text()}\nWritten to {out / 'gaps'}.csv, .txt and .png")
    if failed:
        print(f"vadiff: {failures(failed)}", file=sys.stderr)
        raise SystemExit(1)
