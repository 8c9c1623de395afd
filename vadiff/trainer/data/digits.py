"""Handwritten digits, 8 × 8 pixels: real images that scikit-learn includes, without a download.

Source: Alpaydin & Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998): the 1,797 images of its
test part.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...extras import import_extra
from ...pixels import normalised
from .images import Images

SIGMA_DATA = 0.75  # standard deviation of the pixels, scaled to [-1, 1]

_HELD_OUT = 297


class Digits(NamedTuple):
    """Images in [-1, 1], float32."""

    train: Tensor  # [1500, 1, 8, 8]
    held_out: Tensor  # [297, 1, 8, 8], never trained on


def load_digits() -> Digits:
    """The 1,797 digits as network input, always split in the same way.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    images = digits()
    return Digits(train=normalised(images.train[:]), held_out=normalised(images.held_out[:]))


def digits() -> Images:
    """The 1,797 digits with their labels, always split in the same way: 1,500 to train on, 297 held out.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    bunch = import_extra("sklearn.datasets", "train").load_digits()
    grey = torch.from_numpy(bunch.images).unsqueeze(1)  # [1797, 1, 8, 8] float64, 0 to 16
    pixels = (grey * (255.0 / 16.0)).round().to(torch.uint8)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[_HELD_OUT:], order[:_HELD_OUT]
    return Images(pixels[train], labels[train], pixels[held_out], labels[held_out], held_out_is_test=False, classes=10)
