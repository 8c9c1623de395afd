"""The progress bar of every command: a bar in a terminal, a line every half minute in a file or pipe."""

import sys
from typing import Any, TextIO

from ..extras import import_extra

PIPE_SECONDS = 30.0  # between two lines that are written to a file or pipe


def progress_bar(
    total: int | None,
    what: str,
    unit: str,
    *,
    initial: int = 0,
    scaled: bool = False,
    shown: bool = True,
    delay: float = 0.0,
) -> Any:
    """A tqdm bar on stderr. Where stderr is not a terminal, a line of text every half minute and at the end.

    Work that ends within the first half minute writes no line to a pipe. Set the text behind the bar by
    `bar.set_postfix_str(text, refresh=False)`: it is shown with the next state.

    Args:
        total: number of units of work; None if it is not known.
        what: name of the work, shown in front.
        unit: of the work, such as "image".
        initial: units that were done before.
        scaled: write large numbers as 1.2k or 3.4M.
        shown: False for a bar that shows nothing.
        delay: seconds after which a terminal shows it, for work that mostly takes less.

    Raises:
        MissingExtraError: tqdm is not installed.
    """
    tqdm = import_extra("tqdm", "train").tqdm
    options = {"total": total, "desc": what, "unit": unit, "initial": initial, "unit_scale": scaled}
    if not shown:
        return tqdm(**options, disable=True)
    if sys.stderr.isatty():
        return tqdm(**options, delay=delay)
    # miniters 0: look at the clock at each update. position 0: no line feeds that move between nested bars.
    lines = {"mininterval": PIPE_SECONDS, "delay": PIPE_SECONDS, "miniters": 0, "position": 0, "ncols": 0}
    return tqdm(**options, **lines, file=_Lines(sys.stderr))


class _Lines:
    """A text file in which each state of a tqdm bar is a line: tqdm goes back to the start of the line instead."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if state := text.strip("\r\n "):
            self._file.write(state + "\n")

    def flush(self) -> None:
        self._file.flush()
