"""Atomic replacement of files and folders, locks between processes, checksums."""

import contextlib
import glob
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LEFT_BEHIND = 24 * 3600.0  # seconds without a change, after which a temporary file is taken for a killed process's


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to, which replaces `path` when the `with` block ends.

    After an error, or when the process is killed, `path` is unchanged. Several processes may write the same path: each
    has a temporary path of its own, and the last one to end replaces what the others wrote. A temporary file or folder
    that a killed process left is removed by the first call with the same path a day later.

    Args:
        path: the file or folder; its parent is created.
        durable: flush the file to disk before renaming it, so that a power loss leaves the old or the new one.
    """
    _remove_left_behind(path)
    partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if durable:
            flush(partial)
        os.replace(partial, path)
    except BaseException:
        _remove(partial)
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process or thread holds the lock of this name, and hold it. A killed process holds none.

    On a file system without locks it does not wait.

    Args:
        path: an empty file, which is made and stays; its parent is created.
    """
    import fcntl  # not on Windows, where the rest of this module is needed too

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256_of(path: Path) -> str:
    """SHA-256 of the content of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """fsync the content of a file, or the entries of a folder, so that they survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_left_behind(path: Path) -> None:
    for partial in path.parent.glob(f"{glob.escape(path.name)}.partial-{'[0-9a-f]' * 8}"):
        with contextlib.suppress(OSError):  # its process has just ended, or another call removes it too
            if time.time() - partial.stat().st_mtime > _LEFT_BEHIND:
                _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
