"""`vadiff optimal-loss`."""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ...optimal_loss import OptimalLoss
from ..config_schema import DATASETS, LATENT_STD

NAME = "optimal-loss"
HELP = "estimate the lowest loss any model of a data set can have, and a run's gap to it"
DESCRIPTION = (
    "Estimate the optimal loss J* of a data set's training images at noise levels log-spaced in sigma: the x0 loss of "
    "the ideal denoiser, summed over elements. Draws until each level's standard error is below max(RELATIVE of J*, "
    "ABSOLUTE of the total variance), or LIMIT draws. Writes optimal_loss.csv and .png to the folder --out; with --run "
    "both show the averaged model's loss and gap on training images, with --compare the table shows the difference "
    "from another curve."
)

_SQUARE = 3072  # size of the matrix product whose speed is the reference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="PATH", help="path of the data set")
    parser.add_argument("--dataset", choices=DATASETS, default="cifar10", help="data set")
    parser.add_argument(
        "--image-size", type=int, metavar="N", default=32, help="in pixels, for dataset images; latents have their own"
    )
    parser.add_argument("--flips", action="store_true", help="include mirrored images, as runs with flips see them")
    parser.add_argument(
        "--class-conditional", action="store_true", help="J* of a class-conditional network; taken from --run if given"
    )
    parser.add_argument(
        "--run", type=Path, dest="trained", metavar="RUN", help="run directory: use its data, measure its gap"
    )
    parser.add_argument(
        "--gap-images", type=int, metavar="N", default=1000, help="training images to measure the gap on"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="CSV", help="print the difference from this curve (same levels)"
    )
    parser.add_argument("--levels", type=int, metavar="N", default=16, help="number of noise levels")
    parser.add_argument("--sigma-min", type=float, metavar="S", default=0.1, help="lowest noise level")
    parser.add_argument("--sigma-max", type=float, metavar="S", default=40.0, help="highest noise level")
    parser.add_argument(
        "--estimator", choices=("full", "snis", "dol", "cdol", "cdol_paper"), default="full", help="see the docs"
    )
    parser.add_argument("--subset", type=int, metavar="L", help="samples per subset, default N/10 (not for full)")
    parser.add_argument("--correction", type=float, metavar="C", help="of cdol, default 2N/L; of cdol_paper, 4N/L")
    parser.add_argument(
        "--relative", type=float, metavar="X", default=0.05, help="target standard error, as a share of J*"
    )
    parser.add_argument("--absolute", type=float, metavar="X", default=1e-3, help="or as a share of the total variance")
    parser.add_argument("--limit", type=int, metavar="N", default=16384, help="maximum draws per level")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="seed of images, noise and subsets")
    parser.add_argument(
        "--chunk", type=int, metavar="N", default=4096, help="images per matrix product; sets the memory"
    )
    parser.add_argument("--device", default="auto", help="auto (all GPUs), cpu, cuda, or several: cuda:0,cuda:1")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/optimal-loss"), help="results")


def run(options: argparse.Namespace) -> None:
    from ...extras import import_extra
    from ...optimal_loss import Estimate, estimate_given_class, estimate_until
    from ..report.optimal_loss import optimal_loss_figure, optimal_loss_table
    from ..training import TrainConfig, open_run
    from ..training.data_set import load_images
    from ..training.optimal_curve import training_set
    from ..training.run_gap import gap_of_run

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
            options.parser.error(str(error))
    else:
        config = trained.config
    if config.class_conditional and options.estimator != "full":
        options.parser.error(f"argument --estimator: {options.estimator}, expected full for class-conditional J*")
    images = load_images(config)
    data, labels = training_set(images, flips=config.mirrored_data, class_conditional=config.class_conditional)
    machine = _product_speed(devices)
    where = ", ".join(str(device) for device in devices)
    told = "" if labels is None else f", conditional on {images.classes} classes"
    print(f"{len(data):,} images of {data[0].numel():,} numbers{told}, {len(sigmas)} noise levels, on {where}")

    seen: list[Estimate] = []
    with import_extra("tqdm", "train").tqdm(total=options.limit, unit="draw", desc=NAME, disable=None) as bar:
        started = time.perf_counter()

        def progress(so_far: Estimate) -> None:
            draws = int(so_far.optimal.draws.max())
            if so_far.levels_done > (seen[0].levels_done if seen else 0):  # logs have no bar
                spent = time.perf_counter() - started
                bar.write(f"{so_far.levels_done} of {len(sigmas)} levels done after {draws:,} draws, {spent:.0f} s")
                sys.stdout.flush()
            seen[:] = [so_far]
            bar.update(draws - bar.n)
            bar.set_postfix_str(f"{so_far.levels_done} of {len(sigmas)} levels done")

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
            options.parser.error(str(error))
        seconds = time.perf_counter() - started
    optimal.save(options.out / "optimal_loss.csv")

    gap = None
    if trained is not None:
        gap = gap_of_run(
            trained, optimal, images=images, number=options.gap_images, seed=options.seed, device=devices[0]
        )
    print(optimal_loss_table(optimal, gap, other))
    gaps = {} if gap is None else {options.trained.name: gap}
    optimal_loss_figure(optimal, gaps).savefig(options.out / "optimal_loss.png")
    speed, machine = seen[0].flops / seconds, (machine + _product_speed(devices)) / 2
    print(
        f"{seconds:.1f} s; {speed / 1e9:.0f} GFLOP/s in matrix products, {speed / machine:.0%} of the "
        f"{machine / 1e9:.0f} of a {_SQUARE} x {_SQUARE} float32 product here"
    )
    print(f"Written to {options.out / 'optimal_loss'}.csv and .png")


def _sizes(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a config that say how large the images are; latents say it themselves."""
    if options.dataset != "latents" or options.data is None:
        return {"image_size": options.image_size}
    from ..data.latents import read_facts

    channels, height, _ = read_facts(Path(options.data)).encoding.latent_shape
    return {"image_size": height, "image_channels": channels, "sigma_data": LATENT_STD}


def _other(options: argparse.Namespace, sigmas: list[float]) -> OptimalLoss:
    """Read the curve of --compare."""
    try:
        other = OptimalLoss.load(options.compare)
    except (OSError, ValueError) as error:
        options.parser.error(f"argument --compare: {error}")
    if len(other.sigma) != len(sigmas) or not torch.allclose(other.sigma, torch.tensor(sigmas).double(), rtol=1e-6):
        options.parser.error(
            f"argument --compare: {options.compare} has {len(other.sigma)} noise levels from "
            f"{float(other.sigma.min()):g} to {float(other.sigma.max()):g}, expected those of this estimate: the same "
            "--levels, --sigma-min and --sigma-max"
        )
    return other


def _levels(options: argparse.Namespace) -> list[float]:
    if not 0 < options.sigma_min < options.sigma_max < math.inf:
        options.parser.error(f"argument --sigma-min: {options.sigma_min:g}, expected 0 < sigma-min < sigma-max")
    if options.levels < 2:
        options.parser.error(f"argument --levels: {options.levels}, expected at least 2")
    low, high = math.log(options.sigma_min), math.log(options.sigma_max)
    levels: list[float] = torch.linspace(low, high, options.levels, dtype=torch.float64).exp().tolist()
    return levels


def _devices(options: argparse.Namespace) -> list[torch.device]:
    if options.device == "auto":
        found = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
        return found or [torch.device("cpu")]
    try:
        devices = [torch.device(name) for name in options.device.split(",")]
        for device in devices:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        options.parser.error(f"argument --device: {options.device}: {error}")
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
