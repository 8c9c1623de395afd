"""Grids of samples on the way, always from the same seeds."""

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from ...extras import import_extra
from ...models import Denoiser
from ...pixels import pixels
from ...sampling import heun


def save_grid(run: Path, step: int, denoiser: Denoiser, count: int) -> None:
    """Draw `count` samples (seeds 0, 1, ...; classes in turn) and write samples/step-<step>.png.

    Args:
        run: the run directory.
        step: for the file's name.
        denoiser: in eval mode, with its image_shape.
        count: number of samples.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    device = next(denoiser.parameters()).device
    assert denoiser.image_shape is not None
    classes = torch.arange(count, device=device) % max(denoiser.labels, 1)

    def denoise(noisy: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(noisy, sigma, classes if denoiser.labels else None)

    images = heun(denoise, denoiser.image_shape, range(count), batch_size=count, device=device)
    picture = pixels(_grid(images, columns=math.ceil(math.sqrt(count))))
    picture = picture.squeeze(2) if picture.shape[2] == 1 else picture  # grey
    folder = run / "samples"
    folder.mkdir(exist_ok=True)
    partial = folder / f".step-{step}.png"
    import_extra("PIL.Image", "train").fromarray(picture.numpy()).save(partial, format="PNG")
    os.replace(partial, folder / f"step-{step}.png")


def _grid(images: Tensor, columns: int) -> Tensor:
    """[N, C, H, W] → [rows·(H+1) - 1, columns·(W+1) - 1, C], white lines between the images and in empty places."""
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    cells = torch.full((rows * columns, channels, height + 1, width + 1), 1.0)
    cells[:count, :, :height, :width] = images
    picture = cells.view(rows, columns, channels, height + 1, width + 1).permute(0, 3, 1, 4, 2)
    return picture.reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1]
