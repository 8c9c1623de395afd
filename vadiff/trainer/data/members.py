"""The files in which the pictures of a data set are: read one at a time, in any order, from any process."""

import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ...errors import DataError
from .decoding import MOST_BYTES

STORED, DEFLATED = 0, 8  # compression methods of zip
_MOST_OPEN = 64  # files
_LOCAL_HEADER = 30  # bytes of a zip's member before its name

MEMBER = np.dtype(
    [
        ("archive", np.int32),  # number of the archive
        ("offset", np.int64),  # of the content in a tar, of the header in a zip
        ("stored", np.int64),  # bytes in the archive
        ("size", np.int64),  # bytes of the content
        ("method", np.uint8),  # compression: STORED or DEFLATED
        ("checksum", np.uint32),  # CRC-32 of the content, in a zip
    ]
)
"""Where a picture is in an archive."""


class Names:
    """Many names in two arrays: a list of a million strings would be copied into every process that reads."""

    def __init__(self, text: bytes, ends: np.ndarray) -> None:
        self.text, self.ends = text, ends  # of all names, one after the other; int64 [N + 1]

    @classmethod
    def of(cls, names: Sequence[str]) -> "Names":
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        return cls(b"".join(encoded), np.cumsum([0, *map(len, encoded)]))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, place: int) -> str:
        return self.text[self.ends[place] : self.ends[place + 1]].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


class Container(Protocol):
    """Encoded pictures, by number."""

    def name(self, place: int) -> str:
        """What an error calls the picture."""

    def content(self, place: int) -> bytes:
        """The encoded picture.

        Raises:
            DataError: it cannot be read.
        """


class Files:
    """Pictures in files of their own below a folder."""

    def __init__(self, folder: Path, names: Names) -> None:
        self._folder, self._names = str(folder), names

    def name(self, place: int) -> str:
        return os.path.join(self._folder, self._names[place])

    def content(self, place: int) -> bytes:
        try:
            with open(self.name(place), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                content = file.read(size) if size <= MOST_BYTES else b""
        except OSError as error:
            raise DataError(f"{self.name(place)} cannot be read: {error}") from error
        if size > MOST_BYTES:
            raise DataError(f"{self.name(place)} has {size:,} bytes, expected a picture of at most {MOST_BYTES:,}")
        return content


class Version(NamedTuple):
    """Of a file: another one if it was written again."""

    size: int
    modified: int  # nanoseconds

    @classmethod
    def of(cls, status: os.stat_result) -> "Version":
        return cls(status.st_size, status.st_mtime_ns)


class Archives:
    """Pictures in zip or tar files, read by their offset; nothing is written to the disk.

    A process opens an archive when it first reads from it, and has at most 64 open. One thread reads at a time.

    Args:
        paths: of the archives.
        versions: of these, when their members were listed.
        names: of the members.
        members: `MEMBER` [N].
        zipped: whether they are zip files, whose members begin with a header and have a checksum.
    """

    def __init__(
        self, paths: Sequence[Path], versions: Sequence[Version], names: Names, members: np.ndarray, *, zipped: bool
    ) -> None:
        self._paths, self._versions = [str(path) for path in paths], list(versions)
        self._names, self._members, self._zipped = names, members, zipped
        self._open: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # descriptors are of this process

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def name(self, place: int) -> str:
        return f"{self._names[place]} in {self._paths[self._members['archive'][place]]}"

    def content(self, place: int) -> bytes:
        archive, offset, stored, size, method, checksum = self._members[place].tolist()
        if max(stored, size) > MOST_BYTES:
            raise DataError(
                f"{self.name(place)} has {max(stored, size):,} bytes, expected a picture of at most {MOST_BYTES:,}"
            )
        try:
            descriptor = self._descriptor(archive)
            if self._zipped:
                header = os.pread(descriptor, _LOCAL_HEADER, offset)
                if len(header) < _LOCAL_HEADER or header[:4] != b"PK\3\4":
                    raise ValueError("its header is damaged")
                name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))  # their lengths
                offset += _LOCAL_HEADER + name + extra
            content = os.pread(descriptor, stored, offset)
            if len(content) < stored:
                raise ValueError(f"the archive ends {stored - len(content):,} bytes early")
            if method == DEFLATED:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
            if len(content) != size:
                raise ValueError(f"it unpacks to another size than the {size:,} bytes that the archive says")
            if self._zipped and zlib.crc32(content) != checksum:
                raise ValueError("its checksum is wrong")
        except (OSError, ValueError, zlib.error) as error:
            raise DataError(f"{self.name(place)} cannot be read: {error}. Get the archive again") from error
        return content

    def _descriptor(self, archive: int) -> int:
        if archive not in self._open:
            if len(self._open) >= _MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[archive] = os.open(self._paths[archive], os.O_RDONLY)
        if Version.of(os.fstat(self._open[archive])) != self._versions[archive]:
            raise ValueError("the archive has changed since its pictures were listed")
        return self._open[archive]
