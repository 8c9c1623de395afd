"""`vadiff optimal-loss`."""

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ...optimal_loss import OptimalLoss
from ..config_schema import DATASETS, LATENT_STD
from .command import command
from .parameters import NUMBER, PATH, TEXT, WHOLE_NUMBER, Choice, Listed, Options, flag, group, option, usage_error

NAME = "optimal-loss"
HELP = "estimate the lowest loss any model of a data set can have, and a run's gap to it"
DESCRIPTION = (
    "Estimate the optimal loss J* of a data set's training images at noise levels log-spaced in sigma: the x0 loss of "
    "the ideal denoiser, summed over elements. Draws until each level's standard error is below max(--relative of J*, "
    "--absolute of the total variance), or --limit draws. Writes optimal_loss.csv and .png to the folder --out; with "
    "--run both show the averaged model's loss and gap on training images, with --compare the table shows the "
    "difference from another curve."
)
EXAMPLES = (
    "vadiff optimal-loss --dataset digits --levels 8 --out runs/digits-optimum",
    "vadiff optimal-loss --run runs/digits          # of its images, and its gap",
)

_SQUARE = 3072  # size of the matrix product whose speed is the reference


@command(NAME, HELP, DESCRIPTION, EXAMPLES)
@group(
    "Images",
    option("--data", TEXT, "PATH", "path of the data set"),
    option("--dataset", Choice(DATASETS), None, "data set", default="cifar10"),
    option("--image-size", WHOLE_NUMBER, "N", "in pixels, for dataset images; latents have their own", default=32),
    flag("--flips", "include mirrored images, as runs with flips see them"),
    flag("--class-conditional", "J* of a class-conditional network; taken from --run if given"),
    option("--run", PATH, "RUN", "run directory: use its data, measure its gap", name="trained"),
    option("--gap-images", WHOLE_NUMBER, "N", "training images to measure the gap on", default=1000),
)
@group(
    "Noise levels",
    option("--levels", WHOLE_NUMBER, "N", "number of noise levels", default=16),
    option("--sigma-min", NUMBER, "S", "lowest noise level", default=0.1),
    option("--sigma-max", NUMBER, "S", "highest noise level", default=40.0),
)
@group(
    "Estimate",
    option(
        "--estimator",
        Choice(("full", "snis", "dol", "cdol", "cdol_paper")),
        None,
        "see docs/optimal-loss.md",
        default="full",
    ),
    option("--subset", WHOLE_NUMBER, "L", "samples per subset, default N/10 (not for full)"),
    option("--correction", NUMBER, "C", "of cdol, default 2N/L; of cdol_paper, 4N/L"),
    option("--relative", NUMBER, "X", "target standard error, as a share of J*", default=0.05),
    option("--absolute", NUMBER, "X", "or as a share of the total variance", default=1e-3),
    option("--limit", WHOLE_NUMBER, "N", "maximum draws per level", default=16384),
    option("--seed", WHOLE_NUMBER, "N", "seed of images, noise and subsets", default=0),
)
@group(
    "Machine and results",
    option("--chunk", WHOLE_NUMBER, "N", "images per matrix product; sets the memory", default=4096),
    option("--device", Listed(TEXT), "DEVICE", "auto (all GPUs), cpu, cuda, cuda:N", default=["auto"]),
    option("--compare", PATH, "CSV", "print the difference from this curve (same levels)"),
    option("--out", PATH, "DIR", "results", default=Path("runs/optimal-loss")),
)
def run(options: Options) -> None:
    from ...optimal_loss import Estimate, estimate_given_class, estimate_until
    from ..progress import progress_bar
    from ..report.optimal_loss import STOPPED, check_outputs, next_steps_of, optimal_loss_table, write_figure
    from ..training import TrainConfig, open_run
    from ..training.data_set import load_images
    from ..training.optimal_curve import training_set
    from ..training.run_gap import gap_of_run
    from ..training.stopping import stoppable

    sigmas = _levels(options)
    devices = _devices(options)
    other = None if options.compare is None else _other(options, sigmas)
    trained = None if options.trained is None else open_run(options.trained)
    if trained is None:
        try:
            config = TrainConfig(
                dataset=options.dataset, data=options.data, flips=options.flips,
                class_conditional=options.class_conditional, **_sizes(options),
            )  # fmt: skip
        except ValueError as error:
            usage_error(str(error))
    else:
        config = trained.config
    if config.class_conditional and options.estimator != "full":
        usage_error(f"argument --estimator: {options.estimator}, expected full for class-conditional J*")
    check_outputs(options.out, trained)
    images = load_images(config)
    data, labels = training_set(images, flips=config.mirrored_data, class_conditional=config.class_conditional)
    machine = _product_speed(devices)
    where = ", ".join(str(device) for device in devices)
    told = "" if labels is None else f", conditional on {images.classes} classes"
    print(f"{len(data):,} images of {data[0].numel():,} numbers{told}, {len(sigmas)} noise levels, on {where}")

    seen: list[Estimate] = []
    with stoppable(STOPPED), progress_bar(options.limit, NAME, "draw") as bar:
        started = time.perf_counter()

        def progress(so_far: Estimate) -> None:
            draws = int(so_far.optimal.draws.max())
            if so_far.levels_done > (seen[0].levels_done if seen else 0):  # logs have no bar
                spent = time.perf_counter() - started
                bar.write(f"{so_far.levels_done} of {len(sigmas)} levels done after {draws:,} draws, {spent:.0f} s")
                sys.stdout.flush()
            seen[:] = [so_far]
            bar.update(draws - bar.n)
            bar.set_postfix_str(f"{so_far.levels_done} of {len(sigmas)} levels done", refresh=False)

        try:
            if labels is None:
                optimal = estimate_until(
                    data, sigmas, options.limit, options.relative, options.absolute, options.estimator, options.subset,
                    options.correction, options.seed, chunk=options.chunk, device=devices, progress=progress,
                )  # fmt: skip
            else:
                optimal = estimate_given_class(
                    data, labels, sigmas, options.limit, options.relative, options.absolute, options.seed,
                    chunk=options.chunk, device=devices, progress=progress,
                )  # fmt: skip
        except ValueError as error:
            usage_error(str(error))
        seconds = time.perf_counter() - started
    optimal.save(options.out / "optimal_loss.csv")

    gap = None
    if trained is not None:
        gap = gap_of_run(
            trained, optimal, images=images, number=options.gap_images, seed=options.seed, device=devices[0]
        )
    print(optimal_loss_table(optimal, gap, other))
    gaps = {} if gap is None else {options.trained.name: gap}
    write_figure(optimal, gaps, options.out)
    speed, machine = seen[0].flops / seconds, (machine + _product_speed(devices)) / 2
    print(
        f"{seconds:.1f} s; {speed / 1e9:.0f} GFLOP/s in matrix products, {speed / machine:.0%} of the "
        f"{machine / 1e9:.0f} of a {_SQUARE} x {_SQUARE} float32 product here"
    )
    print(f"Written to {options.out / 'optimal_loss'}.csv and .png\n{next_steps_of(options.out, trained)}")


def _sizes(options: Options) -> dict[str, Any]:
    """The fields of a config that say how large the images are; latents say it themselves."""
    if options.dataset != "latents" or options.data is None:
        return {"image_size": options.image_size}
    from ..data.latents import read_facts

    channels, height, _ = read_facts(Path(options.data)).encoding.latent_shape
    return {"image_size": height, "image_channels": channels, "sigma_data": LATENT_STD}


def _other(options: Options, sigmas: list[float]) -> OptimalLoss:
    """Read the curve of --compare."""
    try:
        other = OptimalLoss.load(options.compare)
    except (OSError, ValueError) as error:
        usage_error(f"argument --compare: {error}")
    if len(other.sigma) != len(sigmas) or not torch.allclose(other.sigma, torch.tensor(sigmas).double(), rtol=1e-6):
        usage_error(
            f"argument --compare: {options.compare} has {len(other.sigma)} noise levels from "
            f"{float(other.sigma.min()):g} to {float(other.sigma.max()):g}, expected those of this estimate: the same "
            "--levels, --sigma-min and --sigma-max"
        )
    return other


def _levels(options: Options) -> list[float]:
    if not 0 < options.sigma_min < options.sigma_max < math.inf:
        usage_error(f"argument --sigma-min: {options.sigma_min:g}, expected 0 < sigma-min < sigma-max")
    if options.levels < 2:
        usage_error(f"argument --levels: {options.levels}, expected at least 2")
    low, high = math.log(options.sigma_min), math.log(options.sigma_max)
    levels: list[float] = torch.linspace(low, high, options.levels, dtype=torch.float64).exp().tolist()
    return levels


def _devices(options: Options) -> list[torch.device]:
    if options.device == ["auto"]:
        found = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
        return found or [torch.device("cpu")]
    try:
        devices = [torch.device(name) for name in options.device]
        for device in devices:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        usage_error(f"argument --device: {','.join(options.device)}: {error}")
    return devices


def _product_speed(devices: list[torch.device]) -> float:
    """FLOP/s of a large float32 product, the best of three, summed over the devices.

    Measured before and after the estimate, as the speed of a shared machine varies."""
    total = 0.0
    for device in devices:
        matrix = torch.randn(_SQUARE, _SQUARE, device=device)
        best = math.inf
        for _ in range(4):  # the first one warms up
            started = time.perf_counter()
            (matrix @ matrix)[0, 0].item()
            best = min(best, time.perf_counter() - started)
        total += 2 * _SQUARE**3 / best
    return total
