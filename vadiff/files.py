"""Atomic replacement of files and folders, errors of the file system, locks between processes, checksums."""

import contextlib
import errno
import glob
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
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

    Raises:
        OSError: it cannot be written; its `filename` is `path`.
    """
    partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
    with writing(path, partial):
        _remove_left_behind(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            if durable:
                flush(partial)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):  # the disk that failed once
                _remove(partial)
            raise


@contextmanager
def writing(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Make the error of a failing write inside the `with` block an OSError that names `path`.

    A write to an open file names no file. `torch.save` turns such an error into a RuntimeError about its own archive.

    Args:
        path: what is written.
        partial: the temporary file or folder that stands for it.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        found = _os_error_behind(error)
        if found is None or not (found.filename is None or _is_within(found.filename, partial)):
            raise
        raise OSError(found.errno, found.strerror, str(path)) from error


def check_writable(path: Path, *, folder: bool, size: int = 0) -> None:
    """Raise unless a file or folder can be written at `path`. Nothing is left there: it is for before long work.

    Args:
        path: it may exist.
        folder: whether it is a folder.
        size: bytes that its disk must have free.

    Raises:
        OSError: it cannot be written; its `filename` is `path`.
    """
    try:
        there = os.stat(path)
    except FileNotFoundError:
        there = None
        if os.path.islink(path):
            raise
    if there is not None and stat.S_ISDIR(there.st_mode) != folder:
        number = errno.ENOTDIR if folder else errno.EISDIR
        raise OSError(number, os.strerror(number), str(path))
    where = path if folder and there is not None else path.parent
    while not os.path.lexists(where):
        where = where.parent
    try:
        with tempfile.TemporaryFile(dir=where, buffering=0) as file:
            file.write(bytes(4096))  # a full disk takes an empty file
    except OSError as error:  # names the temporary file
        if not where.exists():  # a link to nothing
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(where)) from error
        number = errno.EPERM if error.errno in (errno.ENOENT, None) else error.errno  # as in /proc
        raise OSError(number, os.strerror(number), str(path)) from error
    if shutil.disk_usage(where).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def problem(error: OSError) -> str | None:
    """What is wrong with a path, in a sentence that begins with it; None of an error that is not about a path."""
    if error.filename is None or error.errno not in _PROBLEMS:
        return None
    path = os.fsdecode(error.filename)
    if error.errno in (errno.ENOENT, errno.EEXIST) and os.path.islink(path) and not os.path.exists(path):
        return f"{path} is a link to {os.readlink(path)}, which does not exist"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        path = next((str(part) for part in (Path(path), *Path(path).parents) if os.path.isfile(part)), path)
    return f"{path} {_PROBLEMS[error.errno][0]}{reason(error)}"


def reason(error: Exception) -> str:
    """Why a file could not be written, without its name, for a sentence that names it."""
    if not isinstance(error, OSError) or error.errno not in _PROBLEMS:
        return str(error)
    free = _free(os.fsdecode(error.filename)) if error.filename is not None else ""
    return _PROBLEMS[error.errno][1].format(free=free)


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


_WRITE, _USE, _OPEN = "cannot be written: ", "cannot be read or written: ", "cannot be opened: "
_ELSEWHERE = "Free some, or name a folder on another disk"
_PROBLEMS = {  # number of an error → what cannot be done, and why
    errno.ENOSPC: (_WRITE, f"no space left on its disk{{free}}. {_ELSEWHERE}"),
    errno.EDQUOT: (_WRITE, f"the quota on its disk is used up. {_ELSEWHERE}"),
    errno.EFBIG: (_WRITE, "the file is larger than its file system or `ulimit -f` allows"),
    errno.EROFS: (_WRITE, "its file system is read-only. Name a folder on another one"),
    errno.EACCES: (_USE, "permission denied. `ls -ld` of it and of its folder says who may"),
    errno.EPERM: (_USE, "the operation is not permitted. `ls -ld` of it and of its folder says who may"),
    errno.EIO: (_USE, "the disk reports an error. The log of the system (`dmesg`) may say more"),
    errno.ESTALE: (_USE, "the network file system has lost it. Mount it again"),
    errno.ENAMETOOLONG: (_USE, "a name in it, or all of it, is too long for its file system"),
    errno.ELOOP: (_USE, "links in it lead in a circle"),
    errno.EMFILE: (_OPEN, "this process has too many files open. `ulimit -n` shows and raises the limit"),
    errno.EISDIR: ("", "is a folder, expected a file"),
    errno.ENOTDIR: ("", "is a file, expected a folder"),
    errno.EEXIST: ("", "is a file, expected a folder"),
    errno.ENOENT: ("", "does not exist, or was removed meanwhile"),
}


def _os_error_behind(error: BaseException | None) -> OSError | None:
    """The error itself, or the last OSError while which it was raised, with a number."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None


def _is_within(name: str | bytes, folder: Path | None) -> bool:
    return folder is not None and Path(os.fsdecode(name)).is_relative_to(folder)


def _free(path: str) -> str:
    """Free and total space of the disk of a path, in brackets, after a half-written file was removed."""
    with contextlib.suppress(OSError):
        there = next(part for part in (Path(path), *Path(path).absolute().parents) if part.exists())
        space = shutil.disk_usage(there)
        return f" ({space.free / 1e6:,.1f} of {space.total / 1e6:,.1f} MB are free without it)"
    return ""


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
