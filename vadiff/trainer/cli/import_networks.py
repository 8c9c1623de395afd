"""`vadiff import`."""

import argparse
from pathlib import Path

NAME = "import"
HELP = "make a run directory of NVlabs' EDM2 networks"
DESCRIPTION = (
    "Make a run directory of a network in one of NVlabs' files of EDM2 (config G), or of the snapshots of a training "
    "of theirs, for `vadiff sample`, `vadiff evaluate` and `vadiff ema`. The files are pickles, which can hold "
    "programs: only numbers are taken from them, and nothing in them is run. The run cannot be trained on, as the "
    "files have no state of an optimiser. See docs/import.md."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE.pkl",
        help="a network; or snapshots of one training, with thousands of images and width in their names, as in "
        "network-snapshot-0008388-0.050.pkl",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="the run directory")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument(
        "--data", metavar="PATH", default=None,
        help="images or latents that it was trained on, as for `vadiff train`; needed only to measure on them",
    )  # fmt: skip
    parser.add_argument(
        "--vae", type=Path, metavar="PATH", default=None,
        help="of a network that draws latents: folder of Stable Diffusion's VAE (diffusers), which decodes them",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=int, metavar="N", default=2048,
        help="images per step of its training, by which the images in a file's name become steps",
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    from ..importing import import_networks
    from ..next_steps import next_steps

    if options.batch_size < 1:
        options.parser.error(f"argument --batch-size: {options.batch_size}, expected at least 1")
    done = import_networks(
        options.files, options.out, data=options.data, vae=options.vae, batch_size=options.batch_size,
        overwrite=options.overwrite,
    )  # fmt: skip
    network = done.network
    channels, height, width = network.image_shape
    classes = f"{network.classes} classes" if network.classes else "no classes"
    number = sum(value.numel() for value in network.parameters.values())
    print(f"{done.source}: step {done.step}, {number:,} parameters, {channels} x {height} x {width}, {classes}")
    print(f"{options.out}: checkpoint step-{done.step}, {done.snapshots} snapshots")
    if network.classes:
        print("Without a class it draws nothing sensible: for --guidance, name another network with --guide")
    if done.config.dataset == "latents" and options.vae is None:
        print("It draws latents: to sample it, import it again with --vae PATH and --overwrite")
    else:
        print(next_steps(("sample", options.out, "--images", "16")))
