"""Options of how images are drawn, shared by `vadiff sample`, `evaluate` and `ema`."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...sampling.generation import LABELS, SPACINGS
from ...sampling.seeds import LARGEST_SEED, parse_seeds
from ...sampling.solvers import SOLVERS

if TYPE_CHECKING:
    from ...sampling.generation import Generation, Guide
    from ..training import Run


# What was measured of steps by statistics with the solvers that they are not made for, printed where one is chosen
# (benchmarks/results/sampler_steps.txt).
STATISTICS_MEASURED = {
    "dpmpp_2m": "with DPM-Solver++(2M) the Fréchet distance of digits was 44 to 65 % lower than by --rho 7 with 4 "
    "calls, and 9 to 11 % higher with 16 (EDM, flow)",
    "heun": "with Heun's method the Fréchet distance of digits was 153 % higher than by --rho 7 with 16 calls for EDM, "
    "and much the same for a flow",
    "ddpm": "ancestral sampling was not measured",
}


def add_seed_options(parser: argparse.ArgumentParser, images: int) -> None:
    """Options of which images are drawn: one per seed, `images` of them by default."""
    parser.add_argument("--images", type=int, metavar="N", default=None, help=f"how many to draw; default: {images}")
    parser.add_argument(
        "--first-seed", type=int, metavar="N", default=None, help="seed of the first, the others follow; default: 0"
    )
    parser.add_argument(
        "--seeds", type=_seeds, metavar="LIST", default=None,
        help="one image for each of these seeds, as 0-63,100,200-210, in place of --images and --first-seed",
    )  # fmt: skip
    parser.set_defaults(default_images=images)


def seeds_of(options: argparse.Namespace) -> Sequence[int]:
    """The seeds of the images; invalid ones are a usage error."""
    for name in ("images", "first_seed"):
        if options.seeds is not None and getattr(options, name) is not None:
            options.parser.error(f"argument --{name.replace('_', '-')}: not allowed with argument --seeds")
    if options.seeds is not None:
        seeds: list[int] = options.seeds
        return seeds
    images = options.default_images if options.images is None else options.images
    first = options.first_seed or 0
    if images < 1:
        options.parser.error(f"argument --images: {images}, expected at least 1")
    if not 0 <= first <= LARGEST_SEED - images + 1:
        options.parser.error(
            f"argument --first-seed: {first}, expected 0 or more, with the seed of the last image at most 2**63 - 1"
        )
    return range(first, first + images)


def add_solver_options(parser: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    """Options of how an image is made of its seed and a model; returns their group."""
    drawing = parser.add_argument_group("how images are drawn")
    drawing.add_argument(
        "--solver", choices=list(SOLVERS), default=None,
        help="heun: EDM's second-order solver; euler: DDIM; ddpm: ancestral; dpmpp_2m: DPM-Solver++(2M); "
        "default: euler for a flow and with --steps-from statistics, else heun",
    )  # fmt: skip
    drawing.add_argument(
        "--steps", type=int, metavar="N", default=None,
        help="network calls of an image, heun: 2N - 1; default: 18 for heun, 16 for dpmpp_2m, else 50",
    )  # fmt: skip
    spacing = drawing.add_mutually_exclusive_group()
    spacing.add_argument(
        "--steps-from", choices=["statistics"], default=None,
        help="noise levels, from --sigma-max to --sigma-min, at equal steps of what the network tells of the image, by "
        "the statistics of its training; for the solver euler",
    )  # fmt: skip
    spacing.add_argument(
        "--spacing", choices=[name for name in SPACINGS if name != "statistics"], default=None,
        help="of the noise levels; edm: by --sigma-min, --sigma-max and --rho; flow: evenly spaced times up to "
        "--sigma-max; timesteps: N of a vp process's own, evenly from the last to the first; default: flow for a flow "
        "unless by heun, else edm",
    )  # fmt: skip
    drawing.add_argument(
        "--sigma-min",
        type=float,
        metavar="S",
        default=None,
        help="lowest noise level; default: 0.002, or that of the vp process, if it is far above",
    )
    drawing.add_argument(
        "--sigma-max", type=float, metavar="S", default=None,
        help="highest noise level; default: 80, with spacing flow 1000, or the highest of the vp process, if lower",
    )  # fmt: skip
    drawing.add_argument(
        "--rho", type=float, metavar="R", default=None, help="larger: more steps at low noise; default: 7"
    )
    drawing.add_argument("--churn", type=float, metavar="S", default=0.0, help="S_churn of EDM's stochastic sampler")
    drawing.add_argument("--churn-sigma-min", type=float, metavar="S", default=0.0, help="S_tmin: no churn below it")
    drawing.add_argument(
        "--churn-sigma-max", type=float, metavar="S", default=float("inf"), help="S_tmax: no churn above it"
    )
    drawing.add_argument("--churn-noise", type=float, metavar="S", default=1.0, help="S_noise of the churn")
    drawing.add_argument("--clip-x0", action="store_true", help="clip each estimate of the image to [-1, 1]")
    label = drawing.add_mutually_exclusive_group()
    label.add_argument(
        "--labels", choices=LABELS, default="cycle",
        help="class of each image; cycle: its seed mod number of classes; random: drawn by its seed",
    )  # fmt: skip
    label.add_argument("--label", type=int, metavar="N", default=None, help="class of all images")
    drawing.add_argument(
        "--guidance", type=float, metavar="W", default=1.0,
        help="away from the model without a class, or from --guide; 1: none; doubles the network calls",
    )  # fmt: skip
    drawing.add_argument(
        "--guidance-sigma-min", type=float, metavar="S", default=0.0, help="no guidance at this noise level and below"
    )
    drawing.add_argument(
        "--guidance-sigma-max", type=float, metavar="S", default=float("inf"), help="no guidance above this noise level"
    )
    drawing.add_argument(
        "--guide", metavar="RUN[:WEIGHTS[/STEP]]", default=None,
        help="a weaker model for --guidance (autoguidance), as runs/small:ema-0.1/20000; WEIGHTS as for sample's "
        "--weights, default: ema of the latest checkpoint",
    )  # fmt: skip
    drawing.add_argument(
        "--vae", type=Path, metavar="PATH", default=None,
        help="of a run on latents: folder of the VAE that decodes; default: where that was which encoded them",
    )  # fmt: skip
    return drawing


def with_vae(run: "Run", options: argparse.Namespace) -> "Run":
    """The run with the VAE of --vae.

    Raises:
        RunError: the run draws pixels, or its encoding is missing.
    """
    if options.vae is None:
        return run
    given = dataclasses.replace(run, vae=options.vae)
    assert given.encoding  # raises for a run that draws pixels
    return given


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """The options of `add_solver_options`, and those of the weights to draw with and where."""
    drawing = add_solver_options(parser)
    drawing.add_argument(
        "--weights", type=weights_name, metavar="NAME", default="ema",
        help="ema: averaged; raw: as trained; ema-WIDTH: the average that `vadiff ema --sigma-rel WIDTH` made",
    )  # fmt: skip
    drawing.add_argument("--batch-size", type=int, metavar="N", default=256, help="images at a time per device")
    drawing.add_argument(
        "--devices",
        nargs="+",
        metavar="DEVICE",
        default=["auto"],
        help="auto (all GPUs, else the CPU), cpu, cuda:0 ...",
    )
    drawing.add_argument(
        "--step", type=int, metavar="N", default=None, help="step of the checkpoint; default: the latest"
    )


def solver_options_of(options: argparse.Namespace, run: "Run") -> "Generation":
    """What `add_solver_options` says; an invalid option is a usage error."""
    from ...models.parameterisation import sigma_range
    from ...sampling import Churn
    from ...sampling.generation import default_generation, with_options

    guide = _guide_of(options)
    form = run.config.form()
    if options.clip_x0 and run.config.dataset == "latents":
        options.parser.error("argument --clip-x0: not with a run on latents, which have no bounds")
    spacing = options.steps_from or options.spacing
    try:
        profile = run.profile(options.step).bounded(run.config.sigma_data) if spacing == "statistics" else None
        churn = Churn(options.churn, options.churn_sigma_min, options.churn_sigma_max, options.churn_noise)
        generation = with_options(
            default_generation(run.config.process, options.solver, spacing, sigmas=sigma_range(form), profile=profile),
            steps=options.steps,
            sigma_min=options.sigma_min,
            sigma_max=options.sigma_max,
            rho=options.rho,
            churn=churn if churn.amount else None,
            clip=options.clip_x0,
            label=options.labels if options.label is None else options.label,
            guidance=options.guidance,
            guided_sigma=(options.guidance_sigma_min, options.guidance_sigma_max),
            guide=guide,
        )
        generation.levels(form)
    except ValueError as error:
        options.parser.error(str(error))
    if spacing == "statistics" and generation.solver in STATISTICS_MEASURED:
        print(
            f"vadiff: steps by statistics are made for the solver euler; {STATISTICS_MEASURED[generation.solver]}",
            file=sys.stderr,
        )
    return generation


def generation_of(options: argparse.Namespace, run: "Run") -> "Generation":
    """What `add_drawing_options` says; an invalid option is a usage error."""
    from ...sampling.generation import with_options

    try:
        generation = with_options(
            solver_options_of(options, run),
            weights=options.weights,
            step=options.step,
            batch_size=options.batch_size,
            devices=devices_of(options),
        )
    except ValueError as error:
        options.parser.error(str(error))
    return generation


def devices_of(options: argparse.Namespace) -> tuple[torch.device, ...]:
    """The devices of --devices; a missing one is a usage error."""
    names: Sequence[str] = options.devices
    if list(names) == ["auto"]:
        number = torch.cuda.device_count()
        names = [f"cuda:{index}" for index in range(number)] or ["cpu"]
    devices = []
    for name in names:
        try:
            device = torch.device(name)
        except RuntimeError:
            options.parser.error(f"argument --devices: {name!r}, expected auto, cpu or cuda:N")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            options.parser.error(
                f"argument --devices: {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices; "
                "`vadiff doctor` says what this machine has"
            )
        devices.append(device)
    return tuple(devices)


def _guide_of(options: argparse.Namespace) -> "Guide | None":
    from ...sampling.generation import Guide
    from ..training import open_run

    text: str | None = options.guide
    if text is None:
        return None
    folder, colon, which = (text, "", "") if Path(text).exists() else text.rpartition(":")
    if not colon:
        folder = text
    weights, _, step = which.partition("/")
    if step and not step.isdecimal():
        options.parser.error(f"argument --guide: step {step!r} in {text!r}, expected a number, as RUN:ema/20000")
    try:
        weights = weights_name(weights or "ema")
    except argparse.ArgumentTypeError as error:
        options.parser.error(f"argument --guide: {error}")
    return Guide(text, open_run(folder), weights, int(step) if step else None)


def _seeds(text: str) -> list[int]:
    try:
        return parse_seeds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def weights_name(text: str) -> str:
    """An argument that names weights of a checkpoint: ema, raw or ema-WIDTH."""
    if text in ("ema", "raw"):
        return text
    prefix, _, width = text.partition("-")
    try:
        if prefix == "ema" and float(width) > 0.0:
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}, expected ema, raw or ema- and a width, as ema-0.1")
