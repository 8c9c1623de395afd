"""Atomic replacement of files and folders."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to, which replaces `path` when the `with` block ends.

    After an error, or when the process is killed, `path` is unchanged. The next call with the same path removes the
    temporary file or folder that a killed process left.

    Args:
        path: the file or folder; its parent is created.
        durable: flush the file to disk before renaming it, so that a power loss leaves the old or the new one.
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
    """fsync the content of a file, or the entries of a folder, so that they survive a power loss."""
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
