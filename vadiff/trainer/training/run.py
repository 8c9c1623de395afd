"""Read access to a run directory, for sampling and evaluation.

config.yaml          the config
data.json            how many images, and whether those held out are a test set
encoding.json        of a run on latents: their statistics, and the VAE that decodes them
optimal_loss.csv     the optimal loss, if the weighting or the levels need it
profile.csv          x0 errors that the levels are placed by, if the config names them
metrics.jsonl        one JSON object per line, every `log_every` steps, see `vadiff.trainer.training.metrics`
tensorboard/         the same for TensorBoard
checkpoints/step-<n>/
samples/step-<n>.png
import.json          the files that `vadiff import` took it from; such a run has weights, but no state of training
snapshots/, ema/     see `vadiff.trainer.training.averages`
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._validation import did_you_mean
from ...diagnosis import Diagnosis
from ...errors import RunError
from ...files import sha256_of
from ...information import Profile
from ...levels import LevelSampler
from ...loss import DiffusionLoss
from ...models import Denoiser
from ...optimal_loss import OptimalLoss
from ..config import TrainConfig
from ..data import Encoding, Images
from ..next_steps import command_line
from . import averages
from .assembly import build_denoiser, build_levels, saved_criterion
from .checkpoint import checksum, load_checkpoint, load_training, steps_saved
from .data_set import load_images
from .level_profile import profile_of_run, read_profile
from .metrics import METRICS, read_metrics
from .optimal_curve import check_curve_of, read_curve
from .run_encoding import read_encoding

CONFIG, DATA, IMPORTED = "config.yaml", "data.json", "import.json"
WEIGHTS = ("ema", "raw")
_NAMED = 4  # runs, at most, in the message that refuses their parent


class DataFacts(NamedTuple):
    """Facts about the data set, saved in the run."""

    train: int  # images
    held_out: int  # images
    held_out_is_test: bool  # False if taken from the training set
    fingerprint: str = ""  # of the files, see `Images`


@dataclass(frozen=True)
class Run:
    """A folder that `vadiff train` wrote, or is still writing."""

    path: Path
    config: TrainConfig
    vae: Path | None = None  # folder of the VAE that decodes latents; None is the one that encoded them

    @property
    def is_imported(self) -> bool:
        """Whether `vadiff import` wrote it: it has weights, but no state of training."""
        return (self.path / IMPORTED).exists()

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far; empty before the first.

        Raises:
            RunError: a line is not JSON, except an incomplete last line.
        """
        path = self.path / METRICS
        return read_metrics(path) if path.exists() else []

    def checkpoints(self) -> list[int]:
        """The steps of the checkpoints, ascending."""
        return steps_saved(self.path)

    def data_facts(self) -> DataFacts | None:
        """Facts about the data set when the run began, None if none were saved.

        Raises:
            RunError: the file is damaged.
        """
        path = self.path / DATA
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            return DataFacts(
                int(content["train"]), int(content["held_out"]), bool(content["held_out_is_test"]),
                str(content.get("fingerprint", "")),  # version 0.1 has none
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} cannot be read: {error}. Remove it, then go on with --resume") from error

    def evaluations(self) -> list[tuple[int, dict[str, float]]]:
        """(images seen, metric → value) for each step that was evaluated, ascending.

        From metrics.jsonl and from the files of `vadiff evaluate`, which take precedence. Evaluations that still lack
        some of their sets of images are left out.

        Raises:
            RunError: a file is damaged.
        """
        found = {line["images"]: dict(line["evaluation"]) for line in self.metrics() if line.get("evaluation")}
        for file in sorted(self.path.glob("evaluation/step-*/metrics.json")):
            try:
                content = json.loads(file.read_text())
                if is_complete(content):
                    found.setdefault(content["images_seen"], {}).update(content["metrics"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise RunError(f"{file} cannot be read: {error}. Evaluate that step again") from error
        return sorted(found.items())

    def denoiser(self, weights: str = "ema", step: int | None = None, device: torch.device | str = "cpu") -> Denoiser:
        """The denoiser of a checkpoint, in eval mode.

        Args:
            weights: "ema", the running average; "raw", the trained weights; or "ema-0.1", the power-function average
                of that width, made by `vadiff ema`.
            step: of the checkpoint; None is the latest.
            device: where to put it.

        Raises:
            CheckpointError: there is no such checkpoint, or it is corrupt; the message names the last intact one.
            ValueError: no such weights.
            MissingExtraError: diffusers is not installed.
        """
        of_average = _are_of_average(weights)
        state = averages.read_average(self.path, weights, step) if of_average else load_checkpoint(self.path, step)
        channels, height, width = state["image_shape"]
        denoiser = build_denoiser(self.config, (channels, height, width), state["classes"])
        denoiser.load_state_dict(state["model" if weights == "raw" else "ema"])
        return denoiser.to(device).eval()

    def fingerprint(self, weights: str = "ema", step: int | None = None) -> tuple[int, str]:
        """Step and SHA-256 of the file that `denoiser` reads: equal for equal weights only.

        Raises:
            CheckpointError: there is no such file.
            ValueError: no such weights.
        """
        if not _are_of_average(weights):
            return checksum(self.path, step)
        step, file = averages.find_average(self.path, weights, step)
        return step, sha256_of(file)

    def criterion(self, step: int | None = None) -> DiffusionLoss:
        """The criterion with the statistics of a checkpoint, on the CPU.

        Raises:
            CheckpointError: there is no such checkpoint, or it is corrupt; the message names the last intact one.
        """
        return saved_criterion(self.config, self.path, load_training(self.path, step))

    def diagnose(self, optimal: OptimalLoss | None = None, step: int | None = None) -> Diagnosis:
        """The diagnosis of the criterion of a checkpoint, with its gap where the optimal loss is known.

        Args:
            optimal: J* of the run's training images; the one in its folder by default, if it has one.
            step: of the checkpoint; None is the latest.

        Raises:
            CheckpointError: there is no such checkpoint, or it is corrupt.
            RunError: `optimal` belongs to other images.
        """
        state = load_training(self.path, step)
        criterion = saved_criterion(self.config, self.path, state)
        optimal = read_curve(self.config, self.path) if optimal is None else optimal
        facts = self.data_facts()
        if optimal is not None and facts is not None:
            check_curve_of(optimal, self.config, facts.train, math.prod(state["image_shape"]))
        return criterion.diagnose(optimal, self.config.form().prediction, self.config.sigma_data)

    def profile(self, step: int | None = None) -> Profile:
        """x0 error per noise level, from the training statistics of a checkpoint, of its trained (raw) weights.

        Not bounded: of a network that predicts eps, see `Profile.bounded`.

        Args:
            step: of the checkpoint; None is the latest.

        Raises:
            CheckpointError: there is no such checkpoint, or it is corrupt; the message names the last intact one.
            ValueError: its statistics are of too few samples.
        """
        return profile_of_run(self.config, self.path, step)

    def levels(self, step: int | None = None) -> LevelSampler:
        """The sampler of noise levels with the state of a checkpoint, on the CPU.

        Raises:
            CheckpointError: there is no such checkpoint, or it is corrupt; the message names the last intact one.
        """
        config, path = self.config, self.path
        sampler = build_levels(config, path, read_curve(config, path), read_profile(config, path))
        sampler.load_state_dict(load_training(path, step)["levels"])
        return sampler

    @cached_property
    def encoding(self) -> Encoding:
        """What the network draws, and how pictures are made of it. Kept: it holds the VAE of a run on latents.

        Raises:
            RunError: that of latents is missing or damaged, or `vae` is given for a run that draws pixels.
        """
        return read_encoding(self.config, self.path, self.vae)

    def pictures(self, x0: Tensor) -> Tensor:
        """Pictures of what the network draws: bytes [n, 1 or 3, H', W'], of x0 [n, C, H, W] on any device.

        Raises:
            DataError: the VAE of a run on latents is missing, or another than that which encoded them.
            RunError: see `encoding`.
        """
        return self.encoding.pictures(x0)

    def images(self) -> Images:
        """The data set it is trained on, read again from its path.

        Raises:
            DataError: the data set is missing or corrupt.
            MissingExtraError: a package that reads it is not installed.
        """
        return load_images(self.config)


def open_run(path: str | Path) -> Run:
    """Open a run directory. Its files are read on access.

    Raises:
        RunError: not a run directory, or a config that is invalid in this version.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        what = "has no config.yaml" if path.is_dir() else "is not a folder"
        raise RunError(f"{path} is not a run directory: it {what}{_where_runs_are(path)}")
    return Run(path, TrainConfig.load(path / CONFIG))


def _where_runs_are(path: Path) -> str:
    """The end of a message that refuses a path: what to give in its place."""
    inside = sorted(file.parent for pattern in ("*", "*/*") for file in path.glob(f"{pattern}/{CONFIG}"))
    if inside:
        named = ", ".join(map(str, inside[:_NAMED]))
        return f", but it holds {len(inside)}: {named}{', ...' if len(inside) > _NAMED else ''}"
    beside = [str(file.parent) for file in path.parent.glob(f"*/{CONFIG}")]
    return did_you_mean(path, beside) or f". `{command_line('train', '--preset', 'NAME', '--out', path)}` makes one"


def is_complete(evaluation: Mapping[str, Any]) -> bool:
    """Whether the content of a metrics.json that `vadiff evaluate` wrote is about all sets of images it was to measure.

    Version 0.1 wrote it at the end only, without `repeats` and `means_over`.
    """
    return "means_over" not in evaluation or len(evaluation["means_over"]) == evaluation["repeats"]


def _are_of_average(weights: str) -> bool:
    """Whether these weights are a post-hoc average, not in a checkpoint.

    Raises:
        ValueError: no such weights.
    """
    if weights not in WEIGHTS and not weights.startswith(averages.PREFIX):
        raise ValueError(f"weights is {weights!r}, expected {', '.join(WEIGHTS)} or {averages.PREFIX}<sigma_rel>")
    return weights not in WEIGHTS
