"""`vadiff evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.fidelity import FEATURES, LAYERS, METRICS
from .command import command
from .drawing import devices_of, drawing_options, generation_of, seed_options, seeds_of, with_vae
from .parameters import (
    PATH,
    WHOLE_NUMBER,
    Choice,
    Decorator,
    Listed,
    Options,
    Value,
    argument,
    flag,
    group,
    option,
    usage_error,
)

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
EXAMPLES = (
    "vadiff evaluate runs/digits                                # 5,000 images and the held-out loss",
    "vadiff evaluate runs/digits --metrics none --gap           # only per noise level",
    "vadiff evaluate generated --reference pictures --metrics fid,kid",
)


def comparison_options() -> Decorator[Any]:
    """Options shared by `evaluate` and `ema`: real images, features, layer and weights of the network, cache."""
    return group(
        "Comparison with real images",
        option(
            "--reference", PATH, "PATH",
            "real images: folder, .npz or run directory; or statistics of their features, for fid alone: NVlabs' .npz "
            "or .pkl, or what --save-reference wrote; default: the run's training images, which a run on latents does "
            "not have",
        ),
        option(
            "--features", Choice(FEATURES), None,
            "network whose features are compared; default: digits for the data set digits, else inception",
        ),
        option(
            "--layer", Choice(LAYERS), None, "Inception layer of fid, kid and prc; 2048 is the usual one",
            default="2048",
        ),
        option(
            "--inception-weights", PATH, "PATH",
            "torch-fidelity's weights-inception-2015-12-05-6726825d.pth, for machines without internet",
        ),
        option("--dinov2-weights", PATH, "PATH", "with --features dinov2: Meta's dinov2_vitl14_pretrain.pth"),
        option(
            "--cache", PATH, "DIR",
            "cache of the real images' features and the digits classifier; default: the user's cache",
        ),
    )  # fmt: skip


def comparison_of(options: Options) -> "Comparison":
    """The comparison options; a missing weights file is a usage error."""
    from ..report.comparison import Comparison

    for name in ("inception_weights", "dinov2_weights"):
        weights = getattr(options, name)
        if weights is not None and not weights.is_file():
            usage_error(f"argument --{name.replace('_', '-')}: {weights} is not a file")
    names = ("metrics", "reference", "features", "layer", "inception_weights", "dinov2_weights", "cache")
    return Comparison(**{name: getattr(options, name) for name in names})


def _archive(text: str) -> Path:
    if not text.endswith(".npz"):
        raise ValueError(f"{text!r}, expected a file ending in .npz")
    return Path(text)


@command(NAME, HELP, DESCRIPTION, EXAMPLES)
@argument("target", "RUN|FOLDER", "run directory, folder of images or .npz archive")
@group(
    "Images and metrics",
    option(
        "--metrics", Listed(Choice(METRICS)), None, "prc: precision and recall; isc: Inception score",
        default=["fid", "kid", "prc"],
    ),
    option(
        "--repeats", WHOLE_NUMBER, "N",
        "sets of --images to draw, each from seeds of its own; metrics are means over the sets", default=1,
    ),
    flag("--no-keep-images", "do not write the images to the folder"),
)  # fmt: skip
@seed_options(images=5000)
@comparison_options()
@group(
    "Statistics of features",
    option(
        "--save-reference", Value("FILE.npz", _archive), "FILE.npz",
        "write mean and covariance of the features of the images (of a run: its training images), to be a --reference "
        "later, and end",
    ),
    flag("--overwrite", "replace the file of --save-reference"),
)  # fmt: skip
@group(
    "Per noise level (runs only)",
    flag("--no-held-out", "skip the loss on held-out images"),
    option("--held-out-images", WHOLE_NUMBER, "N", "maximum; default: all"),
    flag("--gradients", "gradient norm per level, cosines between levels"),
    option("--gradient-images", WHOLE_NUMBER, "N", "training images per level", default=512),
    flag("--gap", "gap to J*, the lowest loss any network can have"),
    option("--gap-images", WHOLE_NUMBER, "N", "training images per level", default=1000),
    flag(
        "--gap-directly",
        "with --gap: distance to the posterior mean of all training images in place of loss minus J*; without the "
        "noise of J*; the data set must fit the device as float32",
    ),
)
@drawing_options()
def run(options: Options) -> None:
    from ..report.comparison import evaluate_pictures, save_statistics
    from ..report.evaluate import evaluate_run
    from ..training import open_run

    comparison = comparison_of(options)
    if options.gradient_images < 2:
        usage_error(f"argument --gradient-images: {options.gradient_images}, expected at least 2")
    if options.repeats < 1:
        usage_error(f"argument --repeats: {options.repeats}, expected at least 1")
    if options.gap_images < 2:
        usage_error(f"argument --gap-images: {options.gap_images}, expected at least 2")
    if options.gap_directly and not options.gap:
        usage_error("argument --gap-directly: expected with --gap")
    if not options.target.exists():
        usage_error(f"{options.target} does not exist, expected a run directory, a folder of images or an .npz")
    if options.save_reference is not None and options.save_reference.exists() and not options.overwrite:
        usage_error(
            f"argument --save-reference: {options.save_reference} exists already: replace it with --overwrite, or name "
            "another"
        )
    try:
        if options.save_reference is not None:
            save_statistics(options.target, comparison, options.save_reference, devices_of(options)[0])
            return
        if (options.target / "config.yaml").exists():
            if not (options.metrics or options.gradients or options.gap) and options.no_held_out:
                usage_error("nothing to measure: no --metrics, --no-held-out, no --gradients and no --gap")
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
                usage_error(f"argument --{name}: {options.target} is not a run directory")
        if options.reference is None and set(options.metrics) != {"isc"}:
            usage_error("argument --reference: required to compare a folder of images")
        evaluate_pictures(options.target, comparison, devices_of(options)[0])
    except (ValueError, FileNotFoundError) as error:
        usage_error(str(error))
