"""`vadiff evaluate`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.fidelity import FEATURES, LAYERS, METRICS
from .drawing import add_drawing_options, add_seed_options, devices_of, generation_of, seeds_of, with_vae

if TYPE_CHECKING:
    from ..report.comparison import Comparison

NAME = "evaluate"
HELP = "FID and other image metrics; held-out loss, gradients and gap to the optimal loss per noise level"
DESCRIPTION = (
    "For a run directory: draw images, compare them with the training images, and measure the loss on held-out images "
    "per noise level with averaged and raw weights. Writes metrics.json, the images, held-out.csv and pictures to "
    "RUN/evaluation/step-<n>, where `vadiff report` finds them; each as soon as it is measured, so that a further call "
    "with the same options goes on from there. Digits are compared by a small classifier of theirs, which the first "
    "call trains in seconds, all other images by Inception, whose weights the first call downloads. For a folder of "
    "images or an .npz archive: compare it with the images of --reference. With --save-reference: write the statistics "
    "of the images' features, and nothing else."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", type=Path, metavar="RUN|FOLDER", help="run directory, folder of images or .npz archive"
    )
    parser.add_argument(
        "--metrics", nargs="*", choices=METRICS, default=["fid", "kid", "prc"],
        help="prc: precision and recall; isc: Inception score; --metrics alone: none",
    )  # fmt: skip
    add_seed_options(parser, images=5000)
    parser.add_argument(
        "--repeats", type=int, metavar="N", default=1,
        help="sets of --images to draw, each from seeds of its own; metrics are means over the sets",
    )  # fmt: skip
    parser.add_argument("--no-keep-images", action="store_true", help="do not write the images to the folder")
    add_comparison_options(parser)
    parser.add_argument(
        "--save-reference", type=_archive, metavar="FILE.npz", default=None,
        help="write mean and covariance of the features of the images (of a run: its training images), to be a "
        "--reference later, and end",
    )  # fmt: skip
    levels = parser.add_argument_group("per noise level (runs only)")
    levels.add_argument("--no-held-out", action="store_true", help="skip the loss on held-out images")
    levels.add_argument("--held-out-images", type=int, metavar="N", default=None, help="maximum; default: all")
    levels.add_argument("--gradients", action="store_true", help="gradient norm per level, cosines between levels")
    levels.add_argument("--gradient-images", type=int, metavar="N", default=512, help="training images per level")
    levels.add_argument("--gap", action="store_true", help="gap to J*, the lowest loss any network can have")
    levels.add_argument("--gap-images", type=int, metavar="N", default=1000, help="training images per level")
    levels.add_argument(
        "--gap-directly", action="store_true",
        help="with --gap: distance to the posterior mean of all training images in place of loss minus J*; without the "
        "noise of J*; the data set must fit the device as float32",
    )  # fmt: skip
    add_drawing_options(parser)


def add_comparison_options(parser: argparse.ArgumentParser) -> None:
    """Options shared by `evaluate` and `ema`: real images, features, layer and weights of the network, cache."""
    parser.add_argument(
        "--reference", type=Path, metavar="PATH", default=None,
        help="real images: folder, .npz or run directory; or statistics of their features, for fid alone: NVlabs' .npz "
        "or .pkl, or what --save-reference wrote; default: the run's training images, which a run on latents does not "
        "have",
    )  # fmt: skip
    parser.add_argument(
        "--features", choices=FEATURES, default=None,
        help="network whose features are compared; default: digits for the data set digits, else inception",
    )  # fmt: skip
    parser.add_argument(
        "--layer", choices=LAYERS, default="2048", help="Inception layer of fid, kid and prc; 2048 is the usual one"
    )
    parser.add_argument(
        "--inception-weights", type=Path, metavar="PATH", default=None,
        help="torch-fidelity's weights-inception-2015-12-05-6726825d.pth, for machines without internet",
    )  # fmt: skip
    parser.add_argument(
        "--dinov2-weights", type=Path, metavar="PATH", default=None,
        help="with --features dinov2: Meta's dinov2_vitl14_pretrain.pth",
    )  # fmt: skip
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        default=None,
        help="cache of the real images' features and the digits classifier; default: the user's cache",
    )


def comparison_of(options: argparse.Namespace) -> "Comparison":
    """The comparison options; a missing weights file is a usage error."""
    from ..report.comparison import Comparison

    for name in ("inception_weights", "dinov2_weights"):
        weights = getattr(options, name)
        if weights is not None and not weights.is_file():
            options.parser.error(f"argument --{name.replace('_', '-')}: {weights} is not a file")
    names = ("metrics", "reference", "features", "layer", "inception_weights", "dinov2_weights", "cache")
    return Comparison(**{name: getattr(options, name) for name in names})


def run(options: argparse.Namespace) -> None:
    from ..report.comparison import evaluate_pictures, save_statistics
    from ..report.evaluate import evaluate_run
    from ..training import open_run

    comparison = comparison_of(options)
    if options.gradient_images < 2:
        options.parser.error(f"argument --gradient-images: {options.gradient_images}, expected at least 2")
    if options.repeats < 1:
        options.parser.error(f"argument --repeats: {options.repeats}, expected at least 1")
    if options.gap_images < 2:
        options.parser.error(f"argument --gap-images: {options.gap_images}, expected at least 2")
    if options.gap_directly and not options.gap:
        options.parser.error("argument --gap-directly: expected with --gap")
    if not options.target.exists():
        options.parser.error(
            f"{options.target} does not exist, expected a run directory, a folder of images or an .npz"
        )
    try:
        if options.save_reference is not None:
            save_statistics(options.target, comparison, options.save_reference, devices_of(options)[0])
            return
        if (options.target / "config.yaml").exists():
            if not (options.metrics or options.gradients or options.gap) and options.no_held_out:
                options.parser.error("nothing to measure: no --metrics, --no-held-out, no --gradients and no --gap")
            opened = with_vae(open_run(options.target), options)
            evaluate_run(
                opened,
                generation_of(options, opened),
                seeds_of(options),
                comparison,
                repeats=options.repeats,
                keep_images=not options.no_keep_images,
                held_out_images=0 if options.no_held_out else options.held_out_images,
                gradient_images=options.gradient_images if options.gradients else 0,
                gap_images=options.gap_images if options.gap else 0,
                gap_directly=options.gap_directly,
            )
            return
        for name in ("gradients", "gap"):
            if getattr(options, name):
                options.parser.error(f"argument --{name}: {options.target} is not a run directory")
        if options.reference is None and set(options.metrics) != {"isc"}:
            options.parser.error("argument --reference: required to compare a folder of images")
        evaluate_pictures(options.target, comparison, devices_of(options)[0])
    except (ValueError, FileNotFoundError) as error:
        options.parser.error(str(error))


def _archive(text: str) -> Path:
    if not text.endswith(".npz"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a file ending in .npz")
    return Path(text)
