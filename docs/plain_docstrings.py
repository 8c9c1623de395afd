"""Docstrings are plain text: in them ** is a power, not emphasis in Markdown. For mkdocs.yml."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class PlainDocstrings(Extension):
    """Escapes asterisks outside of code; `Example:` is what Google's style calls `Examples:`."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            lines = obj.docstring.value.splitlines()
            obj.docstring.value = "\n".join(map(as_markdown, lines))


def as_markdown(line: str) -> str:
    """A line of a docstring.

    >>> as_markdown("a**2, `b**2`")
    'a\\\\*\\\\*2, `b**2`'
    """
    if line.strip() == "Example:":
        return line.replace("Example:", "Examples:")
    if line.lstrip().startswith(">>>"):
        return line
    parts = re.split("(`+[^`]*`+)", line)
    return "".join(part if part.startswith("`") else part.replace("*", r"\*") for part in parts)
