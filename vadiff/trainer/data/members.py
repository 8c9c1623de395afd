"""The files in which the pictures of a data set are: read one at a time, in any order, from any process."""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...errors import DataError
from .decoding import MOST_BYTES

STORED, DEFLATED = 0, 8  # compression methods of zip
_MOST_OPEN = 64  # files
_LOCAL_HEADER = 30  # bytes of a zip's member before its name


class Names:
    """Many names in two arrays: a list of a million strings would be copied into every process that reads."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._text = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __getitem__(self, place: int) -> str:
        start, end = self._ends[place], self._ends[place + 1]
        return self._text[start:end].decode("utf-8", "surrogateescape")


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

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder, self._names = folder, Names(names)

    def name(self, place: int) -> str:
        return str(self._folder / self._names[place])

    def content(self, place: int) -> bytes:
        try:
            with open(self.name(place), "rb") as file:
                content = file.read(MOST_BYTES + 1)
        except OSError as error:
            raise DataError(f"{self.name(place)} cannot be read: {error}") from error
        if len(content) > MOST_BYTES:
            raise DataError(f"{self.name(place)} has more than {MOST_BYTES:,} bytes, expected a picture")
        return content


@dataclass
class Member:
    """Where a picture is in an archive."""

    name: str
    archive: int  # number of the archive
    offset: int  # of its content in a tar, of its header in a zip
    stored: int  # bytes in the archive
    size: int  # bytes of the content
    method: int = STORED
    checksum: int = -1  # CRC-32; -1: none


class Archives:
    """Pictures in zip or tar files, read by their offset; nothing is written to the disk.

    Args:
        paths: of the archives.
        members: of all of them.
        zipped: whether they are zip files, whose members begin with a header.
    """

    def __init__(self, paths: Sequence[Path], members: Sequence[Member], *, zipped: bool) -> None:
        self._paths, self._zipped = [str(path) for path in paths], zipped
        self._seen = [_version(os.stat(path)) for path in self._paths]
        self._names = Names([member.name for member in members])
        fields = [(each.archive, each.offset, each.stored, each.size, each.method, each.checksum) for each in members]
        self._fields = np.array(fields, dtype=np.int64).reshape(-1, 6)
        self._open: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # descriptors are of this process

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def name(self, place: int) -> str:
        return f"{self._names[place]} in {self._paths[self._fields[place, 0]]}"

    def content(self, place: int) -> bytes:
        archive, offset, stored, size, method, checksum = self._fields[place].tolist()
        if max(stored, size) > MOST_BYTES:
            raise DataError(f"{self.name(place)} has {max(stored, size):,} bytes, expected a picture of {MOST_BYTES:,}")
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
            if checksum >= 0 and zlib.crc32(content) != checksum:
                raise ValueError("its checksum is wrong")
        except (OSError, ValueError, zlib.error) as error:
            raise DataError(f"{self.name(place)} cannot be read: {error}. Get the archive again") from error
        return content

    def _descriptor(self, archive: int) -> int:
        if archive not in self._open:
            if len(self._open) >= _MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = os.open(self._paths[archive], os.O_RDONLY)
            self._open[archive] = descriptor
            if _version(os.fstat(descriptor)) != self._seen[archive]:
                raise ValueError("the archive has changed since this run began")
        return self._open[archive]


def _version(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
