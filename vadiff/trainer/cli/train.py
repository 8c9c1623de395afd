"""`vadiff train`."""

import argparse
import dataclasses
import os
from pathlib import Path

import torch

from ...ops import backends
from ..config import TrainConfig
from ..config_schema import POSTERIOR_MEAN
from ..presets import ABOUT, PRESETS
from .config_flags import add_config_flags, given_fields

NAME = "train"
HELP = "train a denoiser"
DESCRIPTION = (
    "Train a denoiser, and write a run directory: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, samples/. "
    "Flags that are not given take the preset's value. Several GPUs: torchrun --nproc-per-node=N -m vadiff train. Exit "
    "status: 0 when training is finished, 1 for an error that you can fix (the message says how), 2 for invalid flags, "
    "143 after SIGTERM and 130 after SIGINT, with a checkpoint for --resume. Under torchrun the status is torchrun's "
    "own: 1 for anything but 0; a signal still leaves a checkpoint."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about = "; ".join(f"{name}: {ABOUT[name]}" for name in PRESETS)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--preset", choices=list(PRESETS), default=argparse.SUPPRESS, help=about)
    source.add_argument(
        "--config", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="a config.yaml instead of a preset"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=argparse.SUPPRESS, help="run directory; default: runs/PRESET"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="resume the run in --out from its latest checkpoint, if it has one"
    )
    existing.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument(
        "--describe", action="store_true",
        help="print the size of the network, the steps, the memory of weights and optimiser and the size of the files, "
        "and end: nothing is trained or written",
    )  # fmt: skip
    add_config_flags(parser.add_argument_group("fields of the config"))


def run(options: argparse.Namespace) -> None:
    from ...levels import Information
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
            options.parser.exit(stop.exit_code, f"vadiff: {stop}\n")
        raise SystemExit(stop.exit_code) from None
    except ValueError as error:
        options.parser.error(str(error))
    if main_rank:
        print("\nEDM's loss on held-out images per noise level, averaged weights:")
        print(held_out_table({config.weighting: trained.held_out}))
        if config.target == POSTERIOR_MEAN:
            print("\nThe training loss is the error against posterior means, the held-out loss that against images.")
        if isinstance(trained.levels, Information):
            print(f"\nNoise levels: {trained.levels.state}.")


def training_config(options: argparse.Namespace) -> TrainConfig:
    """The config of the preset, file or resumed run, with the given flags; an invalid one is a usage error."""
    out = _out(options)
    if out.exists() and not out.is_dir():
        options.parser.error(f"argument --out: {out} is a file, expected a folder")
    saved = out / "config.yaml"
    try:
        if "preset" in options:
            base = PRESETS[options.preset]
        elif "config" in options:
            base = TrainConfig.load(options.config)
        elif options.resume and saved.is_file():
            base = TrainConfig.load(saved)
        else:
            options.parser.error("one of the arguments --preset --config is required")
        config = dataclasses.replace(base, **given_fields(options))
        backends.select(config.backend, torch.empty(0, device=config.torch_device()))
    except (ValueError, RuntimeError) as error:
        options.parser.error(str(error))
    return config


def _out(options: argparse.Namespace) -> Path:
    if "out" in options:
        return Path(options.out)
    return Path("runs") / getattr(options, "preset", "train")
