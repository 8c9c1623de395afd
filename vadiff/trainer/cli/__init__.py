"""The command `vadiff`: one module per command. Importing it defines the arguments; `run` does the heavy imports."""

import argparse
from collections.abc import Sequence

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
from .guard import status_of

# Each module has NAME, HELP (one line), DESCRIPTION, add_arguments(parser) and run(options).
COMMANDS = (
    train, validate, diagnose, ema, sample, evaluate, import_networks, report, ablate, optimal_loss, levels, encode,
    demo, doctor,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None reads them from the shell.

    Returns:
        The exit status, see `guard.status_of`.

    Raises:
        SystemExit: with status 2 for invalid arguments, with 0 for --help and --version.
    """
    options = _parser().parse_args(arguments)
    return status_of(lambda: options.run(options))


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults except `(default: None)`: the help texts of these arguments say what happens without them."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vadiff",
        description="Adaptive weighting of noise levels for diffusion and flow training.",
        epilog="`vadiff COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"vadiff {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.NAME,
            help=command.HELP,
            description=command.DESCRIPTION,
            formatter_class=_HelpFormatter,
        )
        subparser.set_defaults(run=command.run, parser=subparser)
        command.add_arguments(subparser)
    return parser
