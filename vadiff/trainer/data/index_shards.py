"""Lists the pictures of WebDataset shards, and keeps the list of large ones in the user's cache folder."""

import hashlib
import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...errors import DataError
from ...files import locked, replacing
from ..progress import progress_bar
from .decoding import is_picture
from .index import Index, fingerprint_of
from .labels import NO_LABEL, of_sample
from .members import MEMBER, STORED, Archives, Names, Version

_WORTH_KEEPING = 2**26  # bytes of all shards; fewer are listed in a moment
_MOST_SMALL_BYTES = 2**20  # of the label of one picture
_QUIET = 1.0  # seconds without a progress bar
_LAYOUT = 1  # of a kept list
_BLOCK = 512  # bytes of a tar's header


@dataclass(frozen=True, eq=False)
class _List:
    """The pictures of some shards.

    Attributes:
        versions: of the shards, int64 [S, 2].
        names: of the pictures.
        members: `MEMBER` [N].
        labels: int64 [N].
        left_out: damaged shards, and samples without a picture.
        trouble: what is wrong with the first damaged file; empty: nothing.
    """

    versions: np.ndarray
    names: Names
    members: np.ndarray
    labels: np.ndarray
    left_out: int
    trouble: str


def shards_index(paths: Sequence[Path], *, skip: bool) -> Index:
    """The pictures of shards, in the order in which they are stored.

    Args:
        paths: uncompressed tar files.
        skip: leave out what is damaged: the end of a shard, or a label.

    Raises:
        DataError: a shard is missing, or damaged and not to be skipped.
    """
    versions = [_version(path) for path in paths]
    found = _kept(paths, versions) if sum(version.size for version in versions) >= _WORTH_KEEPING else None
    found = found or _list(paths, versions)
    if found.trouble and not skip:
        raise DataError(found.trouble)
    groups = found.members["archive"].astype(np.int64)
    names = (f"{paths[group].name}/{name}" for group, name in zip(groups.tolist(), found.names, strict=True))
    return Index(
        Archives(paths, versions, found.names, found.members, zipped=False), found.labels,
        'expected a .cls, or "label" in a .json, for each picture',
        fingerprint_of(names, found.members["size"], found.labels), groups=groups, left_out=found.left_out,
    )  # fmt: skip


@dataclass
class _Sample:
    """The files of a shard that have a name in common, up to the first dot."""

    picture: str = ""
    offset: int = 0
    size: int = 0
    label: int = NO_LABEL


@dataclass
class _Shard:
    """What was found in a shard."""

    samples: dict[str, _Sample] = field(default_factory=dict)  # by their key
    damaged: int = 0
    trouble: str = ""

    def add(self, error: DataError) -> None:
        self.trouble = self.trouble or str(error)


def _list(paths: Sequence[Path], versions: Sequence[Version]) -> _List:
    names: list[bytes] = []
    members, labels = [np.empty(0, MEMBER)], [np.empty(0, np.int64)]
    left_out, trouble = 0, ""
    with progress_bar(len(paths), "Pictures in shards", "shard", delay=_QUIET) as bar:
        for number, path in enumerate(paths):
            shard = _shard(path)
            found = [sample for sample in shard.samples.values() if sample.picture]
            names += [sample.picture.encode("utf-8", "surrogateescape") for sample in found]
            fields = [(number, sample.offset, sample.size, sample.size, STORED, 0) for sample in found]
            members.append(np.array(fields, MEMBER))
            labels.append(np.array([sample.label for sample in found], np.int64))
            left_out += len(shard.samples) - len(found) + shard.damaged
            trouble = trouble or shard.trouble
            bar.update()
    return _List(
        np.array(versions, np.int64).reshape(-1, 2), Names(b"".join(names), np.cumsum([0, *map(len, names)])),
        np.concatenate(members), np.concatenate(labels), left_out, trouble,
    )  # fmt: skip


def _shard(path: Path) -> _Shard:
    shard = _Shard()
    try:
        for member, content in _members(path):
            folder, _, base = member.name.rpartition("/")
            key, _, extension = base.partition(".")
            if not key:
                continue  # a hidden file, as macOS adds for each
            sample = shard.samples.setdefault(f"{folder}/{key}", _Sample())
            if is_picture(f"{key}.{extension}") and "." not in extension:
                if not member.isreg() or member.issparse():
                    shard.add(_link(member, path))
                    continue
                sample.picture, sample.offset, sample.size = member.name, member.offset_data, member.size
            elif content is not None:
                try:
                    sample.label = of_sample(content, extension.lower(), f"{member.name} in {path}")
                except DataError as error:
                    shard.add(error)
    except DataError as error:
        shard.add(error)
        shard.damaged = 1
    return shard


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """The files and links of a tar with, if they are labels, their content.

    Raises:
        DataError: the tar is compressed, damaged or cut off, after the members before that place.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            end = os.stat(path).st_size
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                if member.size < 0 or member.offset_data + member.size > end:
                    raise tarfile.ReadError("unexpected end of data")
                if member.isdir():
                    continue
                content = None
                if member.isreg() and member.name.lower().endswith((".cls", ".json")):
                    file = archive.extractfile(member) if member.size <= _MOST_SMALL_BYTES else None
                    content = None if file is None else file.read()
                yield member, content
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)  # a damaged header ends a tar, as the mark at the end does
            if archive.fileobj.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError(f"no file and no end mark at byte {archive.offset:,}, it is damaged or cut off")
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path} cannot be read as an uncompressed tar: {error}. Get it again (unpack a compressed one), or go on "
            "without what is damaged with --on-bad-image skip"
        ) from error


def _link(member: tarfile.TarInfo, path: Path) -> DataError:
    return DataError(
        f"{member.name} in {path} is a link or has holes, expected the picture itself: write the shard with "
        "tar --dereference --hard-dereference"
    )


def _version(path: Path) -> Version:
    try:
        return Version.of(os.stat(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _kept(paths: Sequence[Path], versions: Sequence[Version]) -> _List | None:
    """The list of the shards, from the cache or put there. Of several processes one makes it, the others wait."""
    key = hashlib.sha256("\0".join(os.path.abspath(path) for path in paths).encode("utf-8", "surrogateescape"))
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vadiff" / "shards"
    except RuntimeError:  # no home
        return None
    file = cache / f"{key.hexdigest()[:32]}.npz"
    with ExitStack() as stack:
        with suppress(OSError, ImportError):  # the cache cannot be written, or the system has no such locks
            stack.enter_context(locked(file.with_suffix(".lock")))
        found = _read(file, versions)
        if found is None:
            found = _list(paths, versions)
            with suppress(OSError):
                _write(file, found)
    return found


def _read(file: Path, versions: Sequence[Version]) -> _List | None:
    """The list in a file of the cache; None if there is none, it is damaged, or the shards have changed."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            if int(stored["layout"]) != _LAYOUT or not np.array_equal(stored["versions"], np.array(versions)):
                return None
            return _List(
                stored["versions"], Names(stored["text"].tobytes(), stored["ends"]), stored["members"],
                stored["labels"], int(stored["left_out"]), str(stored["trouble"]),
            )  # fmt: skip
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(file: Path, found: _List) -> None:
    with replacing(file) as partial, partial.open("wb") as opened:
        np.savez(
            opened, layout=_LAYOUT, versions=found.versions, text=np.frombuffer(found.names.text, np.uint8),
            ends=found.names.ends, members=found.members, labels=found.labels, left_out=found.left_out,
            trouble=found.trouble,
        )  # fmt: skip
