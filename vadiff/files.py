"""Files and folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields where to write a file or a folder that takes the place of `path` when the `with` block ends.

    After an error, or when the process is killed, what stood at `path` is as it was. What a killed process left
    half-written is removed by the next one that writes the same file.

    Args:
        path: the file or folder; its parent is made.
        durable: flush the file to the disk before it is renamed: a loss of power leaves the old or the new one.
    """
    partial = path.with_name(path.name + ".partial")
    _remove(partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if durable:
            flush(partial)
        os.replace(partial, path)
    except BaseException:
        _remove(partial)
        raise


def flush(path: Path) -> None:
    """Make what was written to a file, or created and renamed in a folder, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
