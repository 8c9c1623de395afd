"""The command `vadiff`."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import backends, weighting
from ._version import __version__
from .extras import MissingExtraError
from .training import PRESETS, TrainConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None reads them from the shell.

    Returns:
        The exit status: 0, 1 where an optional package is missing, 130 when interrupted.

    Raises:
        SystemExit: with status 2 for arguments that do not fit, with 0 for --help and --version.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except MissingExtraError as error:
        print(f"vadiff: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nvadiff: interrupted", file=sys.stderr)
        return 130
    return 0


def _train(options: argparse.Namespace) -> None:
    from .report import held_out_table
    from .training import train

    config = _config(options, weighting=options.weighting)
    print(f"Training preset {options.preset}, weighting {config.name}, {config.steps} steps, results in {options.out}")
    run = train(config, out=options.out)
    print("\nEDM's loss on held-out images per noise level, averaged weights:")
    print(held_out_table({config.name: run.held_out}))


def _demo(options: argparse.Namespace) -> None:
    from .report import run_demo

    run_demo(_config(options), options.out)


def _doctor(options: argparse.Namespace) -> None:
    from .doctor import report

    print(report())


def _config(options: argparse.Namespace, **fields: Any) -> TrainConfig:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vadiff",
        description="Adaptive weighting of noise levels for diffusion and flow training.",
        epilog="`vadiff COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"vadiff {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")

    train = commands.add_parser(
        "train",
        help="train a small model",
        description="Train a small model and print its loss on held-out images per noise level. Writes "
        "metrics.jsonl (one JSON object per line) and checkpoint.pt to the folder --out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.set_defaults(run=_train, parser=train)
    train.add_argument(
        "--preset",
        required=True,
        choices=sorted(PRESETS),
        default=argparse.SUPPRESS,
        help="digits: a U-Net on scikit-learn's handwritten digits, 8 x 8 pixels, EDM preconditioning",
    )
    train.add_argument("--weighting", choices=weighting.available(), default="variance_aware", help="of noise levels")
    _add_training_options(train, out="runs/digits")

    demo = commands.add_parser(
        "demo",
        help="compare three weightings on handwritten digits: pictures and a table",
        description="Train the same small model with constant, loss_level and variance_aware weighting (same "
        "seed, same noise), draw samples, write report.png to the folder --out and print the loss on held-out "
        "images per noise level. Takes minutes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.set_defaults(run=_demo, parser=demo)
    _add_training_options(demo, out="runs/demo")

    doctor = commands.add_parser(
        "doctor",
        help="print versions, devices, backends, what is missing and how to get it",
        description="Print versions, devices, backends, environment variables and optional packages, and how to "
        "get what is missing. Paste it into a bug report.",
    )
    doctor.set_defaults(run=_doctor, parser=doctor)
    return parser


def _add_training_options(parser: argparse.ArgumentParser, out: str) -> None:
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
