"""Handwritten digits, 8 × 8 pixels: real images that come inside scikit-learn, without a download.

Source: Alpaydin & Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998): the 1,797 images of its
test part.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..extras import import_extra

SIGMA_DATA = 0.75  # standard deviation of the pixels, scaled to [-1, 1]

_HELD_OUT = 297


class Digits(NamedTuple):
    """Images in [-1, 1], float32."""

    train: Tensor  # [1500, 1, 8, 8]
    held_out: Tensor  # [297, 1, 8, 8], never trained on


def load_digits() -> Digits:
    """The 1,797 digits, split the same way every time.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    pixels = import_extra("sklearn.datasets", "train").load_digits().images  # [1797, 8, 8] float64, 0 to 16
    images = torch.from_numpy(pixels).float().unsqueeze(1) / 8.0 - 1.0
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Digits(train=images[order[_HELD_OUT:]], held_out=images[order[:_HELD_OUT]])
