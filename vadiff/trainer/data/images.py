"""What every data set is once loaded: bytes, labels, and which part is held out."""

from typing import NamedTuple

from torch import Tensor

HELD_OUT = 5000  # training images held out where a data set has no test part


class Images(NamedTuple):
    """A data set in memory. Pixels are 0 to 255; `vadiff.pixels.normalised` turns them into what networks see."""

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
    """Take the last images of a training set, `held_out` of them but at most a tenth, out of it."""
    cut = len(train) - max(1, min(held_out, len(train) // 10))
    return Images(
        train[:cut],
        None if labels is None else labels[:cut],
        train[cut:],
        None if labels is None else labels[cut:],
        held_out_is_test=False,
        classes=classes,
    )
