"""`vadiff ema`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.fidelity import METRICS
from .drawing import add_seed_options, add_solver_options, seeds_of, solver_options_of, with_vae
from .evaluate import add_comparison_options, comparison_of

if TYPE_CHECKING:
    from ...sampling.generation import Generation
    from ..report.comparison import Comparison
    from ..training import Run

NAME = "ema"
HELP = "make averaged weights of any width from a finished run"
DESCRIPTION = (
    "Make power-function averages of a run's weights, of any relative width sigma_rel, from the snapshots of a run "
    "trained with --sigma-rel 0.05 0.1. Each is written to RUN/ema/step-<n>/sigma-rel-<width>.pt, for use as --weights "
    "ema-<width> in other commands. --sweep also measures the held-out loss of each width, of the run's own EMA and of "
    "its raw weights, and writes RUN/ema/step-<n>/sweep.png and sweep.json; with --metrics it also draws images with "
    "each from the same seeds, and compares them with real ones."
)
_SWEEP = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.10, 0.12, 0.15, 0.18, 0.21, 0.25)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="run directory that `vadiff train` wrote")
    parser.add_argument(
        "--sigma-rel", type=_widths, metavar="X,X,...", default=argparse.SUPPRESS,
        help="widths, above 0 and below 0.2887; default with --sweep: twelve from 0.02 to 0.25",
    )  # fmt: skip
    parser.add_argument("--step", type=int, metavar="N", default=None, help="step of a snapshot; default: the last")
    parser.add_argument("--sweep", action="store_true", help="measure the held-out loss of each width and plot it")
    parser.add_argument(
        "--metrics", nargs="*", choices=METRICS, default=[],
        help="with --sweep: also measure images; prc: precision and recall; isc: Inception score",
    )  # fmt: skip
    add_seed_options(parser, images=5000)
    add_comparison_options(parser)
    parser.add_argument("--device", default="auto", help="where to measure: auto (a GPU if there is one), cpu, cuda:N")
    add_solver_options(parser)


def run(options: argparse.Namespace) -> None:
    from ...sampling.generation import with_options
    from ..training import TrainConfig, open_run
    from ..training.post_hoc import write_averages

    if "sigma_rel" not in options and not options.sweep:
        options.parser.error("argument --sigma-rel: required without --sweep")
    if options.metrics and not options.sweep:
        options.parser.error("argument --metrics: is for --sweep, which is not given")
    seeds, comparison = seeds_of(options), comparison_of(options)
    try:
        device = TrainConfig(device=options.device).torch_device()
    except ValueError as error:
        options.parser.error(f"argument --device: {error}")
    run = with_vae(open_run(options.run_directory), options)
    generation = with_options(solver_options_of(options, run), devices=(device,))
    try:
        files = write_averages(run, getattr(options, "sigma_rel", _SWEEP), options.step)
    except ValueError as error:
        options.parser.error(f"argument --sigma-rel: {error}")
    for width, file in files.items():
        print(f"ema-{width:g}: {file}")
    if options.sweep:
        try:
            _sweep(run, files, generation, seeds, comparison)
        except ValueError as error:
            options.parser.error(str(error))


def _sweep(
    run: "Run", files: dict[float, Path], generation: "Generation", seeds: Sequence[int], comparison: "Comparison"
) -> None:
    from ...extras import import_extra
    from ...sampling.seeds import recorded_seeds
    from ..report.ema_sweep import prepared_sweep, sweep_figure, sweep_metrics, sweep_scores
    from ..training.post_hoc import held_out_of_averages

    import_extra("matplotlib", "report")  # fail before minutes of measuring, as `prepared_sweep` does
    ready = prepared_sweep(run, len(seeds), comparison) if comparison.metrics else None
    folder = next(iter(files.values())).parent
    step = int(folder.name.removeprefix("step-"))
    losses, others = held_out_of_averages(run, list(files), step, generation.devices[0])
    scores = {f"ema-{width:g}": score for width, score in sorted(sweep_scores(losses).items())} | sweep_scores(others)
    print("\nx0 loss on held-out images, geometric mean over noise levels:")
    for name, score in scores.items():
        print(f"  {name:>9} {score:.5f}{'  lowest' if score == min(scores.values()) else ''}")
    content: dict[str, Any] = {
        "log_snr": next(iter(losses.values())).log_snr.tolist(),
        "held_out": {f"ema-{width:g}": losses[width].mean.tolist() for width in sorted(losses)}
        | {name: loss.mean.tolist() for name, loss in others.items()},
    }
    metrics = {}
    if ready is not None:
        metrics = sweep_metrics(run, [*sorted(losses), *others], step, seeds, *ready, generation)
        content["metrics"] = {name if isinstance(name, str) else f"ema-{name:g}": v for name, v in metrics.items()}
        content |= recorded_seeds(seeds)
        content["generation"] = {name: value for name, value in generation.recorded().items() if name != "weights"}
    (folder / "sweep.json").write_text(json.dumps(content) + "\n")
    sweep_figure(losses, others, run.config.sigma_rel, metrics).savefig(folder / "sweep.png")
    print(f"Written to {folder / 'sweep'}.json and .png")


def _widths(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers with commas between them") from None
