"""What a command says at its end: what to type next, in lines that can be copied."""

import shlex
from collections.abc import Sequence
from pathlib import Path


def next_steps(*commands: Sequence[str | Path]) -> str:
    """Commands of `vadiff`, one on a line, quoted for a shell.

    Args:
        commands: the arguments after `vadiff` of each.
    """
    return "\n".join(["Next:", *(f"  {command_line(*command)}" for command in commands)])


def command_line(*arguments: str | Path) -> str:
    """A command of `vadiff` with these arguments, quoted for a shell."""
    return shlex.join(["vadiff", *map(str, arguments)])
