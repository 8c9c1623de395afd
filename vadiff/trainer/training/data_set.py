"""The data set of a config."""

import os
import sys
from pathlib import Path

from ...errors import DataError
from ..config import TrainConfig
from ..data import Images, cifar, digits, hold_out, open_latents, open_pictures


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
        if pictures.left_out and os.environ.get("RANK", "0") == "0":
            print(
                f"vadiff: {pictures.left_out:,} files of {config.data} are left out: damaged, or no picture or label",
                file=sys.stderr,
            )
        images = hold_out(pictures)
    elif config.dataset == "latents":
        images = _latents(config)
    else:
        images = cifar.load(config.dataset, None if config.data is None else Path(config.data))
    return images


def _latents(config: TrainConfig) -> Images:
    if config.data is None:
        raise DataError("data is None, expected the folder that `vadiff encode` wrote: --data FOLDER")
    images = open_latents(config.data)
    if images.shape != config.image_shape:
        channels, height, width = images.shape
        flags = f": --image-size {height} --image-channels {channels}" if height == width else ""
        raise DataError(
            f"{config.data} holds latents of {channels} x {height} x {width}, expected "
            f"{' x '.join(map(str, config.image_shape))} by image_channels and image_size{flags}"
        )
    if config.class_conditional and images.train_labels is None:
        raise DataError(
            f"class_conditional is true, but {config.data} has no classes: those of pictures without labels"
        )
    return images
