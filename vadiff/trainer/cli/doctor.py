"""`vadiff doctor`."""

import argparse

NAME = "doctor"
HELP = "print versions, devices, backends, what is missing and how to get it"
DESCRIPTION = (
    "Print versions, devices, backends, environment variables and optional packages, and how to get what is missing. "
    "Paste it into a bug report."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(options: argparse.Namespace) -> None:
    from ..doctor import report

    print(report())
