"""`vadiff ema`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..training import Run

NAME = "ema"
HELP = "make averaged weights of any width from a finished run"
DESCRIPTION = (
    "Make power-function averages of a run's weights, of any relative width sigma_rel, from the snapshots of a run "
    "trained with --sigma-rel 0.05 0.1. Each is written to RUN/ema/step-<n>/sigma-rel-<width>.pt, and its name as "
    "weights is ema-<width>. With --sweep the held-out loss of each is measured too, beside the run's own average and "
    "its trained weights, and RUN/ema/step-<n>/sweep.png and sweep.json are written."
)
_SWEEP = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.10, 0.12, 0.15, 0.18, 0.21, 0.25)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="run directory that `vadiff train` wrote")
    parser.add_argument(
        "--sigma-rel", type=_widths, metavar="X,X,...", default=argparse.SUPPRESS,
        help="widths, above 0 and below 0.2887; with --sweep a dozen from 0.02 to 0.25 unless given",
    )  # fmt: skip
    parser.add_argument("--step", type=int, metavar="N", default=None, help="of a snapshot; the last unless given")
    parser.add_argument("--sweep", action="store_true", help="measure each width, and draw the curve")
    parser.add_argument("--device", default="auto", help="where to measure: auto (a GPU if there is one), cpu, cuda:N")


def run(options: argparse.Namespace) -> None:
    from ..training import TrainConfig, open_run
    from ..training.post_hoc import write_averages

    if "sigma_rel" not in options and not options.sweep:
        options.parser.error("argument --sigma-rel: required without --sweep")
    try:
        device = TrainConfig(device=options.device).torch_device()
    except ValueError as error:
        options.parser.error(f"argument --device: {error}")
    run = open_run(options.run_directory)
    try:
        files = write_averages(run, getattr(options, "sigma_rel", _SWEEP), options.step)
    except ValueError as error:
        options.parser.error(f"argument --sigma-rel: {error}")
    for width, file in files.items():
        print(f"ema-{width:g}: {file}")
    if options.sweep:
        _sweep(run, files, device)


def _sweep(run: "Run", files: dict[float, Path], device: "torch.device") -> None:
    from ..report.ema_sweep import sweep_figure, sweep_scores
    from ..training.post_hoc import held_out_of_averages

    folder = next(iter(files.values())).parent
    losses, others = held_out_of_averages(run, list(files), int(folder.name.removeprefix("step-")), device)
    scores, other_scores = sweep_scores(losses), sweep_scores(others)
    best = min(scores, key=lambda width: scores[width])
    print("\nEDM's loss on held-out images, geometric mean over noise levels:")
    for width in sorted(scores):
        print(f"  {f'ema-{width:g}':>9} {scores[width]:.4f}{'  lowest' if width == best else ''}")
    for name, score in other_scores.items():
        print(f"  {name:>9} {score:.4f}")
    content = {
        "log_snr": losses[best].log_snr.tolist(),
        "held_out": {f"ema-{width:g}": losses[width].mean.tolist() for width in sorted(losses)}
        | {name: loss.mean.tolist() for name, loss in others.items()},
    }
    (folder / "sweep.json").write_text(json.dumps(content) + "\n")
    sweep_figure(losses, others, run.config.sigma_rel).savefig(folder / "sweep.png")
    print(f"Written to {folder / 'sweep'}.json and .png")


def _widths(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers with commas between them") from None
