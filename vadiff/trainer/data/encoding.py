"""How a data set stores its images, and what the network sees of them."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...pixels import normalised, pixels
from .fixed_noise import fixed_noise

DRAWS_SEED = 0x1A7E47  # of fixed draws; not that of any noise that is added to them, as 0 of the held-out loss


class Samples(Protocol):
    """Stored images, in memory or read from files when asked for; a tensor [N, C, H, W] is one."""

    @property
    def shape(self) -> Sequence[int]:
        """(N, C, H, W)."""

    @property
    def dtype(self) -> torch.dtype:
        """uint8, or for latents that of the numbers that are stored."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor:
        """The images of some rows, [n, C, H, W]: bytes, or for latents the numbers that are stored."""


class Encoding(Protocol):
    """Converts stored images to network inputs x0, and what the network draws to pictures."""

    @property
    def random(self) -> bool:
        """Whether x0 is drawn anew each time that an image is used, as from the mean and variance of a latent."""

    def shape(self, stored: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of x0, for a stored image of the given shape."""

    def picture_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of a picture, for x0 of the given shape."""

    def inputs(self, stored: Tensor, noise: Tensor | None = None) -> Tensor:
        """x0 [n, C, H, W] float32 of stored images [n, ...].

        Args:
            stored: as read from the data set.
            noise: N(0, 1) [n, C, H, W], from which a `random` encoding draws; None: draws of a fixed seed, the same for
                the same number of images.
        """

    def pictures(self, x0: Tensor) -> Tensor:
        """Pictures of x0 [n, C, H, W]: bytes [n, 1 or 3, H', W']."""


def inputs_of_rows(encoding: Encoding, samples: Samples, rows: Tensor) -> Tensor:
    """x0 of some rows, int64 [n], with the fixed draws that `inputs` gives them when it is called for all of them."""
    stored = samples[rows]
    if not encoding.random:
        return encoding.inputs(stored)
    channels, height, width = samples.shape[1:]
    shape = torch.Size((int(rows.max()) + 1, *encoding.shape((channels, height, width))))
    return encoding.inputs(stored, fixed_noise(shape, DRAWS_SEED)[rows].to(stored.device))


class PixelBytes:
    """Images stored as bytes, 0 to 255; x0 is in [-1, 1]."""

    random = False

    def shape(self, stored: tuple[int, int, int]) -> tuple[int, int, int]:
        return stored

    def picture_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return shape

    def inputs(self, stored: Tensor, noise: Tensor | None = None) -> Tensor:
        return normalised(stored)

    def pictures(self, x0: Tensor) -> Tensor:
        return pixels(x0)


PIXELS = PixelBytes()
