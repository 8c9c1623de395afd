"""A loaded data set: pixels as bytes, labels, and the held-out part."""

from typing import NamedTuple

from torch import Tensor

HELD_OUT = 5000  # training images held out where a data set has no test part


class Images(NamedTuple):
    """A data set in memory. Pixels are 0 to 255; `vadiff.pixels.normalised` makes network inputs of them."""

    train: Tensor  # uint8 [N, C, H, W]
    train_labels: Tensor | None  # int64 [N], 0 to classes - 1
    held_out: Tensor  # uint8 [M, C, H, W], never trained on
    held_out_labels: Tensor | None  # int64 [M]
    held_out_is_test: bool  # False where the held-out images were taken from the training set
    classes: int = 0  # number of classes, 0 without labels

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width


def hold_out_last(train: Tensor, labels: Tensor | None, classes: int, held_out: int = HELD_OUT) -> Images:
    """Hold out the last `held_out` images of a training set, at most a tenth of it."""
    cut = len(train) - max(1, min(held_out, len(train) // 10))
    return Images(
        train[:cut],
        None if labels is None else labels[:cut],
        train[cut:],
        None if labels is None else labels[cut:],
        held_out_is_test=False,
        classes=classes,
    )
