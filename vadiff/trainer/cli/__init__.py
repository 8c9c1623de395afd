"""The command `vadiff`: one module per command. Importing it defines the arguments; `run` does the heavy imports."""

from collections.abc import Sequence

import click

from ..._version import __version__
from . import (
    ablate,
    demo,
    diagnose,
    doctor,
    ema,
    encode,
    evaluate,
    import_networks,
    levels,
    optimal_loss,
    report,
    sample,
    train,
    validate,
)
from .command import call, options_of, parse, sections
from .guard import status_of
from .parameters import Options

# Each module has NAME, HELP (one line), DESCRIPTION, EXAMPLES and `run`, the command made of them.
VADIFF = sections(
    "vadiff",
    "Adaptive weighting of noise levels for diffusion and flow training. `vadiff COMMAND --help` explains a command. A "
    "list is written with commas: --sigma-rel 0.05,0.1.",
    {
        "Begin": (demo.run, doctor.run),
        "Train": (train.run, ablate.run, encode.run, import_networks.run),
        "Use a run": (sample.run, ema.run, report.run),
        "Measure": (diagnose.run, validate.run, evaluate.run, optimal_loss.run, levels.COMMAND),
    },
    click.version_option(__version__, message="vadiff %(version)s"),
)


def parse_options(arguments: Sequence[str]) -> Options:
    """The values of a command line, which is not run.

    Raises:
        SystemExit: with status 2 for invalid arguments, with 0 for --help and --version.
    """
    return options_of(parse(VADIFF, arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None reads them from the shell.

    Returns:
        The exit status, see `guard.status_of`.

    Raises:
        SystemExit: with status 2 for invalid arguments, with 0 for --help and --version.
    """
    context = parse(VADIFF, arguments)
    return status_of(lambda: call(context))
