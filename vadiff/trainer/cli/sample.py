"""`vadiff sample`."""

from .command import command
from .drawing import drawing_options, generation_of, seed_options, seeds_of, with_vae
from .parameters import PATH, Options, argument, flag, group, option, usage_error

NAME = "sample"
HELP = "draw images from a run"
DESCRIPTION = (
    "Draw images from a run and write them as a folder of PNG files, or as one .npz archive (arr_0 [N, H, W, C] uint8, "
    "arr_1 the classes). An image depends on its seed and on how it is drawn, never on the batch size, the number of "
    "devices or the other images: --first-seed 0 --images 50 on one machine and --first-seed 50 --images 50 on another "
    "give the same 100 images as one call."
)
EXAMPLES = (
    "vadiff sample runs/digits                                # 64 images in runs/digits/generated",
    "vadiff sample runs/digits --seeds 0-9,42 --out few",
    "vadiff sample runs/digits --images 50000 --out many.npz --devices cuda:0,cuda:1",
)


@command(NAME, HELP, DESCRIPTION, EXAMPLES)
@argument("run_directory", "RUN", "run directory that `vadiff train` wrote")
@group(
    "Results",
    option("--out", PATH, "PATH", "folder for PNG files, or a file ending in .npz; default: RUN/generated"),
    flag("--overwrite", "replace the images in --out"),
)
@seed_options(images=64)
@drawing_options()
def run(options: Options) -> None:
    from ...sampling.generation import generate
    from ..next_steps import after_sampling
    from ..pictures import PictureWriter
    from ..progress import progress_bar
    from ..report.drawn_images import drawn_so_far_kept
    from ..training import open_run

    seeds = seeds_of(options)
    opened = with_vae(open_run(options.run_directory), options)
    generation = generation_of(options, opened)
    out = options.out or options.run_directory / "generated"
    denoiser = opened.denoiser(generation.weights, step=generation.step)
    assert denoiser.image_shape is not None  # every run's denoiser has one
    try:
        shape = opened.encoding.picture_shape(denoiser.image_shape)
        writer = PictureWriter(out, seeds, shape, labels=denoiser.labels > 0, overwrite=options.overwrite)
        with writer, drawn_so_far_kept(writer), progress_bar(len(seeds), NAME, "image") as bar:
            for batch in generate(opened, seeds, generation):
                writer.write(batch.start, batch.images, batch.labels)
                bar.update(len(batch.images))
    except (ValueError, FileExistsError) as error:
        usage_error(str(error))
    print(f"{len(seeds)} images in {out}\n{after_sampling(out, options.run_directory, opened.config.dataset)}")
