"""`vadiff train`."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from .. import backends, weighting
from ..training import PRESETS, TrainConfig

NAME = "train"
HELP = "train a small model"
DESCRIPTION = (
    "Train a small model and print its loss on held-out images per noise level. Writes metrics.jsonl (one JSON object "
    "per line) and checkpoint.pt to the folder --out."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        required=True,
        choices=sorted(PRESETS),
        default=argparse.SUPPRESS,
        help="digits: a U-Net on scikit-learn's handwritten digits, 8 x 8 pixels, EDM preconditioning",
    )
    parser.add_argument("--weighting", choices=weighting.available(), default="variance_aware", help="of noise levels")
    add_training_options(parser, out="runs/digits")


def run(options: argparse.Namespace) -> None:
    from ..report import held_out_table
    from ..training import train

    config = training_config(options, weighting=options.weighting)
    print(f"Training preset {options.preset}, weighting {config.name}, {config.steps} steps, results in {options.out}")
    run = train(config, out=options.out)
    print("\nEDM's loss on held-out images per noise level, averaged weights:")
    print(held_out_table({config.name: run.held_out}))


def training_config(options: argparse.Namespace, **fields: Any) -> TrainConfig:
    """The preset with the options given; what does not fit ends the program as a usage error."""
    for name in ("steps", "batch_size", "seed", "device", "backend"):
        fields[name] = getattr(options, name)
    if options.out.exists() and not options.out.is_dir():
        options.parser.error(f"argument --out: {options.out} is a file, expected a folder")
    try:
        config = dataclasses.replace(PRESETS["digits"], **fields)
        backends.select(config.backend, torch.empty(0, device=config.torch_device()))
    except (ValueError, RuntimeError) as error:
        options.parser.error(str(error))
    return config


def add_training_options(parser: argparse.ArgumentParser, out: str) -> None:
    """The options that `train` and `demo` share; `out` is the default folder."""
    preset = PRESETS["digits"]
    parser.add_argument("--steps", type=int, metavar="N", default=preset.steps, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, metavar="N", default=preset.batch_size, help="images per step")
    parser.add_argument("--seed", type=int, metavar="N", default=preset.seed, help="of weights, data and noise")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path(out), help="results; replaces those of an earlier run"
    )
    parser.add_argument("--device", default=preset.device, help="auto (a GPU if there is one), cpu, cuda, cuda:N")
    parser.add_argument(
        "--backend", choices=backends.BACKENDS, default=preset.backend, help="which kernels compute the loss"
    )
