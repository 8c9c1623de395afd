"""How a data set stores its images, and what the network sees of them."""

from typing import Protocol

from torch import Tensor

from ...pixels import normalised, pixels


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
