"""`vadiff import`."""

from .command import command
from .parameters import PATH, TEXT, WHOLE_NUMBER, Options, argument, flag, option, usage_error

NAME = "import"
HELP = "make a run directory of NVlabs' EDM2 networks"
DESCRIPTION = (
    "Make a run directory of a network in one of NVlabs' files of EDM2 (config G), or of the snapshots of a training "
    "of theirs, for `vadiff sample`, `vadiff evaluate` and `vadiff ema`. The files are pickles, which can hold "
    "programs: only numbers are taken from them, and nothing in them is run. The run cannot be trained on, as the "
    "files have no state of an optimiser. See docs/import.md."
)
EXAMPLES = (
    "vadiff import edm2-img64-s.pkl --out runs/edm2-s",
    "vadiff import network-snapshot-0008388-0.050.pkl network-snapshot-0008388-0.100.pkl --out runs/phema",
)


@command(NAME, HELP, DESCRIPTION, EXAMPLES)
@argument(
    "files", "FILE.pkl...",
    "a network; or snapshots of one training, with thousands of images and width in their names, as in "
    "network-snapshot-0008388-0.050.pkl", several=True,
)  # fmt: skip
@option("--out", PATH, "DIR", "the run directory", required=True)
@flag("--overwrite", "replace the run in --out")
@option(
    "--data", TEXT, "PATH",
    "images or latents that it was trained on, as for `vadiff train`; needed only to measure on them",
)  # fmt: skip
@option(
    "--vae", PATH, "PATH",
    "of a network that draws latents: folder of Stable Diffusion's VAE (diffusers), which decodes them",
)  # fmt: skip
@option(
    "--batch-size", WHOLE_NUMBER, "N",
    "images per step of its training, by which the images in a file's name become steps", default=2048,
)  # fmt: skip
def run(options: Options) -> None:
    from ..importing import import_networks
    from ..next_steps import next_steps

    if options.batch_size < 1:
        usage_error(f"argument --batch-size: {options.batch_size}, expected at least 1")
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
