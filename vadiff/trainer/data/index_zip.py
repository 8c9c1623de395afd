"""Lists the pictures of a zip."""

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

from ...errors import DataError
from ..progress import progress_bar
from .decoding import is_picture
from .index import Index, fingerprint_of
from .labels import LABELS, MOST_LABEL_BYTES, from_folders, from_json
from .members import DEFLATED, MEMBER, STORED, Archives, Names, Version

_BROKEN = (
    zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, OverflowError, RuntimeError, ValueError,
)  # fmt: skip
_LARGE = 2**30  # bytes from which listing takes seconds


def zip_index(path: Path) -> Index:
    """The pictures of a zip, in the order of their names; classes from dataset.json or the top folders.

    Raises:
        DataError: the zip or its dataset.json is damaged, or pictures are encrypted or compressed in a rare way.
    """
    try:
        version = Version.of(os.stat(path))
        shown = os.path.getsize(path) > _LARGE
        with progress_bar(None, f"Pictures in {path}", " files", shown=shown) as bar, zipfile.ZipFile(path) as archive:
            listed = _listed(archive)
            found = [info for info in archive.infolist() if not info.is_dir() and is_picture(info.filename)]
            bar.update(len(found))
            found.sort(key=lambda info: info.filename.split("/"))
            for info in found:
                if info.flag_bits & 1 or info.compress_type not in (STORED, DEFLATED):
                    raise DataError(
                        f"{info.filename} in {path} is encrypted or compressed by another method than deflate: write "
                        "the zip without compression"
                    )
            fields = [
                (0, info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
                for info in found
            ]
            members = np.array(fields, dtype=MEMBER)
            names = Names.of([info.filename for info in found])
    except _BROKEN as error:
        raise DataError(f"{path} cannot be read as a zip: {error}. Get it again") from error
    labels = from_folders(names) if listed is None else from_json(listed, names, f"{LABELS} in {path}")
    wanted = f"expected a folder for each class, or {LABELS}"
    container = Archives([path], [version], names, members, zipped=True)
    return Index(container, labels, wanted, fingerprint_of(names, members["size"], labels))


def _listed(archive: zipfile.ZipFile) -> bytes | None:
    """The content of dataset.json, if there is one."""
    try:
        info = archive.getinfo(LABELS)
    except KeyError:
        return None
    with archive.open(info) as file:
        return file.read(MOST_LABEL_BYTES + 1)
