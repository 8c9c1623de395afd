"""`vadiff validate`."""

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from ...files import check_writable, problem, replacing
from .command import command
from .drawing import WEIGHTS
from .parameters import PATH, TEXT, WHOLE_NUMBER, Options, argument, flag, group, option, usage_error

if TYPE_CHECKING:
    from torch import Tensor

    from ...models import Denoiser
    from ...validation import LevelLosses
    from ..training import HeldOutLoss, Run, TrainConfig

NAME = "validate"
HELP = "loss on held-out images at fixed noise levels, with standard errors, against a reference"
DESCRIPTION = (
    "Measure EDM's loss of a run on held-out images, at the noise levels and with the noise of its own held-out loss, "
    "and print a table: loss, standard error and, with --reference, the ratio per noise level and the mean over levels "
    "of ln(loss / reference). Another run as reference is measured on the same images with the same noise, so that the "
    "errors of the ratios are those of the paired difference; it must hold out the same images."
)
EXAMPLES = (
    "vadiff validate runs/digits",
    "vadiff validate runs/digits --reference runs/constant --plot compared.png",
)
PICTURES = (".png", ".svg", ".pdf")


@command(NAME, HELP, DESCRIPTION, EXAMPLES)
@argument("run_directory", "RUN", "run directory that `vadiff train` wrote")
@group(
    "What is measured",
    option(
        "--weights", WEIGHTS, "NAME",
        "ema: averaged; raw: as trained; ema-WIDTH: the average that `vadiff ema --sigma-rel WIDTH` made",
        default="ema",
    ),
    option("--step", WHOLE_NUMBER, "N", "step of the checkpoint; default: the latest"),
    option("--levels", WHOLE_NUMBER, "N", "noise levels; default: as in training"),
    option("--images", WHOLE_NUMBER, "N", "maximum of held-out images; default: as in training"),
    option(
        "--reference", PATH, "RUN|FILE",
        "run to compare with (its latest checkpoint, the same --weights), or a file of --csv",
    ),
    option("--device", TEXT, "DEVICE", "where to measure: auto (a GPU if there is one), cpu, cuda:N", default="auto"),
)  # fmt: skip
@group(
    "Results",
    option("--csv", PATH, "FILE", "also write the levels as CSV, over an earlier one"),
    option("--plot", PATH, "FILE", "also draw loss over log-SNR: .png, .svg or .pdf"),
    flag("--json", "print JSON in place of the table"),
)
def run(options: Options) -> None:
    from ...extras import import_extra
    from ...models import Denoiser
    from ..training import TrainConfig, open_run
    from ..training.held_out import held_out_loss_of_run

    # Whatever can be refused is refused before measuring.
    if options.plot is not None:
        import_extra("matplotlib", "report")
    _check_outputs(options)
    opened = open_run(options.run_directory)
    try:
        options.torch_device = TrainConfig(device=options.device).torch_device()
    except ValueError as error:
        usage_error(f"argument --device: {error}")
    config = _config(opened, options)
    images = opened.images()
    try:
        reference = None if options.reference is None else _reference(options, config, images.held_out[:])
    except (OSError, ValueError) as error:
        usage_error(f"argument --reference: {error}")

    def measure(denoiser: Denoiser) -> "HeldOutLoss":
        return held_out_loss_of_run(config, images, denoiser, limit=options.images, progress=not options.json)

    measured = measure(opened.denoiser(options.weights, options.step, options.torch_device))
    result = measured.by_level
    if reference is not None:
        try:
            if isinstance(reference, Denoiser):
                other = measure(reference)
                result = result.compared_with(other.with_sigma_data(measured.sigma_data).by_level)
            else:
                result = result.compared_with(reference)
        except ValueError as error:
            usage_error(f"argument --reference: {error}")
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
        with replacing(options.plot) as partial:
            result.plot().figure.savefig(partial, format=options.plot.suffix[1:])
    for path in filter(None, (options.csv, options.plot)):
        print(f"Written to {path}", file=sys.stderr)


def _check_outputs(options: Options) -> None:
    """Refuse files of --csv and --plot that cannot be written, or that hold something else."""
    from ...validation import LevelLosses

    if options.plot is not None and options.plot.suffix not in PICTURES:
        usage_error(f"argument --plot: {options.plot}, expected a file ending in {', '.join(PICTURES)}")
    for name, path in (("csv", options.csv), ("plot", options.plot)):
        if path is None:
            continue
        try:
            check_writable(path, folder=False)
            if name == "csv" and path.exists():
                LevelLosses.load(path)
        except OSError as error:
            usage_error(f"argument --{name}: {path} cannot be written: {problem(error) or error}")
        except ValueError as error:
            usage_error(f"argument --{name}: {path} cannot be written: {error}")


def _config(opened: "Run", options: Options) -> "TrainConfig":
    """The run's config with the number of levels of the options."""
    if options.images is not None and options.images < 1:
        usage_error(f"argument --images: {options.images}, expected at least 1")
    config = opened.config
    try:
        if options.levels is not None:
            config = dataclasses.replace(config, held_out_levels=options.levels)
    except ValueError as error:
        usage_error(f"argument --levels: {error}")
    return config


def _reference(options: Options, config: "TrainConfig", held_out: "Tensor") -> "Denoiser | LevelLosses":
    """The denoiser of another run, or the losses in a file.

    Raises:
        OSError: there is no such file.
        ValueError: not a validation, or one of other levels; a run that holds out other images, some of which it may
            have been trained on.
    """
    from ...validation import LevelLosses
    from ...validation.losses import check_reference
    from ..training import open_run
    from ..training.held_out import held_out_log_snr, name_of

    if not options.reference.is_dir():
        losses = LevelLosses.load(options.reference)
        check_reference(losses, held_out_log_snr(config), losses.draws)
        return losses
    other = open_run(options.reference)
    mine, others = name_of(held_out), name_of(other.images().held_out[:])
    if mine != others:
        raise ValueError(f"{options.reference} holds out {others}, expected {mine}: a run of the same data set")
    return other.denoiser(options.weights, device=options.torch_device)
