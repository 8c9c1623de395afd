"""Docstrings are plain text: ** is a power and J* a name, where Markdown sees emphasis. Used by mkdocs.yml."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class PlainDocstrings(Extension):
    """Escapes asterisks outside of code."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            lines = obj.docstring.value.splitlines()
            obj.docstring.value = "\n".join(
                line if line.lstrip().startswith(">>>") else escaped(line) for line in lines
            )


def escaped(line: str) -> str:
    """Asterisks with a backslash in front, but between backticks.

    >>> escaped("a**2, `b**2`")
    'a\\\\*\\\\*2, `b**2`'
    """
    parts = re.split("(`+[^`]*`+)", line)
    return "".join(part if part.startswith("`") else part.replace("*", r"\*") for part in parts)
