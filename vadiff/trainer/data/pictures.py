"""A data set of pictures in files: indexed once, decoded when asked for."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ...extras import import_extra
from .decoding import SUFFIXES, decoded
from .encoding import Samples
from .images import Images, held_out_from
from .index import Index
from .index_folder import folder_index
from .index_shards import shards_index
from .index_zip import zip_index
from .members import Container

_MOST_TRIED = 100  # pictures in a row that cannot be read


class Read(NamedTuple):
    """Decoded pictures, and which they are."""

    pixels: Tensor  # uint8 [n, 3, size, size]
    rows: Tensor  # int64 [n]; not those that were asked for where a picture could not be read


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of any size and format, cut to the square in their middle and scaled, in colour.

    Can be sent to other processes, and is small: about 100 bytes for each picture. Each process opens the files anew.

    Attributes:
        size: height and width in pixels.
        labels: int64 [N]; None without classes.
        classes: number of classes, 0 without.
        groups: int64 [N], the shard of each picture; None where they are not in shards.
        fingerprint: equal for equal names, sizes and labels of the files.
        left_out: number of files that are not among the pictures, as they are damaged or have no label.
        on_bad_image: "error", or "skip", which reads the next picture in place of one that cannot be read.
    """

    size: int
    labels: Tensor | None
    classes: int
    groups: Tensor | None
    fingerprint: str
    left_out: int
    on_bad_image: str
    _container: Container
    _places: np.ndarray  # int64 [N], of each picture in the container

    def __len__(self) -> int:
        return len(self._places)

    @property
    def shape(self) -> Sequence[int]:
        """(N, 3, size, size)."""
        return len(self), 3, self.size, self.size

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Pictures of some rows. uint8 [n, 3, size, size].

        Raises:
            DataError: see `read`.
        """
        return self.read(torch.arange(len(self))[rows]).pixels

    def read(self, rows: Tensor) -> Read:
        """Pictures of some rows, int64 [n].

        Raises:
            DataError: a picture cannot be read, and is not to be skipped; the message names it.
            MissingExtraError: Pillow is not installed.
        """
        pixels = torch.empty(len(rows), 3, self.size, self.size, dtype=torch.uint8)
        found = rows.clone()
        for number, row in enumerate(rows.tolist()):
            found[number] = self._read(row, pixels[number])
        return Read(pixels, found)

    def name(self, row: int) -> str:
        """The file of a picture."""
        return self._container.name(int(self._places[row]))

    def part(self, rows: Tensor) -> Pictures:
        """Some of the pictures, by their rows, int64 [n]."""
        return replace(
            self,
            labels=None if self.labels is None else self.labels[rows],
            groups=None if self.groups is None else self.groups[rows],
            _places=self._places[rows.numpy()],
        )

    def _read(self, row: int, pixels: Tensor) -> int:
        """Decode a picture, or the next one that can be; returns its row."""
        for tried in range(_MOST_TRIED if self.on_bad_image == "skip" else 1):
            here = (row + tried) % len(self)
            place = int(self._places[here])
            try:
                pixels.copy_(decoded(self._container.content(place), self.size, self._container.name(place)))
                return here
            except DataError as error:
                last = error
        raise last


def open_pictures(
    path: Path | str, size: int, *, on_bad_image: str = "error", require_labels: bool = False
) -> Pictures:
    """Find the pictures of a data set. None is decoded.

    Args:
        path: one of
            a folder of pictures, at any depth. If every picture is in a subfolder, the names of the top ones are its
            classes; or dataset.json in the folder says them;
            a zip of such a folder, as EDM's and StyleGAN's data set tools write it, with or without dataset.json:
            {"labels": [["00000/img00000000.png", 6], ...]};
            WebDataset shards, uncompressed tar files: a folder of them, or their names with braces or wildcards, as
            "train-{000000..000099}.tar" or "train-*.tar". A sample is the files that have a name up to the first dot in
            common: the picture, and its class as text in a .cls, or as "label" or "cls" in a .json. The list of a large
            set (64 MiB or more) is kept in vadiff/shards in the user's cache folder ($XDG_CACHE_HOME).
        size: height and width in pixels, to which pictures are cut and scaled.
        on_bad_image: "error", or "skip", which leaves out what is damaged or has no label, and counts it. Of a shard
            that is cut off, the pictures before that place stay.
        require_labels: whether pictures without a label are an error; otherwise the data set then has no classes.

    Raises:
        DataError: no such files, fewer than two pictures, an archive or dataset.json that is damaged, or missing
            labels; the message names the file.
    """
    path, skip = Path(path), on_bad_image == "skip"
    index = _index(path, skip)
    labels, kept = _labels(index, require_labels, skip, path)
    if len(kept) < 2:
        raise DataError(f"{path} has {len(kept)} pictures, expected two or more ({', '.join(sorted(SUFFIXES))})")
    return Pictures(
        size=size,
        labels=labels,
        classes=0 if labels is None else int(labels.max()) + 1,
        groups=None if index.groups is None else torch.from_numpy(index.groups[kept]),
        fingerprint=index.fingerprint,
        left_out=index.left_out + len(index.labels) - len(kept),
        on_bad_image=on_bad_image,
        _container=index.container,
        _places=kept,
    )


def with_labels(samples: Samples, labels: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Images of some rows, and the labels of those that were really read in place of bad ones."""
    if not isinstance(samples, Pictures):
        return samples[rows], None if labels is None else labels[rows]
    pixels, found = samples.read(torch.arange(len(samples))[rows])
    return pixels, None if labels is None else labels[found]


def hold_out(pictures: Pictures) -> Images:
    """A data set of pictures, in an order shuffled with a fixed seed; the last tenth, 5,000 at most, is held out."""
    order = shuffled(len(pictures))  # names are often sorted by class
    cut = held_out_from(len(order))
    train, held_out = pictures.part(order[:cut]), pictures.part(order[cut:])
    return Images(
        train, train.labels, held_out, held_out.labels, held_out_is_test=False, classes=pictures.classes,
        groups=train.groups, fingerprint=pictures.fingerprint,
    )  # fmt: skip


def shuffled(number: int) -> Tensor:
    """The order of pictures from which some are held out. int64 [number]."""
    return torch.randperm(number, generator=torch.Generator().manual_seed(0))


def _index(path: Path, skip: bool) -> Index:
    """List the pictures of a folder, zip or shards."""
    text = str(path)
    if re.match("[a-z0-9]{2,}:/|pipe:", text):  # a Path has one slash
        raise DataError(f"data is {text}, expected files on this machine: download the shards first")
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        return shards_index(shards, skip=skip) if shards else folder_index(path)
    if path.suffix == ".zip" and path.is_file():
        return zip_index(path)
    if (path.exists() and path.suffix != ".tar") or re.search(r"\.(tar\.\w+|tgz)$", text):
        raise DataError(
            f"data is {path}, expected a folder of pictures, a .zip, or uncompressed .tar shards: other files cannot "
            "be read picture by picture in any order"
        )
    if path.suffix == ".tar" or "{" in text:
        return shards_index(_shards(text), skip=skip)
    raise DataError(f"data is {path}, which does not exist; expected a folder of pictures, a .zip or .tar shards")


def _shards(pattern: str) -> list[Path]:
    """The files that a name with braces or wildcards means."""
    if Path(pattern).is_file():
        return [Path(pattern)]
    try:
        names = list(import_extra("braceexpand", "train").braceexpand(pattern))
    except ValueError as error:  # braces that are not closed
        raise DataError(f"data is {pattern}, expected the names of shards: {error}") from error
    found: list[str] = []
    for name in names:
        matching = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not matching:
            raise DataError(f"data is {pattern}, expected the names of shards: no file is called {name}")
        found += matching
    return [Path(name) for name in found]


def _labels(index: Index, required: bool, skip: bool, path: Path) -> tuple[Tensor | None, np.ndarray]:
    """The classes of the pictures that stay, and their places."""
    everything = np.arange(len(index.labels))
    missing = index.labels < 0
    if missing.all():
        if required and len(missing):
            raise DataError(f"class_conditional is true, but {path} has no classes: {index.wanted}")
        return None, everything
    if missing.any() and not skip:
        if required:
            first = index.container.name(int(missing.argmax()))
            raise DataError(
                f"{missing.sum():,} pictures have no label, the first is {first}: label them, or leave them out with "
                "--on-bad-image skip"
            )
        return None, everything
    kept = everything[~missing]
    return torch.from_numpy(index.labels[kept]), kept
