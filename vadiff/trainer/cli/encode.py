"""`vadiff encode`."""

import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ...files import check_writable
from ..config_schema import DATASETS, LATENT_STD, ON_BAD_IMAGE
from .command import command
from .parameters import PATH, TEXT, WHOLE_NUMBER, Choice, Options, flag, group, option, usage_error

if TYPE_CHECKING:
    from ..data import Images
    from ..data.latents import LatentFacts

NAME = "encode"
HELP = "encode a data set with a VAE, to train on its latents"
DESCRIPTION = (
    "Encode the images of a data set with an AutoencoderKL of diffusers, and write the mean and log-variance of each "
    "latent, from which training draws, to memory-mapped files, with the labels and the statistics that standardise "
    "them. A call that was killed goes on where it stopped when it is repeated. Train on them with --dataset latents."
)
EXAMPLES = (
    "vadiff encode --vae sd-vae --data pictures --image-size 256 --out latents",
    "vadiff encode --vae sd-vae --data 'train-{000000..000099}.tar' --flips --out latents",
)
_WORKERS = 8  # at most, by default


@command(NAME, HELP, DESCRIPTION, EXAMPLES)
@group(
    "Images",
    option("--data", TEXT, "PATH", "path of the data set, as for `vadiff train`"),
    option(
        "--dataset", Choice([name for name in DATASETS if name != "latents"]), None, "data set", default="images"
    ),
    option("--image-size", WHOLE_NUMBER, "N", "in pixels, for dataset images", default=256),
    option(
        "--on-bad-image", Choice(ON_BAD_IMAGE), None,
        "pictures without a label, or in a damaged shard: error stops, skip leaves them out; one that is listed and "
        "cannot be decoded is always an error", default="error",
    ),
    flag("--flips", "encode the mirrored training images too: a mirrored latent is not that of the mirrored image"),
)  # fmt: skip
@group(
    "Latents",
    option(
        "--vae", PATH, "PATH",
        "local folder of the VAE, that AutoencoderKL.save_pretrained wrote, or of a pipeline that has one",
        required=True,
    ),
    option("--out", PATH, "DIR", "folder of the latents", required=True),
    flag("--samples", "store one drawn latent of each image, half as large, in place of mean and log-variance"),
    option("--seed", WHOLE_NUMBER, "N", "of what is drawn with --samples", default=0),
    option("--dtype", Choice(("float16", "float32")), None, "of the stored numbers", default="float16"),
    option("--shard", WHOLE_NUMBER, "N", "latents per file", default=8192),
)  # fmt: skip
@group(
    "Machine",
    option("--batch-size", WHOLE_NUMBER, "N", "images at a time in the VAE", default=64),
    option(
        "--workers", WHOLE_NUMBER, "N",
        f"processes that read pictures; default: one per CPU, {_WORKERS} at most; 0 where images are in memory",
    ),
    option("--device", TEXT, "DEVICE", "auto (a GPU if there is one), cpu, cuda:N", default="auto"),
)  # fmt: skip
def run(options: Options) -> None:
    from ..data.autoencoder import open_autoencoder
    from ..data.encode import EncodingOptions, encode_images, going_on
    from ..next_steps import next_steps, training_on_latents
    from ..progress import progress_bar
    from ..training import TrainConfig
    from ..training.data_set import load_images
    from ..training.stopping import stoppable

    try:
        config = TrainConfig(
            dataset=options.dataset, data=options.data, image_size=options.image_size, device=options.device,
            on_bad_image=options.on_bad_image,
        )  # fmt: skip
        device = config.torch_device()
    except ValueError as error:
        usage_error(str(error))
    check_writable(options.out, folder=True)
    vae = open_autoencoder(options.vae, device)
    if options.dataset == "images":  # before thousands of files are listed
        vae.latent_shape((vae.channels, options.image_size, options.image_size))
    images = load_images(config)
    try:
        chosen = EncodingOptions(
            samples=options.samples, mirrored=options.flips, dtype=options.dtype, shard=options.shard,
            seed=options.seed, batch_size=options.batch_size, workers=_workers(options, images),
        )  # fmt: skip
    except ValueError as error:
        usage_error(str(error))
    source = {"dataset": options.dataset, "data": options.data, "size": images.shape[-1]}
    number = len(images.train) * (2 if options.flips else 1) + len(images.held_out)
    encoded, started = 0, time.perf_counter()
    with stoppable(going_on(options.out)), progress_bar(number, NAME, "image") as bar:

        def progress(images: int, now: bool) -> None:
            nonlocal encoded
            if now:
                encoded += images
                bar.update(images)
            else:
                bar.total -= images

        facts = encode_images(images, vae, options.vae, options.out, chosen, source=source, on_images=progress)
    seconds = time.perf_counter() - started
    kept = f", {number - encoded:,} were there" if encoded < number else ""
    speed = f"{seconds:.1f} s ({encoded / seconds:.0f} images/s)"
    print(f"{encoded:,} images encoded in {speed}{kept}; latents in {options.out}")
    print(_summary(options.out, facts))
    print(next_steps(training_on_latents(options.out, facts.encoding.latent_shape)))


def _summary(out: Path, facts: "LatentFacts") -> str:
    """Shape and statistics of the latents, and the flags to train on them."""
    encoding = facts.encoding
    channels, height, width = encoding.latent_shape
    rows = [f"{' x '.join(map(str, encoding.pictures_of))} pixels are {channels} x {height} x {width} latents"]
    rows += [
        f"{name:>5} per channel: {' '.join(f'{number:9.4f}' for number in numbers)}"
        for name, numbers in (("mean", encoding.mean), ("std", encoding.std))
    ]
    command = [
        "--dataset",
        "latents",
        "--data",
        str(out),
        "--image-size",
        str(height),
        "--image-channels",
        str(channels),
    ]
    return "\n".join(
        [*rows, f"Train on them with {shlex.join([*command, '--sigma-data', str(LATENT_STD)])} --no-flips"]
    )


def _workers(options: Options, images: "Images") -> int:
    import torch

    if options.workers is not None:
        return int(options.workers)
    return 0 if isinstance(images.train, torch.Tensor) else min(_WORKERS, os.cpu_count() or 1)
