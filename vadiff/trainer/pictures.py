"""Image files: PNG folders and npz archives, written atomically and read back as uint8; image grids."""

import itertools
import math
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..extras import import_extra
from ..files import check_writable, replacing

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class PictureWriter:
    """Writes a PNG folder or an npz archive, which appears at `path` only if the `with` block ends without an error.

    After an error, what was written so far is lost, unless `keep` is called.

    The archive holds `arr_0` [N, H, W, C] uint8 and, with labels, `arr_1` [N] int64, as the usual evaluation scripts
    expect. A folder holds one file per image, named by its seed (and class).

    Args:
        path: an archive if it ends in .npz, otherwise a folder.
        seeds: of all images.
        shape: (C, H, W), C 1 or 3.
        labels: whether `write` gets class labels.
        note: kept in an archive, for `read_note`.
        overwrite: replace an archive, or a folder with nothing but PNG files.

    Raises:
        FileExistsError: `path` exists already, without `overwrite`, or it is something else.
        OSError: nothing can be written there.
        ValueError: images that are neither grey nor RGB.
    """

    def __init__(
        self, path: Path, seeds: Sequence[int], shape: tuple[int, int, int], labels: bool = False, note: str = "",
        overwrite: bool = False,
    ) -> None:  # fmt: skip
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists already: replace it with --overwrite, or name another")
        if path.is_dir() and not (path.suffix != ".npz" and all(file.suffix == ".png" for file in path.iterdir())):
            raise FileExistsError(f"{path} has other files than images: it is not replaced; name another")
        if path.is_file() and path.suffix != ".npz":
            raise FileExistsError(f"{path} is a file, expected a folder of PNG files")
        archive = path.suffix == ".npz"  # written at the end
        check_writable(path, folder=not archive, size=len(seeds) * math.prod(shape) if archive else 0)
        if shape[0] not in (1, 3):
            raise ValueError(f"images have {shape[0]} channels, expected 1 (grey) or 3 (RGB) for pictures")
        self.path, self.seeds, self.archive = path, seeds, archive
        self.images = np.empty((len(seeds) if self.archive else 0, *shape[1:], shape[0]), dtype=np.uint8)
        self.labels = np.zeros(len(seeds), dtype=np.int64) if labels else None
        self.note, self._overwrite = note, overwrite
        self.written: set[int] = set()  # places in `seeds`
        self._pillow = import_extra("PIL.Image", "eval")

    def __enter__(self) -> "PictureWriter":
        self._writing = self._atomically()
        self._writing.__enter__()
        return self

    def write(self, start: int, images: Tensor, labels: Tensor | None = None) -> None:
        """Add images [B, C, H, W] uint8; the first has the seed `seeds[start]`."""
        pixels = images.permute(0, 2, 3, 1).numpy()
        if labels is not None and self.labels is not None:
            self.labels[start : start + len(pixels)] = labels.numpy()
        if self.archive:
            self.images[start : start + len(pixels)] = pixels
        else:
            for offset, picture in enumerate(pixels):
                name = f"{self.seeds[start + offset]:06d}" + ("" if labels is None else f"_class{int(labels[offset])}")
                self._pillow.fromarray(_grey_or_rgb(picture)).save(self._partial / f"{name}.png")
        self.written |= {*range(start, start + len(pixels))}

    def keep(self) -> Path | None:
        """Within the `with` block: keep the images so far under another name, which is returned; None without any."""
        if not self.written:
            return None
        kept = self._free_name()
        if not self.archive:
            whole = {self.seeds[place] for place in self.written}
            for file in self._partial.iterdir():
                if int(file.stem.split("_")[0]) not in whole:  # of a batch that was not written to its end
                    file.unlink()
            self._partial.rename(kept)
            return kept
        places = sorted(self.written)
        labels = self.labels is not None
        channels, height, width = self.images.shape[3], *self.images.shape[1:3]
        with PictureWriter(kept, [self.seeds[place] for place in places], (channels, height, width), labels) as writer:
            chosen = torch.from_numpy(self.images[places]).permute(0, 3, 1, 2)
            writer.write(0, chosen, None if self.labels is None else torch.from_numpy(self.labels[places]))
        return kept

    def _free_name(self) -> Path:
        marks = itertools.chain([""], map("-{}".format, itertools.count(2)))
        paths = (self.path.with_name(f"{self.path.stem}-incomplete{mark}{self.path.suffix}") for mark in marks)
        return next(path for path in paths if not path.exists())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writing.__exit__(kind, error, trace)

    @contextmanager
    def _atomically(self) -> Iterator[None]:
        with ExitStack() as replaced, replacing(self.path) as self._partial:
            if not self.archive:
                self._partial.mkdir()
            yield
            if self.archive:
                arrays: dict[str, Any] = {"arr_0": self.images}
                if self.labels is not None:
                    arrays["arr_1"] = self.labels
                if self.note:
                    arrays["note"] = np.array(self.note)
                with self._partial.open("wb") as file:
                    np.savez(file, **arrays)
            elif self._overwrite and self.path.exists():  # a folder with files in it cannot be renamed over
                aside = tempfile.TemporaryDirectory(prefix=f"{self.path.name}.replaced-", dir=self.path.parent)
                self.path.rename(Path(replaced.enter_context(aside)) / self.path.name)


def read_pictures(path: Path) -> Tensor:
    """All images of a PNG folder or an npz archive, in the order of their names.

    Returns:
        [N, C, H, W] uint8, C 1 if every image is grey, else 3.

    Raises:
        ValueError: no images, images of different sizes, or an archive without `arr_0` [N, H, W, C] uint8.
        FileNotFoundError: `path` does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, expected a folder of images or an .npz archive")
    return _read_archive(path) if path.is_file() else _read_folder(path)


def read_note(path: Path) -> str | None:
    """The note that `PictureWriter` left in an archive; None without a note, a file, or if it is damaged."""
    note = _read_array(path, "note")
    return None if note is None else str(note)


def read_labels(path: Path) -> Tensor | None:
    """The labels that `PictureWriter` left in an archive; None without labels, a file, or if it is damaged."""
    labels = _read_array(path, "arr_1")
    return None if labels is None else torch.from_numpy(labels)


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Arrange [N, C, H, W] as [rows·(H+1) - 1, columns·(W+1) - 1, C], white between the images and in empty cells.

    Images are in [-1, 1], 1 is white.
    """
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    cells = torch.full((rows * columns, channels, height + 1, width + 1), 1.0)
    cells[:count, :, :height, :width] = images
    picture = cells.view(rows, columns, channels, height + 1, width + 1).permute(0, 3, 1, 4, 2)
    return picture.reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1]


def _read_array(path: Path, name: str) -> np.ndarray | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            found: np.ndarray = archive[name]
            return found
    except (KeyError, ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile):
        return None


def _read_archive(path: Path) -> Tensor:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            pixels = archive["arr_0"]
    except (KeyError, ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an .npz archive with images under arr_0, or damaged ({error})") from error
    if pixels.ndim != 4 or pixels.dtype != np.uint8 or pixels.shape[3] not in (1, 3) or len(pixels) == 0:
        raise ValueError(
            f"{path} holds arr_0 of shape {pixels.shape} and dtype {pixels.dtype}, expected [N, H, W, 1 or 3] uint8"
        )
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _read_folder(path: Path) -> Tensor:
    pillow = import_extra("PIL.Image", "eval")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in EXTENSIONS)
    if not files:
        raise ValueError(f"{path} holds no images, expected files ending in {', '.join(EXTENSIONS)}")
    pictures: list[np.ndarray] = []
    for file in files:
        try:
            with pillow.open(file) as picture:
                pixels = np.array(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
        except OSError as error:
            raise ValueError(f"{file} is not a readable image: {error}") from error
        if pictures and pixels.shape[:2] != pictures[0].shape[:2]:
            (height, width), (expected_height, expected_width) = pixels.shape[:2], pictures[0].shape[:2]
            raise ValueError(
                f"{file} has {width} x {height} pixels, expected {expected_width} x {expected_height} like "
                f"{files[0].name}: all images of a folder must have one size"
            )
        pictures.append(pixels[..., None] if pixels.ndim == 2 else pixels)
    channels = max(picture.shape[2] for picture in pictures)
    pixels = np.stack([np.broadcast_to(picture, (*picture.shape[:2], channels)) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _grey_or_rgb(picture: np.ndarray) -> np.ndarray:
    return picture[..., 0] if picture.shape[-1] == 1 else picture
