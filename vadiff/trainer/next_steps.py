"""What a command says at its end: what to type next, in lines that can be copied."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from .config_schema import LATENT_STD


def next_steps(*commands: Sequence[str | Path]) -> str:
    """Commands of `vadiff`, one on a line, quoted for a shell.

    Args:
        commands: the arguments after `vadiff` of each.
    """
    return "\n".join(["Next:", *(f"  {command_line(*command)}" for command in commands)])


def after_training(run: Path, dataset: str) -> str:
    """What a run can be used for; of one on latents no pictures to compare with are at hand."""
    metrics = ("--metrics", "none") if dataset == "latents" else ()  # none: the held-out loss alone
    return next_steps(("report", run), ("sample", run), ("evaluate", run, *metrics))


def after_sampling(images: Path, run: Path, dataset: str) -> str:
    """How to compare images with those that the run was trained on; nothing of a run on latents, which has none."""
    return "" if dataset == "latents" else next_steps(("evaluate", images, "--reference", run))


def training_on_latents(data: Path, shape: tuple[int, ...]) -> list[str | Path]:
    """Arguments of `vadiff train` on latents of this shape; the attention is at half their size."""
    channels, height, _ = shape
    return [
        "train", "--preset", "images", "--dataset", "latents", "--data", data, "--image-size", str(height),
        "--image-channels", str(channels), "--sigma-data", str(LATENT_STD), "--attention-resolutions",
        str(height // 2), "--no-flips",
    ]  # fmt: skip


def command_line(*arguments: str | Path) -> str:
    """A command of `vadiff` with these arguments, quoted for a shell."""
    return shlex.join(["vadiff", *map(str, arguments)])


def going_on(out: Path, processes: int) -> str:
    """How to go on with a training that was stopped."""
    command = command_line("train", "--resume", "--out", out)
    if processes > 1:
        return f"go on with --resume, by torchrun as before: torchrun ... -m {command}"
    return f"go on with --resume: {command}"
