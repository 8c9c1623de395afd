"""`vadiff train`."""

import dataclasses
import os
import sys
from pathlib import Path

import torch

from ...files import check_writable
from ...ops import backends
from ..config import TrainConfig
from ..config_schema import POSTERIOR_MEAN
from ..presets import ABOUT, PRESETS
from .command import command
from .config_flags import config_flags, given_fields
from .parameters import PATH, Choice, Options, flag, group, not_together, option, usage_error

NAME = "train"
HELP = "train a denoiser"
DESCRIPTION = """\
Train a denoiser, and write a run directory: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, samples/.

Options that are not given take the preset's value: `vadiff train --preset NAME --help` shows it, without --preset those
of digits. Several GPUs: torchrun --nproc-per-node=N -m vadiff train.

Exit status: 0 when training is finished, 1 for an error that you can fix (the message says how), 2 for invalid options,
143 after SIGTERM and 130 after SIGINT, with a checkpoint for --resume. Under torchrun the status is torchrun's own: 1
for anything but 0; a signal still leaves a checkpoint.
"""
EXAMPLES = (
    "vadiff train --preset digits                                   # a minute on a CPU; run in runs/digits",
    "vadiff train --preset digits --weighting constant --out runs/constant",
    "vadiff train --preset digits --weighting-options strength=0.5 --sigma-rel 0.05,0.1 --out runs/half",
    "vadiff train --resume --out runs/digits --steps 900            # go on from the latest checkpoint",
)


@command(NAME, HELP, DESCRIPTION, EXAMPLES, tables={"Presets": {name: ABOUT[name] for name in PRESETS}})
@group(
    "Start",
    option("--preset", Choice(PRESETS), "NAME", "what to train and how: a name of the list below", is_eager=True),
    option("--config", PATH, "FILE", "a config.yaml instead of a preset"),
    option("--out", PATH, "DIR", "run directory; default: runs/PRESET"),
    flag("--resume", "resume the run in --out from its latest checkpoint, if it has one"),
    flag("--overwrite", "replace the run in --out"),
    flag(
        "--describe",
        "print the size of the network, the steps, the memory of weights and optimiser and the size of the files, and "
        "end: nothing is trained or written",
    ),
)
@config_flags()
@not_together("preset", "config")
@not_together("resume", "overwrite")
def run(options: Options) -> None:
    from ...levels import Information
    from ..next_steps import after_training
    from ..report import held_out_table
    from ..training import Stopped, train
    from ..training.size import describe

    config, out = training_config(options), _out(options)
    if options.describe:
        print(describe(config))
        return
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires it on GPUs
    main_rank = os.environ.get("RANK", "0") == "0"
    if main_rank:
        check_writable(out, folder=True)  # before the line that says where the run is
        kimg = config.steps * config.batch_size / 1000
        print(
            f"Training {config.dataset}, weighting {config.weighting}, {config.steps} steps ({kimg:g} kimg); run "
            f"directory {out}"
        )
        if config.target == POSTERIOR_MEAN and config.weighting != "constant":
            print(
                f"Posterior-mean targets take a part out of the loss, most at high noise, and {config.weighting} was "
                "not measured with them: if it follows the loss, it raises those levels. --weighting constant is plain."
            )
        if config.levels == "information" and config.weighting != "constant":
            print(
                f"Levels information divide by the weight: {config.weighting} moves the draws, and what a noise level "
                "contributes stays the same. --weighting constant is plainer."
            )
        if config.levels == "information" and config.form().prediction == "epsilon":
            print(
                "Levels by information gave worse results than uniform timesteps for epsilon with linear betas, on "
                "digits: see docs/levels.md."
            )
    try:
        trained = train(config, out=out, resume=options.resume, overwrite=options.overwrite)
    except Stopped as stop:
        if main_rank:
            print(f"vadiff: {stop}", file=sys.stderr)
        raise SystemExit(stop.exit_code) from None
    except KeyboardInterrupt as stop:  # before the first step, after the last, or a second one
        raise KeyboardInterrupt(*(stop.args or (_going_on(options),))) from None
    except ValueError as error:
        usage_error(str(error))
    if main_rank:
        print("\nEDM's loss on held-out images per noise level, averaged weights:")
        print(held_out_table({config.weighting: trained.held_out}))
        if config.target == POSTERIOR_MEAN:
            print("\nThe training loss is the error against posterior means, the held-out loss that against images.")
        if isinstance(trained.levels, Information):
            print(f"\nNoise levels: {trained.levels.state}.")
        print(f"\nWritten to {out}\n{after_training(out, config.dataset)}")


def _going_on(options: Options) -> str:
    """What to type after an interrupt between steps."""
    with_resume = "" if options.resume else " with --resume"
    in_place = " in place of --overwrite" if options.overwrite else ""
    return (
        f"outside the training steps: the same command{with_resume}{in_place} goes on from the latest checkpoint, or "
        "starts if there is none"
    )


def training_config(options: Options) -> TrainConfig:
    """The config of the preset, file or resumed run, with the given flags; an invalid one is a usage error."""
    out = _out(options)
    if out.exists() and not out.is_dir():
        usage_error(f"argument --out: {out} is a file, expected a folder")
    saved = out / "config.yaml"
    try:
        if options.preset is not None:
            base = PRESETS[options.preset]
        elif options.config is not None:
            base = TrainConfig.load(options.config)
        elif options.resume and saved.is_file():
            base = TrainConfig.load(saved)
        else:
            usage_error("one of the arguments --preset --config is required")
        config = dataclasses.replace(base, **given_fields(options))
        backends.select(config.backend, torch.empty(0, device=config.torch_device()))
    except (ValueError, RuntimeError) as error:
        usage_error(str(error))
    return config


def _out(options: Options) -> Path:
    return options.out if options.out is not None else Path("runs") / (options.preset or "train")
