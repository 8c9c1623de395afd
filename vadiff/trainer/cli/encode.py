"""`vadiff encode`."""

import argparse
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ...files import check_writable
from ..config_schema import DATASETS, LATENT_STD, ON_BAD_IMAGE

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
_WORKERS = 8  # at most, by default


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vae", type=Path, metavar="PATH", required=True,
        help="local folder of the VAE, that AutoencoderKL.save_pretrained wrote, or of a pipeline that has one",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder of the latents")
    parser.add_argument("--data", metavar="PATH", default=None, help="path of the data set, as for `vadiff train`")
    parser.add_argument(
        "--dataset", choices=[name for name in DATASETS if name != "latents"], default="images", help="data set"
    )
    parser.add_argument("--image-size", type=int, metavar="N", default=256, help="in pixels, for dataset images")
    parser.add_argument(
        "--on-bad-image", choices=ON_BAD_IMAGE, default="error",
        help="pictures without a label, or in a damaged shard: error stops, skip leaves them out; one that is listed "
        "and cannot be decoded is always an error",
    )  # fmt: skip
    parser.add_argument(
        "--samples", action="store_true",
        help="store one drawn latent of each image, half as large, in place of mean and log-variance",
    )  # fmt: skip
    parser.add_argument(
        "--flips", action="store_true",
        help="encode the mirrored training images too: a mirrored latent is not that of the mirrored image",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the stored numbers")
    parser.add_argument("--shard", type=int, metavar="N", default=8192, help="latents per file")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of what is drawn with --samples")
    parser.add_argument("--batch-size", type=int, metavar="N", default=64, help="images at a time in the VAE")
    parser.add_argument(
        "--workers", type=int, metavar="N", default=None,
        help=f"processes that read pictures; default: one per CPU, {_WORKERS} at most; 0 where images are in memory",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda:N")


def run(options: argparse.Namespace) -> None:
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
        options.parser.error(str(error))
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
        options.parser.error(str(error))
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


def _workers(options: argparse.Namespace, images: "Images") -> int:
    import torch

    if options.workers is not None:
        return int(options.workers)
    return 0 if isinstance(images.train, torch.Tensor) else min(_WORKERS, os.cpu_count() or 1)
