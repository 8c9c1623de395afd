"""`vadiff ema`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.fidelity import METRICS
from .command import command
from .drawing import seed_options, seeds_of, solver_options, solver_options_of, with_vae
from .evaluate import comparison_of, comparison_options
from .parameters import NUMBER, TEXT, WHOLE_NUMBER, Choice, Listed, Options, argument, flag, group, option, usage_error

if TYPE_CHECKING:
    from ...sampling.generation import Generation
    from ..report.comparison import Comparison
    from ..training import Run

NAME = "ema"
HELP = "make averaged weights of any width from a finished run"
DESCRIPTION = (
    "Make power-function averages of a run's weights, of any relative width sigma_rel, from the snapshots of a run "
    "trained with --sigma-rel 0.05,0.1. Each is written to RUN/ema/step-<n>/sigma-rel-<width>.pt, for use as --weights "
    "ema-<width> in other commands. --sweep also measures the held-out loss of each width, of the run's own EMA and of "
    "its raw weights, and writes RUN/ema/step-<n>/sweep.png and sweep.json; with --metrics it also draws images with "
    "each from the same seeds, and compares them with real ones."
)
EXAMPLES = (
    "vadiff ema runs/edm2 --sigma-rel 0.05,0.1,0.15",
    "vadiff ema runs/edm2 --sweep                              # which width has the lowest held-out loss",
    "vadiff ema runs/edm2 --sweep --metrics fid --images 5000  # and which draws the best images",
)
_SWEEP = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.10, 0.12, 0.15, 0.18, 0.21, 0.25)


@command(NAME, HELP, DESCRIPTION, EXAMPLES)
@argument("run_directory", "RUN", "run directory that `vadiff train` wrote")
@group(
    "Averages",
    option(
        "--sigma-rel", Listed(NUMBER), "X",
        "widths, above 0 and below 0.2887; default with --sweep: twelve from 0.02 to 0.25",
    ),
    option("--step", WHOLE_NUMBER, "N", "step of a snapshot; default: the last"),
    flag("--sweep", "measure the held-out loss of each width and plot it"),
    option(
        "--metrics", Listed(Choice(METRICS)), None,
        "with --sweep: also measure images; prc: precision and recall; isc: Inception score", default=(),
    ),
    option("--device", TEXT, "DEVICE", "where to measure: auto (a GPU if there is one), cpu, cuda:N", default="auto"),
)  # fmt: skip
@seed_options(images=5000)
@comparison_options()
@solver_options()
def run(options: Options) -> None:
    from ...sampling.generation import with_options
    from ..next_steps import next_steps
    from ..report.ema_sweep import check_sweep
    from ..training import TrainConfig, open_run
    from ..training.post_hoc import write_averages

    if not options.sigma_rel and not options.sweep:
        usage_error("argument --sigma-rel: required without --sweep")
    if options.metrics and not options.sweep:
        usage_error("argument --metrics: is for --sweep, which is not given")
    seeds, comparison = seeds_of(options), comparison_of(options)
    try:
        device = TrainConfig(device=options.device).torch_device()
    except ValueError as error:
        usage_error(f"argument --device: {error}")
    run = with_vae(open_run(options.run_directory), options)
    generation = with_options(solver_options_of(options, run), devices=(device,))
    check_sweep(run.path / "ema", sweep=options.sweep)
    try:
        files = write_averages(run, options.sigma_rel or _SWEEP, options.step)
    except ValueError as error:
        usage_error(f"argument --sigma-rel: {error}")
    for width, file in files.items():
        print(f"ema-{width:g}: {file}")
    if options.sweep:
        try:
            _sweep(run, files, generation, seeds, comparison)
        except ValueError as error:
            usage_error(str(error))
    else:
        print(next_steps(*(("sample", run.path, "--weights", f"ema-{width:g}") for width in files)))


def _sweep(
    run: "Run", files: dict[float, Path], generation: "Generation", seeds: Sequence[int], comparison: "Comparison"
) -> None:
    from ...sampling.seeds import recorded_seeds
    from ..next_steps import next_steps
    from ..report.ema_sweep import (
        lowest_of,
        prepared_sweep,
        scores_table,
        sweep_figure,
        sweep_metrics,
        sweep_scores,
        sweep_written,
    )
    from ..training.post_hoc import held_out_of_averages

    ready = prepared_sweep(run, len(seeds), comparison) if comparison.metrics else None
    folder = next(iter(files.values())).parent
    step = int(folder.name.removeprefix("step-"))
    losses, others = held_out_of_averages(run, list(files), step, generation.devices[0])
    scores, other_scores = sweep_scores(losses), sweep_scores(others)
    print(f"\n{scores_table(scores, other_scores)}")
    content: dict[str, Any] = {
        "log_snr": next(iter(losses.values())).log_snr.tolist(),
        "held_out": {f"ema-{width:g}": losses[width].mean.tolist() for width in sorted(losses)}
        | {name: loss.mean.tolist() for name, loss in others.items()},
    }
    metrics: dict[float | str, dict[str, float]] = {}
    if ready is not None:
        content |= recorded_seeds(seeds)
        content["generation"] = {name: value for name, value in generation.recorded().items() if name != "weights"}
    with sweep_written(folder, content, lambda: sweep_figure(losses, others, run.config.sigma_rel, metrics)) as write:
        if ready is not None:
            for each, found in sweep_metrics(run, [*sorted(losses), *others], step, seeds, *ready, generation):
                metrics[each] = found
                write(metrics)
    print(f"Written to {folder / 'sweep'}.json and .png")
    print(next_steps(("sample", run.path, "--weights", lowest_of(scores, other_scores))))
