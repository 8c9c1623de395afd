"""`vadiff levels suggest`."""

import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import check_writable, problem, replacing
from ...process import PREDICTION_TYPES
from ..config_schema import DATASETS
from .command import command, sections
from .parameters import (
    NUMBER,
    PATH,
    TEXT,
    WHOLE_NUMBER,
    Choice,
    Options,
    argument,
    flag,
    group,
    not_together,
    option,
    usage_error,
)

if TYPE_CHECKING:
    from ..data import Images
    from ..training.level_evidence import Evidence

NAME = "levels"
HELP = "noise levels for your data: suggest P_mean and P_std, a logit-normal, a shift, sigma_data"
DESCRIPTION = "Noise levels to train on."
SUGGEST = (
    "Suggest noise levels from the x0 error of a network per noise level: sigma_data, P_mean and P_std of EDM, mean "
    "and standard deviation of the logit-normal and the shift alpha of a flow, beside the usual defaults. The errors "
    "are those that a run recorded (RUN), those in a file (--errors), or of four short trainings of a small network "
    "that this command does itself (--data, --dataset), two seeds on each half of the images, which show how sure the "
    "numbers are. They hold for images of the size and scale that were measured."
)
EXAMPLES = (
    "vadiff levels suggest runs/digits                     # by what the run recorded in training",
    "vadiff levels suggest --data pictures --image-size 64 # by four short trainings",
    "vadiff levels suggest --errors levels.csv --json",
)
PICTURES = (".png", ".svg", ".pdf")
_LIMIT, _MINUTES = 4000, 4.0
_TOO_LONG = 5.0  # times --minutes, above which trainings are refused
_FLAGS = {  # of each source
    "RUN": ("origin", "step", "sigma_data"),
    "--errors": ("prediction_type", "sigma_data"),
    "--data": ("image_size", "images", "minutes", "steps"),
}


@command("suggest", "levels for a data set or a run", SUGGEST, EXAMPLES)
@argument("run_directory", "[RUN]", "run directory that `vadiff train` wrote", required=False)
@group(
    "Source of the errors, in place of RUN",
    option(
        "--errors", PATH, "FILE",
        "CSV with the columns log_snr and x0_error, or log_snr and loss: what `vadiff validate --csv` or "
        "LevelLosses.save wrote",
    ),
    option("--data", TEXT, "PATH", "path of a data set; by default a folder of pictures"),
    option("--dataset", Choice(DATASETS), None, "which data set; default with --data: images"),
)  # fmt: skip
@group(
    "Of RUN and --errors",
    option(
        "--from", Choice(("statistics", "held-out")), None,
        "of RUN: errors recorded in training, the default, or measured now on its held-out images", name="origin",
    ),
    option("--step", WHOLE_NUMBER, "N", "of RUN's checkpoint; default: the latest"),
    option(
        "--prediction-type", Choice(PREDICTION_TYPES), None,
        "form of the losses in --errors; not needed for x0 errors and for a file of `vadiff validate --csv`",
    ),
    option(
        "--sigma-data", NUMBER, "X",
        "standard deviation of the data, with RUN or --errors; default: of RUN's images, as a file of `vadiff "
        "validate --csv` says, or inferred from the errors at the highest noise",
    ),
)  # fmt: skip
@group(
    "Short trainings, with --data or --dataset",
    option(
        "--image-size", WHOLE_NUMBER, "N",
        "height and width in pixels, that of the images to generate, not for latents; default: the images' own, 32 for "
        "a folder",
    ),
    option("--images", WHOLE_NUMBER, "N", f"maximum number of images; default: {_LIMIT}"),
    option(
        "--minutes", NUMBER, "X",
        "of all four trainings together, which have 100 steps or more in any case, and are refused if these take over "
        f"{_TOO_LONG:g} times as long; default: {_MINUTES:g}",
    ),
    option("--steps", WHOLE_NUMBER, "N", "of each training, whatever time they take"),
)  # fmt: skip
@group(
    "Results",
    option("--plot", PATH, "FILE", "also draw profile, suggestion and defaults: .png, .svg or .pdf"),
    flag("--json", "print JSON in place of the text"),
    option("--device", TEXT, "DEVICE", "auto (a GPU if there is one), cpu, cuda:N", default="auto"),
)
@not_together("minutes", "steps")
def run(options: Options) -> None:
    from ...extras import import_extra
    from ..report.suggested_levels import suggestion_content, suggestion_figure, suggestion_table
    from ..training import TrainConfig

    # Whatever can be refused is refused before minutes of training.
    source = _check(options)
    if options.plot is not None:
        import_extra("matplotlib", "report")
    try:
        device = TrainConfig(device=options.device).torch_device()
    except ValueError as error:
        usage_error(f"argument --device: {error}")
    try:
        evidence = _evidence(options, source, str(device))
    except (OSError, ValueError) as error:
        usage_error(str(error))
    print(json.dumps(suggestion_content(evidence)) if options.json else suggestion_table(evidence))
    if options.plot is not None:
        with replacing(options.plot) as partial:
            suggestion_figure(evidence).savefig(partial, format=options.plot.suffix[1:].lower())
        print(f"Written to {options.plot}", file=sys.stderr)


COMMAND = sections(NAME, DESCRIPTION, {"Actions": (run,)}, short_help=HELP)


def _check(options: Options) -> str:
    """The source of the errors; refuses several or none, flags of another one, and numbers out of bounds."""
    given = {
        "RUN": options.run_directory is not None,
        "--errors": options.errors is not None,
        "--data": options.data is not None or options.dataset is not None,
    }
    if sum(given.values()) != 1:
        usage_error("one of RUN, --errors FILE and --data PATH (or --dataset) is required, and only one")
    source = next(name for name, there in given.items() if there)
    for name in {name for names in _FLAGS.values() for name in names} - set(_FLAGS[source]):
        if getattr(options, name) is not None:
            usage_error(f"argument {_flag(name)}: not with {source}, see --help")
    for name in ("sigma_data", "images", "minutes", "steps"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            usage_error(f"argument {_flag(name)}: {value}, expected a positive number")
    if options.plot is not None:
        _check_picture(options.plot)
    if options.dataset == "digits" and options.data is not None:
        usage_error(f"argument --data: {options.data}, expected none with --dataset digits, which are scikit-learn's")
    return source


def _check_picture(path: Path) -> None:
    """Refuse what cannot be written, without creating anything: folders are made with the picture."""
    if path.suffix.lower() not in PICTURES:
        usage_error(f"argument --plot: {path}, expected a file ending in {', '.join(PICTURES)}")
    if path.is_dir():
        usage_error(f"argument --plot: {path} is a folder, expected a file")
    try:
        check_writable(path, folder=False)
    except OSError as trouble:
        usage_error(f"argument --plot: {path} cannot be written: {problem(trouble) or trouble}")


def _flag(name: str) -> str:
    return "--from" if name == "origin" else f"--{name.replace('_', '-')}"


def _evidence(options: Options, source: str, device: str) -> "Evidence":
    """The suggestion of the chosen source.

    Raises:
        OSError, ValueError: see `vadiff.trainer.training.level_evidence`.
    """
    from ..training import level_evidence, open_run

    if source == "--errors":
        return level_evidence.of_file(options.errors, options.prediction_type, options.sigma_data)
    if source == "--data":
        return _of_short_trainings(options, device)
    opened = open_run(options.run_directory)
    if options.origin == "held-out":
        return level_evidence.of_held_out(opened, options.step, options.sigma_data, device, progress=not options.json)
    return level_evidence.of_statistics(opened, options.step, options.sigma_data)


def _of_short_trainings(options: Options, device: str) -> "Evidence":
    from ..progress import progress_bar
    from ..training import Stopped
    from ..training.level_evidence import of_short_trainings
    from ..training.short import TRAININGS, load_some
    from ..training.stopping import stoppable

    dataset = options.dataset or "images"
    limit = _LIMIT if options.images is None else options.images
    images = load_some(dataset, options.data, options.image_size, limit)
    try:
        steps = options.steps or _affordable_steps(images, options.minutes or _MINUTES, device)
        with stoppable("no suggestion"), progress_bar(TRAININGS * steps, "short trainings", "step") as bar:
            evidence = of_short_trainings(images, steps, device, bar.update)
    except Stopped as stop:
        print("vadiff: stopped before the end of the short trainings: no suggestion", file=sys.stderr)
        raise SystemExit(stop.exit_code) from None
    return dataclasses.replace(evidence, command=_command(dataset, options.data, images.shape))


def _affordable_steps(images: "Images", minutes: float, device: str) -> int:
    """The steps per training that take these minutes; says so where the fewest take longer.

    Raises:
        ValueError: the fewest take more than `_TOO_LONG` times as long.
    """
    from ..training.short import FEWEST_STEPS, TRAININGS, seconds_of, steps_within, training_speed

    started = time.monotonic()
    speed = training_speed(images, device)
    least = seconds_of(FEWEST_STEPS, speed) / 60.0
    if least > minutes:
        takes = (
            f"{TRAININGS} trainings of {FEWEST_STEPS} steps, the fewest, take about {least:.2g} minutes here; a "
            "smaller --image-size is faster"
        )
        if least > _TOO_LONG * minutes:
            raise ValueError(
                f"minutes is {minutes:g}, but {takes}, and --steps {FEWEST_STEPS} trains however long it takes"
            )
        print(f"vadiff: {takes}", file=sys.stderr)
    return steps_within(60.0 * minutes - (time.monotonic() - started), speed)


def _command(dataset: str, data: str | None, shape: tuple[int, int, int]) -> str | None:
    """`vadiff train` for a data set of this shape; None if no preset trains on that size."""
    from ..presets import PRESETS

    preset = dataset if dataset in PRESETS else "cifar10"
    channels, _, size = shape
    fields: dict[str, Any] = {"dataset": dataset, "data": data, "image_size": size}
    if dataset == "latents":
        preset = "images"
        fields |= {"image_channels": channels, "attention_resolutions": (size // 2,), "flips": False}
    try:
        config = dataclasses.replace(PRESETS[preset], **fields)
    except ValueError:  # attention at 16 x 16 of smaller images
        return None
    if config.image_shape[-1] != size:
        return None
    command = ["vadiff", "train", "--preset", preset]
    if dataset not in PRESETS:
        command += ["--dataset", dataset]
    if data is not None:
        command += ["--data", data]
    if dataset == "images":
        command += ["--image-size", str(size)]
    if dataset == "latents":
        command += ["--image-size", str(size), "--image-channels", str(channels)]
        command += ["--attention-resolutions", str(size // 2), "--no-flips"]
    return shlex.join(command)
