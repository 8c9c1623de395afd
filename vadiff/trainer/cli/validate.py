"""`vadiff validate`."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .drawing import weights_name

if TYPE_CHECKING:
    from ..training import HeldOutLoss, Run, TrainConfig

NAME = "validate"
HELP = "loss on held-out images at fixed noise levels, with standard errors, against a reference"
DESCRIPTION = (
    "Measure EDM's loss of a run on held-out images, at the noise levels and with the noise of its own held-out loss, "
    "and print a table: loss, standard error and, with --reference, the ratio per noise level and the mean over levels "
    "of ln(loss / reference). Another run as reference is measured on the same images with the same noise, so that the "
    "errors of the ratios are those of the paired difference."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", type=Path, metavar="RUN", help="run directory that `vadiff train` wrote")
    parser.add_argument(
        "--weights", type=weights_name, metavar="NAME", default="ema",
        help="ema: averaged; raw: as trained; ema-WIDTH: the average that `vadiff ema --sigma-rel WIDTH` made",
    )  # fmt: skip
    parser.add_argument(
        "--step", type=int, metavar="N", default=None, help="step of the checkpoint; default: the latest"
    )
    parser.add_argument("--levels", type=int, metavar="N", default=None, help="noise levels; default: as in training")
    parser.add_argument(
        "--images", type=int, metavar="N", default=None, help="maximum of held-out images; default: as in training"
    )
    parser.add_argument(
        "--reference", type=Path, metavar="RUN|FILE", default=None,
        help="run to compare with (its latest checkpoint, the same --weights), or a file of --csv",
    )  # fmt: skip
    parser.add_argument("--csv", type=Path, metavar="FILE", default=None, help="also write the levels as CSV")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", default=None, help="also draw loss over log-SNR: .png, .svg"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--device", default="auto", help="where to measure: auto (a GPU if there is one), cpu, cuda:N")


def run(options: argparse.Namespace) -> None:
    from ...extras import import_extra
    from ...validation import LevelLosses
    from ..training import TrainConfig, open_run

    if options.plot is not None:
        import_extra("matplotlib", "report")  # fail before measuring
    opened = open_run(options.run_directory)
    try:
        options.torch_device = TrainConfig(device=options.device).torch_device()
    except ValueError as error:
        options.parser.error(f"argument --device: {error}")
    measured = _measured(opened, opened.config, options, options.step)
    result = measured.by_level
    if options.reference is not None:
        try:
            if options.reference.is_dir():
                other = _measured(open_run(options.reference), opened.config, options)
                reference = other.with_sigma_data(measured.sigma_data).by_level
            else:
                reference = LevelLosses.load(options.reference)
            result = result.compared_with(reference)
        except (OSError, ValueError) as error:
            options.parser.error(f"argument --reference: {error}")
    if options.json:
        content = {"levels": result.as_rows(), "x0_loss": measured.level_mean}
        if result.reference is not None:
            content["mean_log_ratio"] = result.mean_log_ratio()
        print(json.dumps(content))
    else:
        print(f"EDM's {result}\ngeometric mean over levels of the x0 loss: {measured.level_mean:.5g}")
    if options.csv is not None:
        result.save(options.csv)
    if options.plot is not None:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        result.plot().figure.savefig(options.plot)


def _measured(
    opened: "Run", config: "TrainConfig", options: argparse.Namespace, step: int | None = None
) -> "HeldOutLoss":
    """The held-out loss of a run's weights, measured as `config` and the options say."""
    from ..training.held_out import held_out_loss_of_run

    if options.images is not None and options.images < 1:
        options.parser.error(f"argument --images: {options.images}, expected at least 1")
    try:
        if options.levels is not None:
            config = dataclasses.replace(config, held_out_levels=options.levels)
    except ValueError as error:
        options.parser.error(f"argument --levels: {error}")
    return held_out_loss_of_run(
        config,
        opened.images(),
        opened.denoiser(options.weights, step, options.torch_device),
        limit=options.images,
        progress=not options.json,
    )
