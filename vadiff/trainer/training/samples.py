"""Grids of samples during training, always from the same seeds."""

import math
from pathlib import Path

import torch
from torch import Tensor

from ...extras import import_extra
from ...files import replacing
from ...models import Denoiser
from ...pixels import pixels
from ...sampling import heun
from ..pictures import image_grid


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
    picture = pixels(image_grid(images, columns=math.ceil(math.sqrt(count))))
    picture = picture.squeeze(2) if picture.shape[2] == 1 else picture  # grey
    with replacing(run / "samples" / f"step-{step}.png") as partial:
        import_extra("PIL.Image", "train").fromarray(picture.numpy()).save(partial, format="PNG")
