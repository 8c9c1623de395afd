"""Options of how images are drawn, shared by `vadiff sample`, `evaluate` and `ema`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...sampling.generation import LABELS, SPACINGS
from ...sampling.seeds import LARGEST_SEED, parse_seeds
from ...sampling.solvers import SOLVERS
from .parameters import (
    NUMBER,
    PATH,
    TEXT,
    WHOLE_NUMBER,
    Choice,
    Decorator,
    Listed,
    Options,
    Value,
    flag,
    group,
    not_together,
    option,
    together,
    usage_error,
)

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


def seed_options(images: int) -> Decorator[Any]:
    """Options of which images are drawn: one per seed, `images` of them by default."""
    return together(
        group(
            "Which images are drawn",
            option("--images", WHOLE_NUMBER, "N", "how many to draw", default=images),
            option("--first-seed", WHOLE_NUMBER, "N", "seed of the first, the others follow", default=0),
            option(
                "--seeds", Value("LIST", parse_seeds), "LIST",
                "one image for each of these seeds, as 0-63,100,200-210, in place of --images and --first-seed",
            ),
        ),
        not_together("seeds", "images"),
        not_together("seeds", "first_seed"),
    )  # fmt: skip


def seeds_of(options: Options) -> Sequence[int]:
    """The seeds of the images; invalid ones are a usage error."""
    if options.seeds is not None:
        seeds: list[int] = options.seeds
        return seeds
    images, first = options.images, options.first_seed
    if images < 1:
        usage_error(f"argument --images: {images}, expected at least 1")
    if not 0 <= first <= LARGEST_SEED - images + 1:
        usage_error(
            f"argument --first-seed: {first}, expected 0 or more, with the seed of the last image at most 2**63 - 1"
        )
    return range(first, first + images)


def weights_name(text: str) -> str:
    """An argument that names weights of a checkpoint: ema, raw or ema-WIDTH.

    Raises:
        ValueError: it names none.
    """
    if text in ("ema", "raw"):
        return text
    prefix, _, width = text.partition("-")
    try:
        if prefix == "ema" and float(width) > 0.0:
            return text
    except ValueError:
        pass
    raise ValueError(f"{text!r}, expected ema, raw or ema- and a width, as ema-0.1")


WEIGHTS = Value("NAME", weights_name)


def solver_options(*others: Decorator[Any]) -> Decorator[Any]:
    """Options of how an image is made of its seed and a model, and others of the same group."""
    return together(
        group(
            "How images are drawn",
            option(
                "--solver", Choice(SOLVERS), None,
                "heun: EDM's second-order solver; euler: DDIM; ddpm: ancestral; dpmpp_2m: DPM-Solver++(2M); default: "
                "euler for a flow and with --steps-from statistics, else heun",
            ),
            option(
                "--steps", WHOLE_NUMBER, "N",
                "network calls of an image, heun: 2N - 1; default: 18 for heun, 16 for dpmpp_2m, else 50",
            ),
            option(
                "--steps-from", Choice(["statistics"]), None,
                "noise levels, from --sigma-max to --sigma-min, at steps of equal information, by the statistics of "
                "the training; for the solver euler",
            ),
            option(
                "--spacing", Choice([name for name in SPACINGS if name != "statistics"]), None,
                "of the noise levels; edm: by --sigma-min, --sigma-max and --rho; flow: evenly spaced times up to "
                "--sigma-max; timesteps: N of a vp process's own, evenly from the last to the first; default: flow for "
                "a flow unless by heun, else edm",
            ),
            option(
                "--sigma-min", NUMBER, "S",
                "lowest noise level; default: 0.002, or that of the vp process, if it is far above",
            ),
            option(
                "--sigma-max", NUMBER, "S",
                "highest noise level; default: 80, with spacing flow 1000, or the highest of the vp process, if lower",
            ),
            option("--rho", NUMBER, "R", "larger: more steps at low noise; default: 7"),
            option("--churn", NUMBER, "S", "S_churn of EDM's stochastic sampler", default=0.0),
            option("--churn-sigma-min", NUMBER, "S", "S_tmin: no churn below it", default=0.0),
            option("--churn-sigma-max", NUMBER, "S", "S_tmax: no churn above it", default=float("inf")),
            option("--churn-noise", NUMBER, "S", "S_noise of the churn", default=1.0),
            flag("--clip-x0", "clip each estimate of the image to [-1, 1]"),
            option(
                "--labels", Choice(LABELS), None,
                "class of each image; cycle: its seed mod number of classes; random: drawn by its seed",
                default="cycle",
            ),
            option("--label", WHOLE_NUMBER, "N", "class of all images, in place of --labels"),
            option(
                "--guidance", NUMBER, "W",
                "away from the model without a class, or from --guide; 1: none; doubles the network calls",
                default=1.0,
            ),
            option(
                "--guidance-sigma-min", NUMBER, "S", "no guidance at this noise level and below", default=0.0
            ),
            option(
                "--guidance-sigma-max", NUMBER, "S", "no guidance above this noise level", default=float("inf")
            ),
            option(
                "--guide", TEXT, "RUN[:WEIGHTS[/STEP]]",
                "a weaker model for --guidance (autoguidance), as runs/small:ema-0.1/20000; WEIGHTS as for sample's "
                "--weights, default: ema of the latest checkpoint",
            ),
            option(
                "--vae", PATH, "PATH",
                "of a run on latents: folder of the VAE that decodes; default: where that was which encoded them",
            ),
            *others,
        ),
        not_together("steps_from", "spacing"),
        not_together("labels", "label"),
    )  # fmt: skip


def with_vae(run: "Run", options: Options) -> "Run":
    """The run with the VAE of --vae.

    Raises:
        RunError: the run draws pixels, or its encoding is missing.
    """
    if options.vae is None:
        return run
    given = dataclasses.replace(run, vae=options.vae)
    assert given.encoding  # raises for a run that draws pixels
    return given


def drawing_options() -> Decorator[Any]:
    """The options of `solver_options`, and those of the weights to draw with and where."""
    return solver_options(
        option(
            "--weights", WEIGHTS, "NAME",
            "ema: averaged; raw: as trained; ema-WIDTH: the average that `vadiff ema --sigma-rel WIDTH` made",
            default="ema",
        ),
        option("--step", WHOLE_NUMBER, "N", "step of the checkpoint; default: the latest"),
        option("--batch-size", WHOLE_NUMBER, "N", "images at a time per device", default=256),
        option(
            "--devices", Listed(TEXT), "DEVICE", "auto (all GPUs, else the CPU), cpu, cuda:0 ...", default=["auto"]
        ),
    )  # fmt: skip


def solver_options_of(options: Options, run: "Run") -> "Generation":
    """What `solver_options` say; an invalid option is a usage error."""
    from ...models.parameterisation import sigma_range
    from ...sampling import Churn
    from ...sampling.generation import default_generation, with_options

    _check_guided_levels(options)
    guide = _guide_of(options)
    form = run.config.form()
    if options.clip_x0 and run.config.dataset == "latents":
        usage_error("argument --clip-x0: not with a run on latents, which have no bounds")
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
        usage_error(str(error))
    if spacing == "statistics" and generation.solver in STATISTICS_MEASURED:
        print(
            f"vadiff: steps by statistics are made for the solver euler; {STATISTICS_MEASURED[generation.solver]}",
            file=sys.stderr,
        )
    return generation


def _check_guided_levels(options: Options) -> None:
    low, high = options.guidance_sigma_min, options.guidance_sigma_max
    if not 0.0 <= low < high:
        usage_error(
            f"argument --guidance-sigma-min: {low:g}, expected 0 or more, and below --guidance-sigma-max, {high:g}"
        )
    if (low, high) != (0.0, float("inf")) and options.guidance == 1.0:
        usage_error("argument --guidance-sigma-min, --guidance-sigma-max: expected with --guidance other than 1")


def generation_of(options: Options, run: "Run") -> "Generation":
    """What `drawing_options` say; an invalid option is a usage error."""
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
        usage_error(str(error))
    return generation


def devices_of(options: Options) -> tuple[torch.device, ...]:
    """The devices of --devices; a missing one is a usage error."""
    names: Sequence[str] = options.devices
    if not names:
        usage_error("argument --devices: none, expected at least one device")
    if list(names) == ["auto"]:
        number = torch.cuda.device_count()
        names = [f"cuda:{index}" for index in range(number)] or ["cpu"]
    devices = []
    for name in names:
        try:
            device = torch.device(name)
        except RuntimeError:
            usage_error(f"argument --devices: {name!r}, expected auto, cpu or cuda:N")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            usage_error(
                f"argument --devices: {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices; "
                "`vadiff doctor` says what this machine has"
            )
        devices.append(device)
    return tuple(devices)


def _guide_of(options: Options) -> "Guide | None":
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
        usage_error(f"argument --guide: step {step!r} in {text!r}, expected a number, as RUN:ema/20000")
    try:
        weights = weights_name(weights or "ema")
    except ValueError as error:
        usage_error(f"argument --guide: {error}")
    return Guide(text, open_run(folder), weights, int(step) if step else None)
