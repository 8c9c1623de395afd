"""Where the images of a run are kept: on the device, in memory of the host, or only in their files."""

import math
import os
import sys

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..config import TrainConfig
from ..data import Images, Pictures, Samples
from ..progress import progress_bar
from .image_source import Rows, default_workers, ranks_here

DEVICE, HOST, NONE = "device", "host", "none"
_SHARE_OF_GPU, _SHARE_OF_HOST = 0.5, 0.25  # of free memory of the GPU, and of the host's memory, for "auto"
_CHUNK = 256  # images at a time


def place_of(config: TrainConfig, images: Samples, device: torch.device) -> str:
    """`DEVICE`, `HOST` or `NONE`: what a config's `cache` means for these images on this machine."""
    if config.cache != "auto":
        return config.cache
    size = math.prod(images.shape) * images.dtype.itemsize
    if device.type == "cuda" and size <= _SHARE_OF_GPU * torch.cuda.mem_get_info(device)[0]:
        return DEVICE
    if isinstance(images, Tensor) or size * ranks_here() <= _SHARE_OF_HOST * _host_memory():
        return HOST
    return NONE


def stays_on_device(config: TrainConfig, images: Tensor, device: torch.device) -> bool:
    """Whether images in memory are kept on the device; a CPU's memory is the host's."""
    return device.type == "cpu" or place_of(config, images, device) == DEVICE


def in_memory(images: Images, config: TrainConfig, device: torch.device, *, progress: bool) -> Images:
    """The data set with its training and held-out images read into memory, if that is where they are to be kept.

    Args:
        images: the data set.
        config: `cache` and `workers`.
        device: of the run.
        progress: show a progress bar.

    Raises:
        DataError: a file cannot be read; the message names it.
    """
    if isinstance(images.train, Tensor) or place_of(config, images.train, device) == NONE:
        return images
    workers = default_workers() if config.workers is None else config.workers
    train, train_rows = _whole(images.train, workers, "training images" if progress else None)
    held_out, held_out_rows = _whole(images.held_out, workers, "held-out images" if progress else None)
    return images._replace(
        train=train,
        train_labels=None if images.train_labels is None else images.train_labels[train_rows],
        held_out=held_out,
        held_out_labels=None if images.held_out_labels is None else images.held_out_labels[held_out_rows],
    )


def _whole(samples: Samples, workers: int, what: str | None) -> tuple[Tensor, Tensor]:
    """All images of files, and the rows that they are of: others than asked for in place of those that are bad."""
    stored = torch.empty(tuple(samples.shape), dtype=samples.dtype)
    rows = torch.empty(len(samples), dtype=torch.int64)
    chunks = torch.arange(len(samples)).split(_CHUNK)
    loader = DataLoader(Rows(samples), batch_size=None, sampler=chunks, num_workers=workers)
    with progress_bar(len(samples), what or "", "image", shown=what is not None) as bar:
        for asked, loaded in zip(chunks, loader, strict=True):
            if isinstance(loaded, Exception):
                raise loaded
            stored[asked] = loaded.stored
            rows[asked] = loaded.rows
            bar.update(len(asked))
    bad = (rows != torch.arange(len(samples))).nonzero().flatten().tolist()
    if bad and isinstance(samples, Pictures) and os.environ.get("RANK", "0") == "0":
        print(
            f"vadiff: {len(bad):,} of {len(samples):,} pictures cannot be read, others take their places; one is "
            f"{samples.name(bad[0])}",
            file=sys.stderr,
        )
    return stored, rows


def _host_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
