"""Encoded pictures (PNG, JPEG, ...) decoded and scaled to one size."""

import functools
import io
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ...extras import import_extra

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
MOST_BYTES = 2**28  # of a file with one picture
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")  # Pillow has others, which run programs or are little tested
_MEND = "Repair or remove it, or in training leave such pictures out with --on-bad-image skip"


def is_picture(name: str) -> bool:
    """Whether a file of this name is a picture of a data set; hidden ones, as macOS adds for each, are not."""
    base = name.rpartition("/")[2]
    return os.path.splitext(base)[1].lower() in SUFFIXES and not base.startswith(".")


def decoded(content: bytes, size: int, name: str) -> Tensor:
    """The square in the middle of a picture, scaled to `size` × `size` by a Lanczos filter, in colour.

    Args:
        content: of the picture's file.
        size: height and width in pixels.
        name: of the file, for errors.

    Returns:
        uint8 [3, size, size].

    Raises:
        DataError: it is not a picture, is damaged, or has more pixels than Pillow takes for a decompression bomb.
        MissingExtraError: Pillow is not installed.
    """
    module = _pillow()
    try:
        with module.open(io.BytesIO(content), formats=_FORMATS) as picture:
            limit = module.MAX_IMAGE_PIXELS
            if limit is not None and picture.width * picture.height > limit:
                raise ValueError(f"{picture.width} x {picture.height} pixels, expected at most {limit:,} in all")
            if picture.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
                picture = module.fromarray(
                    (np.array(picture).astype(np.float32) / 257.0).round().clip(0, 255).astype(np.uint8)
                )
            if picture.mode != "RGB":
                picture = picture.convert("RGB")
            if picture.size != (size, size):
                side = min(picture.size)
                left, top = (picture.width - side) // 2, (picture.height - side) // 2
                box = (left, top, left + side, top + side)
                picture = picture.resize((size, size), module.Resampling.LANCZOS, box=box)
            return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    except module.UnidentifiedImageError as error:
        raise DataError(f"{name} cannot be read as a picture: it is none of {', '.join(_FORMATS)}. {_MEND}") from error
    except (
        OSError, SyntaxError, ValueError, EOFError, OverflowError, module.DecompressionBombError,
        module.DecompressionBombWarning,
    ) as error:  # fmt: skip
        raise DataError(f"{name} cannot be read as a picture: {error}. {_MEND}") from error


@functools.cache  # importing it anew for each picture takes a tenth of reading a small one
def _pillow() -> Any:
    return import_extra("PIL.Image", "train")
