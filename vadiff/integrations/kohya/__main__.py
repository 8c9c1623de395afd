"""Run one of sd-scripts' trainers of networks with adaptive weights, without a change of its file.

accelerate launch -m vadiff.integrations.kohya sdxl_train_network.py --vadiff_weighting loss_level ...
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from .arguments import add_arguments
from .trainer import AdaptiveLoss

_USAGE = "python -m vadiff.integrations.kohya SCRIPT [options of the script] [--vadiff_... options]"


def main(arguments: list[str]) -> AdaptiveLoss:
    """Run a script's `if __name__ == "__main__"` block with its trainer, and its parser, extended.

    Args:
        arguments: the script's path, then its own arguments.

    Returns:
        The trainer, after training.

    Raises:
        SystemExit: not such a script; the message says why.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit(f"usage: {_USAGE}\nSCRIPT --help lists the options of both.")
    script = Path(arguments[0])
    if not script.is_file():
        sys.exit(f"SCRIPT is {arguments[0]!r}, which is not a file. Usage: {_USAGE}")
    block = _main_block(script)
    sys.path.insert(0, str(script.resolve().parent))
    module = importlib.import_module(script.stem)  # importable, so that workers can unpickle what it defines
    trainer = _trainer_of(module, block)
    name = trainer.__name__
    adaptive = type(name, (_Launched, trainer), {"__module__": module.__name__})
    made: list[AdaptiveLoss] = []

    def make(*given: Any, **options: Any) -> AdaptiveLoss:
        made.append(adaptive(*given, **options))
        return made[-1]

    def parser() -> argparse.ArgumentParser:
        return add_arguments(module.setup_parser())

    sys.argv = arguments
    exec(block, {**vars(module), "__name__": "__main__", "setup_parser": parser, name: make})
    return made[-1]


class _Launched(AdaptiveLoss):
    """The mixin, whose errors are those of the command line."""

    def _read_options(self, args: Any) -> None:
        try:
            super()._read_options(args)
        except (TypeError, ValueError) as error:
            sys.exit(f"vadiff: {error}")


def _main_block(script: Path) -> CodeType:
    """The code under a script's `if __name__ == "__main__"`."""
    for node in ast.parse(script.read_bytes()).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            return compile(ast.Module(node.body, type_ignores=[]), str(script), "exec")
    sys.exit(f'{script} has no block `if __name__ == "__main__"`, expected a script of sd-scripts')


def _trainer_of(module: ModuleType, block: CodeType) -> type:
    """The class of trainer that the block makes."""
    for name in block.co_names:
        found = getattr(module, name, None)
        if isinstance(found, type) and hasattr(found, "post_process_loss") and hasattr(module, "setup_parser"):
            return found
    sys.exit(
        f"{module.__name__} has no trainer with the method post_process_loss, expected a script *train_network.py of "
        "sd-scripts. For the other scripts, see the line to change in docs/trainers/kohya.md"
    )


if __name__ == "__main__":
    print(main(sys.argv[1:]).criterion.summary())
