"""The data set of a config."""

from pathlib import Path

from ...errors import DataError
from ..config import TrainConfig
from ..data import Images, cifar, digits, hold_out, open_pictures


def load_images(config: TrainConfig) -> Images:
    """The data set of a config; pictures in files are read when asked for.

    Raises:
        DataError: the data set is missing, truncated or corrupt, or has no labels for a class-conditional network.
        MissingExtraError: a package that reads it is not installed.
    """
    if config.dataset == "digits":
        images = digits.digits()
    elif config.dataset == "images":
        if config.data is None:
            raise DataError("data is None, expected the folder, zip or shards of the pictures: --data PATH")
        pictures = open_pictures(
            config.data, config.image_size, on_bad_image=config.on_bad_image, require_labels=config.class_conditional
        )
        images = hold_out(pictures)
    else:
        images = cifar.load(config.dataset, None if config.data is None else Path(config.data))
    return images
