"""A log of numbers as JSON lines, for loops without an experiment tracker."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class MetricsFile:
    """Writes the numbers of a training to a file, one JSON object per line, and reads them again.

    `criterion.log_to(metrics_file, step)` writes to it; `log` adds numbers of your own; `vadiff report --from-log FILE`
    makes a page of the file.

    The file is only ever appended to. A line is written in one piece, so that a killed process leaves at most an
    incomplete last line, which is ignored and removed by the next process that writes. Nothing is flushed to the disk
    itself: a power loss may cost the last lines.

    Lines of one step are read as one, the last value of each name counting. A step below the one before it means that
    the training was resumed there: the earlier lines of later steps are then left out, and stay in the file. Log from
    one process.

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
            values: name → a number, or a tensor of one element. NaN and infinities become null.
            step: optimiser steps so far.

        Raises:
            TypeError: step is not an integer, or a value is not a number; nothing is written then.
            ValueError: a value is named "step".
        """
        if not isinstance(step, numbers.Integral) or isinstance(step, bool):
            raise TypeError(f"step is {step!r}, expected an integer: the number of optimiser steps")
        if "step" in values:
            raise ValueError('values has the name "step", which is that of the step itself')
        line = json.dumps({"step": int(step), **{str(name): _number(name, value) for name, value in values.items()}})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut_incomplete_line(self.path)
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode() + b"\n")

    def read(self) -> list[dict[str, Any]]:
        """The numbers of each step, ascending: {"step": ..., name: value}, None for what was not finite.

        Raises:
            FileNotFoundError: there is no file.
            ValueError: a line is not a JSON object with a step.
        """
        found: list[dict[str, Any]] = []
        for number, line in enumerate(json_lines(self.path), start=1):
            step = line.get("step") if isinstance(line, dict) else None
            if not isinstance(step, int):
                raise ValueError(f"{self.path}, line {number}: expected a JSON object with an integer step")
            while found and found[-1]["step"] > step:
                found.pop()
            if found and found[-1]["step"] == step:
                found[-1].update(line)
            else:
                found.append(line)
        return found


def json_lines(path: Path) -> list[Any]:
    """The content of each line of a file of JSON lines; an incomplete last line, left by a killed process, is ignored.

    Raises:
        ValueError: a line is not JSON; the message names file and line.
    """
    content = path.read_bytes()
    found = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return found


def finite(value: Any) -> Any:
    """`value`, a number or nested mappings and sequences of them, with None for NaN and infinities."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(name: Any, value: Any) -> float | None:
    try:
        if isinstance(value, str):
            raise TypeError("a string")
        number: float | None = finite(float(value.item() if hasattr(value, "item") else value))
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises RuntimeError for several elements
        raise TypeError(f"{name} is {value!r}, expected a number or a tensor of one element") from error
    return number


def _cut_incomplete_line(path: Path) -> None:
    """Remove what stands after the last newline."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
