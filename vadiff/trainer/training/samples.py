"""Grids of samples during training, always from the same seeds."""

import math
from pathlib import Path

import torch

from ...extras import import_extra
from ...files import replacing
from ...models import Denoiser
from ...models.parameterisation import sigma_range
from ...pixels import normalised, pixels
from ...sampling.generation import default_generation, solve, with_options
from ..config import TrainConfig
from ..data import PIXELS, Encoding, Images
from ..pictures import image_grid


def check_grids(config: TrainConfig, images: Images) -> None:
    """Make a picture if the run will have grids: a VAE that is missing is found now, not hours later.

    Raises:
        DataError: the VAE that decodes latents is missing, or another than that which encoded them.
    """
    if config.samples_every:
        images.encoding.pictures(torch.zeros(1, *images.shape))


def save_grid(run: Path, step: int, denoiser: Denoiser, process: str, count: int, encoding: Encoding = PIXELS) -> None:
    """Draw `count` samples and write samples/step-<step>.png.

    They have the seeds 0, 1, ..., classes in turn, and the default solver of the process, as in `vadiff sample`.

    Args:
        run: the run directory.
        step: for the file's name.
        denoiser: in eval mode, with its image_shape.
        process: of the run, for the solver.
        count: number of samples.
        encoding: of the run's images, which makes pictures of the samples.

    Raises:
        DataError: the VAE that decodes latents is missing, or another than that which encoded them.
        MissingExtraError: Pillow is not installed.
    """
    device = next(denoiser.parameters()).device
    generation = with_options(default_generation(process, sigmas=sigma_range(denoiser.form)), batch_size=count)
    images = solve(denoiser, range(count), generation, device)  # not finite if the weights have diverged: no error
    pictures = encoding.pictures(images.to(device)).cpu()
    picture = pixels(image_grid(normalised(pictures), columns=math.ceil(math.sqrt(count))))
    picture = picture.squeeze(2) if picture.shape[2] == 1 else picture  # grey
    with replacing(run / "samples" / f"step-{step}.png") as partial:
        import_extra("PIL.Image", "train").fromarray(picture.numpy()).save(partial, format="PNG")
