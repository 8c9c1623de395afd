"""Progress bars of measurements."""

import sys
from typing import Any

from ...extras import import_extra

_PIPE_SECONDS = 30.0  # between two states of a bar that is written to a file or pipe


def progress_bar(total: int, what: str, unit: str) -> Any:
    """A tqdm bar, also where stderr is not a terminal: there a state every half minute.

    Raises:
        MissingExtraError: tqdm is not installed.
    """
    interval = 0.1 if sys.stderr.isatty() else _PIPE_SECONDS
    return import_extra("tqdm", "train").tqdm(total=total, desc=what, unit=unit, mininterval=interval)
