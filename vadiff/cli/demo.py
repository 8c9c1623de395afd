"""`vadiff demo`."""

import argparse

from .train import add_training_options, training_config

NAME = "demo"
HELP = "compare three weightings on handwritten digits: pictures and a table"
DESCRIPTION = (
    "Train the same small model with constant, loss_level and variance_aware weighting (same seed, same noise), draw "
    "samples, write report.png to the folder --out and print the loss on held-out images per noise level. Takes "
    "minutes."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_options(parser, out="runs/demo")


def run(options: argparse.Namespace) -> None:
    from ..report import run_demo

    run_demo(training_config(options), options.out)
