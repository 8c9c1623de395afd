"""A folder of pictures of any size and format."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ...extras import import_extra
from .images import Images, hold_out_last

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


def load(path: Path, size: int, limit: int | None = None) -> Images:
    """Every picture below a folder, cut to the square in its middle and scaled to `size` × `size`, in colour.

    If every picture is in a subfolder of `path`, the subfolder's name is its class. The pictures are shuffled with a
    fixed seed, and the last tenth of them, 5,000 at most, is held out.

    Args:
        path: the folder.
        size: height and width in pixels.
        limit: maximum number of pictures to read, the first in the shuffled order; None reads all.

    Raises:
        DataError: no such folder, fewer than two pictures, or one that cannot be read; the message names it.
        MissingExtraError: Pillow is not installed.
    """
    if not path.is_dir():
        raise DataError(f"data is {path}, which is not a folder; expected one with pictures in it")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
    if len(files) < 2:
        raise DataError(f"{path} has {len(files)} pictures, expected two or more ({', '.join(sorted(_SUFFIXES))})")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))  # names are often sorted by class
    order = order[:limit]
    image_module = import_extra("PIL.Image", "train")
    pictures = torch.stack(
        [_read(image_module, files[place], size) for place in order.tolist()]
    )  # uint8 [N, 3, size, size]
    labels, classes = _labels(path, files)
    return hold_out_last(pictures, None if labels is None else labels[order], classes)


def _read(image_module: Any, file: Path, size: int) -> Tensor:
    try:
        with image_module.open(file) as picture:
            picture = picture.convert("RGB")
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            box = (left, top, left + side, top + side)
            scaled = picture.resize((size, size), image_module.Resampling.LANCZOS, box=box)
            return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as a picture: {error}. Repair or remove it") from error


def _labels(path: Path, files: list[Path]) -> tuple[Tensor | None, int]:
    names = [file.relative_to(path).parts[0] for file in files]
    if any(file.parent == path for file in files):
        return None, 0
    classes = {name: index for index, name in enumerate(sorted(set(names)))}
    return torch.tensor([classes[name] for name in names]), len(classes)
