"""Builds the parts of a run from its config: network, criterion, level sampler, data."""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ... import levels, weighting
from ...augmentation import LABELS
from ...errors import DiffusionLossWarning, RunError
from ...files import replacing
from ...information import Profile
from ...levels import GapLevels, LevelSampler
from ...loss import DiffusionLoss
from ...models import Denoiser, EDM2UNet, unet
from ...models.parameterisation import VPForm, sigma_range
from ...optimal_loss import OptimalLoss
from ...process import DiscreteVP
from ...process_defaults import untrained_terminal_step
from ...weighting import SNRWeighting, Weighting, WeightTable
from ..config import TrainConfig
from ..config_schema import CURVE_WEIGHTINGS, GAP, TABLE
from .optimal_curve import read_curve
from .posterior_targets import recorded_targets

_ADAPTIVE_LEVELS = ("information", "loss_spread", "second_moment")
TABLE_FILE = "table.json"  # in a run directory: copy of the weight table that the config names


def build_denoiser(config: TrainConfig, image_shape: tuple[int, int, int], classes: int) -> Denoiser:
    """An untrained denoiser, initialised from torch's global random state, on the CPU.

    Raises:
        MissingExtraError: diffusers is not installed.
        ValueError: sizes that are invalid for these images.
    """
    labels = classes if config.class_conditional else 0
    sizes: dict[str, Any] = {
        "layers_per_block": config.layers_per_block,
        "attention_resolutions": config.attention_resolutions,
        "dropout": config.dropout,
        "gradient_checkpointing": config.gradient_checkpointing,
        "labels": labels,
        "augmentation": LABELS if config.augment else 0,
    }
    network: nn.Module
    if config.model == "edm2":
        network = EDM2UNet(image_shape, config.channels, **sizes)
    else:
        network = unet(image_shape, config.channels, norm_groups=config.norm_groups, **sizes)
    return Denoiser(
        network,
        config.sigma_data,
        labels=labels,
        image_shape=image_shape,
        process=config.form(),
        augmented=config.augment > 0.0,
    )


def build_criterion(config: TrainConfig, run: Path | None = None, optimal: OptimalLoss | None = None) -> DiffusionLoss:
    """A criterion without statistics.

    Args:
        config: of the run.
        run: folder with its weight table, for weighting "table".
        optimal: the optimal loss of its training images, for a weighting that needs it.

    Raises:
        ValueError: an option is unknown to the weighting or out of bounds, or `optimal` is missing.
        RunError: there is no such table.
    """
    return DiffusionLoss(
        weighting=_weighting(config, run, optimal),
        bins=config.bins,
        log_snr_range=config.log_snr_range,
        half_life=config.half_life,
        backend=config.backend,
    )


def training_criterion(config: TrainConfig, run: Path | None, optimal: OptimalLoss | None) -> DiffusionLoss:
    """`build_criterion`, with a warning if a fixed weighting leaves the last timestep untrained.

    Warns:
        DiffusionLossWarning: see `vadiff.process_defaults.untrained_terminal_step`.
    """
    criterion, form = build_criterion(config, run, optimal), config.form()
    problem = untrained_terminal_step(form.process, criterion.weighting) if isinstance(form, VPForm) else None
    if problem:
        warnings.warn(problem, DiffusionLossWarning, stacklevel=2)
    return criterion


def saved_criterion(config: TrainConfig, run: Path, state: Mapping[str, Any]) -> DiffusionLoss:
    """The criterion of a run with the statistics of one of its checkpoints, on the CPU."""
    criterion = build_criterion(config, run, read_curve(config, run))
    criterion.target = recorded_targets(config)
    criterion.load_state_dict(state["criterion"])
    return criterion


def build_levels(
    config: TrainConfig, run: Path | None = None, optimal: OptimalLoss | None = None, profile: Profile | None = None
) -> LevelSampler:
    """A sampler of noise levels, on the CPU.

    Args:
        config: of the run.
        run: folder with its weight table, for levels "table".
        optimal: the optimal loss of its training images, for levels "gap".
        profile: x0 errors for levels "information", in place of those of training.

    Raises:
        ValueError: an option is unknown to the sampler or out of bounds, or `optimal` is missing.
        RunError: there is no such table.
    """
    config = config.resolved()
    form = config.form()
    process = form.process if isinstance(form, VPForm) else None
    uniform: LevelSampler | None = None  # of a variance-preserving process
    if isinstance(process, DiscreteVP):
        uniform = levels.UniformTimesteps(process)
    elif process is not None:
        uniform = levels.UniformTime(process)
    base = _placed(config, uniform or levels.LogNormal(config.p_mean, config.p_std), uniform)
    if config.levels == TABLE:
        table = read_table(config, run)
        return levels.Table(table.weights, table.log_snr_range, base)
    options: dict[str, Any] = dict(config.levels_options)
    if config.levels == "uniform_time" and process is not None:
        options = {"process": process, **options}
    if config.levels == "log_normal":
        options = {"p_mean": config.p_mean, "p_std": config.p_std, **options}
    if config.levels in _ADAPTIVE_LEVELS:
        options = {"base": base, "bins": config.bins, "log_snr_range": config.log_snr_range, **options}
    if config.levels == "information":
        form_of_loss = {"prediction_type": form.prediction, "sigma_data": config.sigma_data}
        options = {**form_of_loss, "profile": profile, **options}
    try:
        if config.levels == GAP:
            options = {"base": _placed(config, levels.LogUniform(), uniform), **options}
            return _gap_levels(config, run, _required(optimal, "levels"), options)
        if config.levels in _ADAPTIVE_LEVELS:
            return levels.from_name(config.levels, **options)
        if isinstance(options.get("process"), DiscreteVP):
            return _placed(config, levels.UniformTimesteps(**options), uniform)
        return _placed(config, levels.from_name(config.levels, **options), uniform)
    except TypeError as error:
        raise ValueError(f"levels_options is {config.levels_options}: {error}") from None


def _placed(config: TrainConfig, sampler: LevelSampler, uniform: LevelSampler | None) -> LevelSampler:
    """A fixed sampler with the config's shift, within the levels of the process, and its share of uniform times.

    uniform: in the times of the process; None is a flow's.
    """
    if config.shift_alpha != 1.0:
        lowest, highest = sigma_range(config.form())
        log_snr_range = (-2.0 * math.log(highest), -2.0 * math.log(lowest) if lowest > 0.0 else math.inf)
        sampler = levels.Shift(sampler, config.shift_alpha, log_snr_range)
    if config.uniform_share:
        sampler = levels.Mixture(sampler, uniform, config.uniform_share)
    return sampler


def read_table(config: TrainConfig, run: Path | None) -> WeightTable:
    """The weight table of a config: the copy in the run's folder, or else the final table of the run that it names.

    Raises:
        RunError: there is no such table, or the other run has not finished yet.
    """
    copy = None if run is None else run / TABLE_FILE
    try:
        if copy is not None and copy.exists():
            content = json.loads(copy.read_text())
            return WeightTable(tuple(content["weights"]), tuple(content["log_snr_range"]))
        source = Path(str(config.table))
        other = TrainConfig.load(source / "config.yaml")
        last = json.loads((source / "metrics.jsonl").read_text().splitlines()[-1])
        if last["step"] != other.steps:
            raise RunError(
                f"{source} is at step {last['step']} of {other.steps}: let it finish before its table is used"
            )
        return WeightTable(tuple(last["weights"]), other.log_snr_range)
    except (OSError, IndexError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"no weight table can be read from {config.table}: {error}") from error


def keep_table(table: WeightTable, run: Path) -> None:
    """Copy a table into a run's own folder, so that the run can be opened without the other one."""
    content = {"weights": list(table.weights), "log_snr_range": list(table.log_snr_range)}
    with replacing(run / TABLE_FILE) as partial:
        partial.write_text(json.dumps(content) + "\n")


def _weighting(config: TrainConfig, run: Path | None, optimal: OptimalLoss | None) -> Weighting:
    if config.weighting == TABLE:
        return read_table(config, run)
    options: dict[str, Any] = dict(config.weighting_options)
    made_of_curve = CURVE_WEIGHTINGS.get(config.weighting)
    if made_of_curve or weighting.takes_prediction_type(config.weighting):
        # By default these are weights for a loss of eps; the trainer's loss is that of F.
        options = {"prediction_type": config.form().prediction, "sigma_data": config.sigma_data, **options}
    if config.weighting == "min_snr" and config.zero_terminal_snr:
        options = {"terminal": 1.0, **options}  # as in the paper's code: by the formula that step is not trained
    try:
        if made_of_curve:
            return made_of_curve(_required(optimal, "weighting"), **options)
        return weighting.from_name(config.weighting, **options)
    except TypeError as error:
        raise ValueError(f"weighting_options is {config.weighting_options}: {error}") from None


def _gap_levels(config: TrainConfig, run: Path | None, optimal: OptimalLoss, options: dict[str, Any]) -> GapLevels:
    """Levels by weight times gap, with the run's weighting if it is a function of SNR, else the schedule's weight."""
    chosen = _weighting(config, run, optimal)
    return GapLevels(
        optimal,
        chosen if isinstance(chosen, SNRWeighting) else None,
        **{
            "bins": config.bins,
            "log_snr_range": config.log_snr_range,
            "half_life": config.half_life,
            # EDM's residual is D - x0.
            "prediction_type": "sample" if config.process == "edm" else config.form().prediction,
            "sigma_data": config.sigma_data,
            **options,
        },
    )


def _required(optimal: OptimalLoss | None, name: str) -> OptimalLoss:
    if optimal is None:
        raise ValueError(f"optimal is None, expected the optimal loss of the training images: {name} needs it")
    return optimal
