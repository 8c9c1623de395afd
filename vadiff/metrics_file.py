"""A log of numbers as JSON lines, for loops without an experiment tracker."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

_START = b'{"step": '  # of each line


class MetricsFile:
    """Writes the numbers of a training to a file, one JSON object per line, and reads them again.

    `criterion.log_to(metrics_file, step)` writes to it, with the criterion's weighting, target and verdict as text;
    `log` adds numbers of your own; `vadiff report --from-log FILE` makes a page of the file.

    The file is only ever appended to, a whole line at a time, so that several processes of one machine may write to it.
    A killed process leaves at most one incomplete line, which is ignored when the file is read. Nothing is flushed to
    the disk itself: a power loss may cost the last lines.

    Lines of one step are read as one, the last value of each name counting. A name that is logged at a step below its
    last one means that the training was resumed there: the earlier values of that name at later steps are left out
    when the file is read, and stay in the file. Other names keep theirs.

    Args:
        path: the file; it is made, with its folder, by the first line.

    Example:
        >>> file = vadiff.MetricsFile("runs/mine/metrics.jsonl")
        >>> file.log({"loss": 0.25}, step=100)
        >>> file.read()
        [{'step': 100, 'loss': 0.25}]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Append a line.

        Args:
            values: name → a number, a tensor of one element, or text. NaN and infinities become null.
            step: optimiser steps so far.

        Raises:
            TypeError: step is not an integer, or a value is none of these; nothing is written then.
            ValueError: a value is named "step", or the file holds something else than such lines.
        """
        if not isinstance(step, numbers.Integral) or isinstance(step, bool):
            raise TypeError(f"step is {step!r}, expected an integer: the number of optimiser steps")
        if "step" in values:
            raise ValueError('values has the name "step", which is that of the step itself')
        line = json.dumps({"step": int(step), **{str(name): _plain(name, value) for name, value in values.items()}})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:
            file.seek(0)
            if not _START.startswith(start := file.read(len(_START))):
                raise ValueError(f"{self.path} begins with {start!r}, expected a file of vadiff.MetricsFile, or none")
            file.write((b"\n" if _ends_within_a_line(file) else b"") + line.encode() + b"\n")

    def read(self) -> list[dict[str, Any]]:
        """The values of each step, ascending: {"step": ..., name: value}, None for what was not finite.

        Raises:
            FileNotFoundError: there is no file.
            ValueError: a line is not a JSON object with a step.
        """
        found: dict[int, dict[str, Any]] = {}
        last: dict[str, int] = {}  # step at which each name was logged last
        for number, line in json_lines(self.path, cut_off=_START):
            step = line.pop("step", None) if isinstance(line, dict) else None
            if not isinstance(step, int) or isinstance(step, bool):
                raise ValueError(f"{self.path}, line {number}: expected a JSON object with an integer step")
            resumed = {name for name in line if last.get(name, step) > step}
            for later in [other for other in found if resumed and other > step]:
                found[later] = {name: value for name, value in found[later].items() if name not in resumed}
            found.setdefault(step, {}).update(line)
            last.update(dict.fromkeys(line, step))
        return [{"step": step, **values} for step, values in sorted(found.items()) if values]


def json_lines(path: Path, cut_off: bytes | None = None) -> Iterator[tuple[int, Any]]:
    """Number and content of each line of a file of JSON lines.

    Blank lines, and an incomplete last line, left by a killed process, are ignored.

    Args:
        path: the file.
        cut_off: ignore other lines that are not JSON too if they begin so, as the incomplete lines of earlier
            processes do in a file that is only appended to.

    Raises:
        ValueError: a line is not JSON; the message names file and line.
    """
    content = path.read_bytes()
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            if cut_off is not None and (line.startswith(cut_off) or cut_off.startswith(line)):
                continue
            raise ValueError(f"{path}, line {number}: {error}") from error
        yield number, found


def finite(value: Any) -> Any:
    """`value`, a number or nested mappings and sequences of them, with None for NaN and infinities."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(name: Any, value: Any) -> float | str | None:
    if isinstance(value, str):
        return value
    try:
        number: float | None = finite(float(value.item() if hasattr(value, "item") else value))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # RuntimeError: torch, of several elements
        shown = "an integer beyond 1e308" if isinstance(error, OverflowError) else repr(value)
        raise TypeError(f"{name} is {shown}, expected a number, a tensor of one element or text") from error
    return number


def _ends_within_a_line(file: BinaryIO) -> bool:
    """Whether a file ends within a line, which a killed process left."""
    return file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n"
