"""`vadiff demo`."""

import argparse
import dataclasses
from pathlib import Path

import torch

from ...ops import backends
from ..presets import PRESETS

NAME = "demo"
HELP = "compare three weightings on handwritten digits: pictures and a table"
DESCRIPTION = (
    "Train the same small model to predict the noise of DDPM with constant, loss_level and variance_aware weighting "
    "(same seed, same noise), draw samples, write report.html (the page of `vadiff report`) and report.png to the "
    "folder --out, and print how far the loss spreads over noise levels, the Fréchet distance of the samples and the "
    "loss on held-out images per noise level. Takes minutes."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    preset = PRESETS["digits"]
    parser.add_argument("--steps", type=int, metavar="N", default=preset.steps, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, metavar="N", default=preset.batch_size, help="images per step")
    parser.add_argument("--seed", type=int, metavar="N", default=preset.seed, help="seed of weights, data and noise")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("runs/demo"), help="folder for results; replaces old ones"
    )
    parser.add_argument("--device", default=preset.device, help="auto (a GPU if there is one), cpu, cuda, cuda:N")
    parser.add_argument(
        "--backend", choices=backends.BACKENDS, default=preset.backend, help="which kernels compute the loss"
    )


def run(options: argparse.Namespace) -> None:
    from ..report import run_demo

    fields = {name: getattr(options, name) for name in ("steps", "batch_size", "seed", "device", "backend")}
    if options.out.exists() and not options.out.is_dir():
        options.parser.error(f"argument --out: {options.out} is a file, expected a folder")
    try:
        config = dataclasses.replace(PRESETS["digits"], process="vp_linear", **fields)
        backends.select(config.backend, torch.empty(0, device=config.torch_device()))
    except (ValueError, RuntimeError) as error:
        options.parser.error(str(error))
    run_demo(config, options.out)
