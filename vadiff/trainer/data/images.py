"""A data set: images, labels, and the held-out part."""

from typing import NamedTuple

from torch import Tensor

from .encoding import PIXELS, Encoding, Samples

HELD_OUT = 5000  # training images held out where a data set has no test part


class Images(NamedTuple):
    """A data set. Its images are as they are stored, pixels as bytes; `encoding.inputs` makes network inputs."""

    train: Samples  # [N, ...]
    train_labels: Tensor | None  # int64 [N], 0 to classes - 1
    held_out: Samples  # [M, ...], never trained on
    held_out_labels: Tensor | None  # int64 [M]
    held_out_is_test: bool  # False where the held-out images were taken from the training set
    classes: int = 0  # number of classes, 0 without labels
    encoding: Encoding = PIXELS
    groups: Tensor | None = None  # int64 [N], shards of the training images, from which few are read at a time
    fingerprint: str = ""  # differs between data sets read from files; empty for those that have no other version

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a network input."""
        channels, height, width = self.train.shape[1:]
        return self.encoding.shape((channels, height, width))


def hold_out_last(train: Tensor, labels: Tensor | None, classes: int, held_out: int = HELD_OUT) -> Images:
    """Hold out the last `held_out` images of a training set, at most a tenth of it."""
    cut = held_out_from(len(train), held_out)
    return Images(
        train[:cut],
        None if labels is None else labels[:cut],
        train[cut:],
        None if labels is None else labels[cut:],
        held_out_is_test=False,
        classes=classes,
    )


def held_out_from(number: int, held_out: int = HELD_OUT) -> int:
    """The first of `number` images that is held out: the last `held_out` of them are, at most a tenth."""
    return number - max(1, min(held_out, number // 10))
