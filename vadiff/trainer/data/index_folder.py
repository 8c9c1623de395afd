"""Lists the pictures of a folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...errors import DataError
from ..progress import progress_bar
from .decoding import is_picture
from .index import Index, fingerprint_of
from .labels import LABELS, MOST_LABEL_BYTES, from_folders, from_json
from .members import Files, Names

_QUIET = 1.0  # seconds without a progress bar


def folder_index(path: Path) -> Index:
    """The pictures below a folder, in the order of their names; classes from dataset.json or the top folders.

    Raises:
        DataError: a folder cannot be read, or dataset.json is damaged.
    """
    found = []
    with progress_bar(None, f"Pictures in {path}", " files", delay=_QUIET) as bar:
        for one in _files(path):
            found.append(one)
            bar.update()
    found.sort()
    sizes = np.array([size for _, size in found], dtype=np.int64)
    names = Names.of(["/".join(parts) for parts, _ in found])
    listed = path / LABELS
    if listed.is_file():
        with listed.open("rb") as file:
            content = file.read(min(os.fstat(file.fileno()).st_size, MOST_LABEL_BYTES + 1))
        labels = from_json(content, names, str(listed))
    else:
        labels = from_folders(names)
    wanted = f"expected a folder for each class, or {LABELS}"
    return Index(Files(path, names), labels, wanted, fingerprint_of(names, sizes, labels))


def _files(folder: Path | str, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """Parts of the name, and bytes, of each picture. Links are followed, but not to a folder around the link."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                parts = (*above, entry.name)
                if entry.is_dir():
                    if not (entry.is_symlink() and _is_within(entry.path, os.path.realpath(entry.path))):
                        yield from _files(entry.path, parts)
                elif is_picture(entry.name) and entry.is_file():
                    yield parts, entry.stat().st_size
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be read: {error}") from error


def _is_within(path: str, folder: str) -> bool:
    parent = os.path.realpath(os.path.dirname(path))
    return os.path.commonpath([parent, folder]) == folder
