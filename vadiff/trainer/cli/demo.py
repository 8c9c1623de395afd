"""`vadiff demo`."""

import dataclasses
from pathlib import Path

import torch

from ...ops import backends
from ..presets import PRESETS
from .command import command
from .parameters import PATH, TEXT, WHOLE_NUMBER, Choice, Options, flag, option, usage_error

NAME = "demo"
HELP = "compare three weightings on handwritten digits: pictures and a table"
DESCRIPTION = (
    "Train the same small model to predict the noise of DDPM with constant, loss_level and variance_aware weighting "
    "(same seed, same noise), draw samples, write report.html (the page of `vadiff report`) and report.png to the "
    "folder --out, and print how far the loss spreads over noise levels, the Fréchet distance of the samples and the "
    "loss on held-out images per noise level. Takes minutes."
)
EXAMPLES = (
    "vadiff demo                                # results in runs/demo",
    "vadiff demo --seed 1 --out runs/demo-1     # the same with another seed",
)
_PRESET = PRESETS["digits"]


@command(NAME, HELP, DESCRIPTION, EXAMPLES)
@option("--steps", WHOLE_NUMBER, "N", "optimiser steps", default=_PRESET.steps)
@option("--batch-size", WHOLE_NUMBER, "N", "images per step", default=_PRESET.batch_size)
@option("--seed", WHOLE_NUMBER, "N", "seed of weights, data and noise", default=_PRESET.seed)
@option("--out", PATH, "DIR", "folder for results", default=Path("runs/demo"))
@flag("--overwrite", "replace the runs of an earlier demo in --out")
@option("--device", TEXT, "DEVICE", "auto (a GPU if there is one), cpu, cuda, cuda:N", default=_PRESET.device)
@option("--backend", Choice(backends.BACKENDS), None, "which kernels compute the loss", default=_PRESET.backend)
def run(options: Options) -> None:
    from ..report import run_demo
    from ..report.demo import WEIGHTINGS
    from ..training.run_folder import check_free, check_results

    fields = {name: getattr(options, name) for name in ("steps", "batch_size", "seed", "device", "backend")}
    if options.out.exists() and not options.out.is_dir():
        usage_error(f"argument --out: {options.out} is a file, expected a folder")
    try:
        config = dataclasses.replace(PRESETS["digits"], process="vp_linear", **fields)
        backends.select(config.backend, torch.empty(0, device=config.torch_device()))
    except (ValueError, RuntimeError) as error:
        usage_error(str(error))
    for name in WEIGHTINGS:
        check_free(options.out / name, overwrite=options.overwrite)
    check_results(options.out, ("report.html", "report.png"), (options.out / name for name in WEIGHTINGS))
    run_demo(config, options.out)
