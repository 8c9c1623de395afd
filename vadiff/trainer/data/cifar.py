"""CIFAR-10 and CIFAR-100 in their official layouts, from a folder, an archive, an archive in parts, or downloaded.

Source: Krizhevsky, Learning multiple layers of features from tiny images (2009); layouts and MD5 sums as on
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ...extras import import_extra
from .images import Images, hold_out_last
from .pickled_arrays import UnsafePickleError, load_arrays

_URL = "https://www.cs.toronto.edu/~kriz/"
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32

Reader = Callable[[str], bytes | None]
"""Returns the content of a file by its name, or None if there is no such file."""


@dataclass(frozen=True)
class Layout:
    """Files and sizes of one of the two data sets."""

    classes: int
    archives: dict[str, str]  # name → MD5
    binary_train: tuple[str, ...]  # files of records: label bytes, then pixels, channels first
    binary_test: str
    label_bytes: int  # the last of them is the class
    python_train: tuple[str, ...]  # pickled mappings: b"data" uint8 [n, 3072], and labels
    python_test: str
    python_labels: bytes
    train_per_file: int
    test_images: int


LAYOUTS = {
    "cifar10": Layout(
        classes=10,
        archives={
            "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
            "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
        },
        binary_train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        binary_test="test_batch.bin",
        label_bytes=1,
        python_train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        python_test="test_batch",
        python_labels=b"labels",
        train_per_file=10_000,
        test_images=10_000,
    ),
    "cifar100": Layout(
        classes=100,
        archives={
            "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
            "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
        },
        binary_train=("train.bin",),
        binary_test="test.bin",
        label_bytes=2,  # the coarse class, then the fine one
        python_train=("train",),
        python_test="test",
        python_labels=b"fine_labels",
        train_per_file=50_000,
        test_images=10_000,
    ),
}


def load(name: str, path: Path | None = None) -> Images:
    """CIFAR-10 or CIFAR-100.

    Args:
        name: "cifar10" or "cifar100".
        path: an official tar.gz, in the binary or the python layout; a folder with the files of one, or with folders
            that hold them, as what it unpacks to; or a folder with an archive cut into parts, for machines that take
            no file of its size: `split -b 48M cifar-10-python.tar.gz cifar-10-python.tar.gz.`, joined in the order of
            their names. None downloads the binary archive once, to the user's cache.

    Returns:
        The 50,000 training images; held out are the 10,000 test images or, if their file is missing, the last 5,000
        training images.

    Raises:
        DataError: a file is missing, truncated or corrupt, or an archive has the wrong checksum.
        MissingExtraError: pooch is not installed, for a download.
    """
    layout = LAYOUTS[name]
    if path is None:
        path = _downloaded(layout)
    if path.is_dir():
        archive = _archive_parts(path, layout)
        read = _archive_reader(archive, path, layout) if archive else _folder_reader(path)
    elif path.is_file():
        read = _archive_reader([path], path, layout)
    else:
        raise DataError(f"data is {path}, which does not exist; expected a folder or an official tar.gz of {name}")
    where = str(path)
    if read(layout.binary_train[0]) is not None:
        parts = [_binary(read, file, layout.train_per_file, layout, where) for file in layout.binary_train]
        test = _binary(read, layout.binary_test, layout.test_images, layout, where, required=False)
    elif read(layout.python_train[0]) is not None:
        parts = [_pickled(read, file, layout.train_per_file, layout, where) for file in layout.python_train]
        test = _pickled(read, layout.python_test, layout.test_images, layout, where, required=False)
    else:
        raise DataError(
            f"{where} has neither {layout.binary_train[0]} (binary layout) nor {layout.python_train[0]} "
            f"(python layout) of {name} in it"
        )
    train, labels = (torch.cat(part) for part in zip(*(part for part in parts if part is not None), strict=True))
    if test is None:
        return hold_out_last(train, labels, layout.classes)
    return Images(train, labels, *test, held_out_is_test=True, classes=layout.classes)


def _binary(
    read: Reader, file: str, images: int, layout: Layout, where: str, *, required: bool = True
) -> tuple[Tensor, Tensor] | None:
    """Images [n, 3, 32, 32] and labels [n] of a file of records."""
    content = _content(read, file, where, required)
    if content is None:
        return None
    record = layout.label_bytes + _PIXELS
    if len(content) != images * record:
        raise DataError(
            f"{file} in {where} has {len(content):,} bytes, expected {images * record:,}: it is truncated or not the "
            "official file. Get it again"
        )
    records = np.frombuffer(content, np.uint8).reshape(images, record)
    labels = records[:, layout.label_bytes - 1]
    return _checked(records[:, layout.label_bytes :], labels, layout, f"{file} in {where}")


def _pickled(
    read: Reader, file: str, images: int, layout: Layout, where: str, *, required: bool = True
) -> tuple[Tensor, Tensor] | None:
    """Images [n, 3, 32, 32] and labels [n] of a file in the python layout."""
    content = _content(read, file, where, required)
    if content is None:
        return None
    name = f"{file} in {where}"
    try:
        batch = load_arrays(content)
    except UnsafePickleError as error:
        raise DataError(f"{name} is not safe to read: {error}. Get the official file again") from error
    except Exception as error:  # a broken pickle raises almost anything
        raise DataError(f"{name} is corrupt: {error}. Get it again") from error
    pixels = batch.get(b"data") if isinstance(batch, dict) else None
    labels = batch.get(layout.python_labels) if isinstance(batch, dict) else None
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (images, _PIXELS)):
        raise DataError(f"{name} has no array 'data' of uint8 ({images}, {_PIXELS}): it is not the official file")
    if not (isinstance(labels, list) and len(labels) == images and all(type(label) is int for label in labels)):
        raise DataError(
            f"{name} has no list of {images} '{layout.python_labels.decode()}': it is not the official file"
        )
    return _checked(pixels, np.array(labels), layout, name)


def _content(read: Reader, file: str, where: str, required: bool) -> bytes | None:
    content = read(file)
    if content is None and required:
        raise DataError(f"{file} is missing in {where}")
    return content


def _checked(pixels: np.ndarray, labels: np.ndarray, layout: Layout, name: str) -> tuple[Tensor, Tensor]:
    if labels.min() < 0 or labels.max() >= layout.classes:
        raise DataError(
            f"{name} has labels from {labels.min()} to {labels.max()}, expected 0 to {layout.classes - 1}: it is "
            "corrupt or another data set"
        )
    return torch.from_numpy(pixels.reshape(-1, *_SHAPE).copy()), torch.from_numpy(labels.astype(np.int64))


def _folder_reader(path: Path) -> Reader:
    """Reader of files in `path` and its subfolders; the first that has a file counts."""
    folders = [path, *sorted(entry for entry in path.iterdir() if entry.is_dir())]

    def read(file: str) -> bytes | None:
        found = next((folder / file for folder in folders if (folder / file).is_file()), None)
        try:
            return None if found is None else found.read_bytes()
        except OSError as error:
            raise DataError(f"{found} cannot be read: {error}") from error

    return read


def _archive_parts(folder: Path, layout: Layout) -> list[Path]:
    """The parts of an official archive in `folder`, in their order: its name, a full stop and whatever sorts them."""
    for archive in layout.archives:
        if found := sorted(path for path in folder.glob(f"{archive}.?*") if path.is_file()):
            return found
    return []


def _archive_reader(parts: list[Path], path: Path, layout: Layout) -> Reader:
    """Reader of the members of a tar.gz, which may be in parts; nothing is written to the disk.

    path: names the archive in errors."""
    try:
        content = b"".join(part.read_bytes() for part in parts)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    md5_sum = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5_sum not in layout.archives.values():
        expected = " or ".join(f"{md5} ({archive})" for archive, md5 in layout.archives.items())
        what = str(path) if len(parts) == 1 else f"{path}, its {len(parts)} parts {parts[0].name} to {parts[-1].name},"
        raise DataError(
            f"{what} has MD5 {md5_sum}, expected {expected}: it is truncated, corrupt or another file. Get it again"
        )
    members = {}
    wanted = {*layout.binary_train, layout.binary_test, *layout.python_train, layout.python_test}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                stream = archive.extractfile(member) if member.isfile() and name in wanted else None
                if stream is not None:
                    members[name] = stream.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as a tar.gz: {error}") from error
    return members.get


def _downloaded(layout: Layout) -> Path:
    name, md5 = next(iter(layout.archives.items()))
    pooch = import_extra("pooch", "train")
    try:
        return Path(pooch.retrieve(_URL + name, f"md5:{md5}", name, pooch.os_cache("vadiff"), progressbar=True))
    except (OSError, ValueError) as error:  # no connection; another checksum
        raise DataError(
            f"{_URL + name} could not be downloaded: {error}. Get it elsewhere (MD5 {md5}) and pass --data FILE"
        ) from error
