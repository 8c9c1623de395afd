"""Run a trainer of networks of sd-scripts or musubi-tuner with adaptive weights, without a change of its file.

accelerate launch -m vadiff.integrations.kohya sdxl_train_network.py --vadiff_weighting loss_level ...
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from pathlib import Path
from types import CodeType
from typing import Any

from .arguments import add_arguments
from .base import Adaptive
from .trainer import AdaptiveLoss, MusubiAdaptiveLoss

_USAGE = "python -m vadiff.integrations.kohya SCRIPT [options of the script] [--vadiff_... options]"


def main(arguments: list[str]) -> Any:
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
    names, namespace = block.co_names, vars(module)
    if "main" in names:  # of musubi-tuner, where scripts import it
        names, namespace = module.main.__code__.co_names, module.main.__globals__
    trainer = _trainer_of(script, names, namespace)
    parser = next(name for name in names if name in ("setup_parser", "setup_parser_common"))
    made: list[Any] = []
    own_parser = namespace[parser]

    def make() -> Any:
        made.append(trainer())
        return made[-1]

    def extended_parser() -> argparse.ArgumentParser:
        return add_arguments(own_parser())

    sys.argv = arguments
    replaced = {parser: extended_parser, trainer.__name__: make}
    kept = {name: namespace[name] for name in replaced}
    namespace.update(replaced)
    try:
        exec(block, {**vars(module), **replaced, "__name__": "__main__"})
    finally:
        namespace.update(kept)
    return made[-1]


class _Launched(Adaptive):
    """Errors of the options are those of the command line."""

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
    sys.exit(f'{script} has no block `if __name__ == "__main__"`, expected a script of sd-scripts or musubi-tuner')


def _trainer_of(script: Path, names: tuple[str, ...], namespace: dict[str, Any]) -> type:
    """The class of trainer that the script makes, with the mixin for it."""
    for name in names:
        found = namespace.get(name)
        for mixin in (AdaptiveLoss, MusubiAdaptiveLoss):
            if isinstance(found, type) and hasattr(found, mixin._hook):
                try:
                    return type(name, (_Launched, mixin, found), {"__module__": found.__module__})
                except TypeError as error:
                    sys.exit(f"{script}: {error}")
    sys.exit(
        f"{script} makes no trainer with a method post_process_loss or compute_loss, expected a script "
        "*train_network.py. For the other scripts, see the line to insert in docs/trainers/kohya.md"
    )


if __name__ == "__main__":
    print(main(sys.argv[1:]).criterion.summary())
