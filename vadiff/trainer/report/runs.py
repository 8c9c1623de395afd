"""Data of a report: histories of runs as arrays, and groups of runs that differ only in their seed."""

import contextlib
import csv
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import RunError
from ..ablation.evaluation import drawn_with
from ..progress import progress_bar
from ..training import Run, TrainConfig, open_run

Array = np.ndarray

# Fields that may differ within a group: how a run was started, logged and saved, not what it computes.
_NOT_COMPARED = {
    "accumulate", "backend", "checkpoint_every", "compile", "data", "data_seed", "deterministic", "device", "graph",
    "held_out_draws", "held_out_every", "held_out_images", "keep_checkpoints", "log_every", "log_rms", "sample_count",
    "samples_every", "seed", "snapshot_every", "snapshot_precision", "tensorboard", "tf32",
}  # fmt: skip
_QUIET = 2.0  # seconds without a progress bar
_ENOUGH = 20.0  # effective number of samples from which a bin is drawn


@dataclass(frozen=True)
class History:
    """One run over training, R entries of K bins; NaN where there is no value."""

    name: str
    path: Path
    config: dict[str, Any]
    step: Array  # [R]
    images: Array  # [R]
    scalars: dict[str, Array]  # name → [R]: loss, base_loss, grad_norm, ...
    centers: Array  # [K] log-SNR in the middle of each bin
    count: Array  # [R, K]
    mean: Array  # [R, K] of the base loss
    std: Array  # [R, K] of the base loss
    weights: Array  # [R, K]
    held_out: list[tuple[int, dict[str, Array]]]  # (images, log_snr [L], loss_raw [L], loss_ema [L])
    evaluation: list[tuple[int, dict[str, float]]]  # (images, metric → value)
    samples: list[tuple[int, Path]]  # (step, picture)
    evaluated_with: dict[int, dict[str, Any]] = field(default_factory=dict)  # images → options of `vadiff evaluate`
    gradients: dict[str, Array] = field(default_factory=dict)  # columns of the last `vadiff evaluate --gradients`
    gap: dict[str, Array] = field(default_factory=dict)  # columns of the last `vadiff evaluate --gap`
    magnitudes: list[dict[str, Any]] = field(default_factory=list)  # the lines of metrics.jsonl with `rms`
    held_out_is_test: bool | None = None  # None if the run has not saved it
    held_out_number: int | None = None  # images held out; None if not saved

    @property
    def seen(self) -> Array:
        """Which bins have enough samples to be drawn, [R, K]; fewer suffice in a very short run."""
        if not len(self.count):
            return self.count > 0
        enough = np.minimum(_ENOUGH, self.count[-1].max(initial=0.0) / 2)
        return (self.count >= enough) & (self.count > 0)

    def rows_at(self, images: Array) -> Array:
        """Indices of the entries at these numbers of images, each of which must have an entry. [X]"""
        return np.searchsorted(self.images, images)

    @property
    def relative_std(self) -> Array:
        """std / mean of the base loss, [R, K]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.std / self.mean

    @property
    def balance(self) -> Array:
        """Standard deviation of the weighted loss, w · std of the base loss, [R, K]."""
        return self.weights * self.std

    @property
    def imbalance(self) -> float:
        """Highest ÷ lowest of `balance` at the end, over the bins with enough samples; NaN without any."""
        known = self.balance[-1][self.seen[-1] & (self.balance[-1] > 0)]
        return float(known.max() / known.min()) if len(known) else float("nan")

    @property
    def share(self) -> Array:
        """Share of the samples of recent training in each bin at the end, [K], summing to 1."""
        last = self.count[-1]
        return last / max(last.sum(), 1e-300)


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    label: str
    runs: tuple[History, ...]

    @property
    def first(self) -> History:
        """The run with the lowest seed."""
        return self.runs[0]


def read_history(run: Run) -> History:
    """The history of an opened run.

    Raises:
        RunError: nothing was logged yet, or its files are damaged.
    """
    lines, facts = run.metrics(), run.data_facts()
    logged = [line for line in lines if "statistics" in line]
    if not logged:
        raise RunError(f"{run.path} has logged nothing yet: train for at least log_every steps, then report")
    config = run.config.resolved().as_dict()  # version 0.1 saved no `prediction`, which now reads as auto
    low, high = config["log_snr_range"]
    bins = config["bins"]
    statistics = {
        name: np.array([line["statistics"][name] for line in logged], dtype=float)  # None becomes NaN
        for name in ("count", "mean", "variance")
    }
    scalars = {
        name: np.array([line.get(name) for line in logged], dtype=float)
        for name, value in logged[-1].items()
        if value is None or isinstance(value, (int, float))
    }
    return History(
        name=run.path.name or str(run.path),
        path=run.path,
        config=config,
        step=np.array([line["step"] for line in logged]),
        images=np.array([line["images"] for line in logged]),
        scalars=scalars,
        centers=low + (np.arange(bins) + 0.5) * (high - low) / bins,
        count=np.nan_to_num(statistics["count"]),
        mean=statistics["mean"],
        std=np.sqrt(statistics["variance"]),
        weights=np.array([line["weights"] for line in logged], dtype=float),
        held_out=_held_out(lines),
        evaluation=run.evaluations(),
        samples=_samples(run.path),
        evaluated_with=_evaluated_with(run.path, config["batch_size"]),
        gradients=_evaluated(run.path, "gradients.csv"),
        gap=_evaluated(run.path, "gap.csv"),
        magnitudes=[{"step": line["step"], "rms": line["rms"]} for line in lines if "rms" in line],
        held_out_is_test=None if facts is None else facts.held_out_is_test,
        held_out_number=None if facts is None else facts.held_out,
    )


def read_histories(paths: Sequence[Path]) -> list[History]:
    """The histories of run directories, with a progress bar.

    Raises:
        RunError: a path is no run directory, or its metrics are damaged.
    """
    found = []
    with progress_bar(len(paths), "reading", "run", delay=_QUIET) as bar:
        for path in paths:
            found.append(read_history(open_run(path)))
            bar.update()
    return found


def group_runs(histories: Sequence[History]) -> list[Group]:
    """Group runs that differ only in their seed, in the order given.

    A group is labelled by its weighting, if that differs, and by the settings that differ from the first group's; if
    nothing differs, by the run's folder.

    Raises:
        RunError: the runs of a group have no logged number of images in common.
    """
    groups: list[tuple[dict[str, Any], list[History]]] = []
    for history in histories:
        compared = _compared(history.config)
        for settings, members in groups:
            if settings == compared:
                members.append(history)
                break
        else:
            groups.append((compared, [history]))
    first = groups[0][0]
    differing = [name for name in first if any(settings.get(name) != first[name] for settings, _ in groups)]
    named = []
    for settings, members in groups:
        if settings is first:
            telling = ["weighting"] if "weighting" in differing else differing
        else:
            telling = [name for name in differing if name == "weighting" or settings.get(name) != first[name]]
        label = _label({name: settings.get(name) for name in telling}) if telling else members[0].name
        ordered = sorted(members, key=lambda history: history.config["seed"])
        if not set.intersection(*({*run.images.tolist()} for run in ordered)):
            paths = ", ".join(str(run.path) for run in ordered)
            raise RunError(
                f"{paths} differ in their seed only, but have no line of metrics at the same number of images: let "
                "them finish, or report them one by one"
            )
        named.append(Group(label, tuple(ordered)))
    labels = [group.label for group in named]
    for place, group in enumerate(named):
        if labels.count(group.label) > 1:  # tables of the same weighting, or numbers that begin alike
            named[place] = dataclasses.replace(group, label=f"{group.label} ({group.first.path})")
    return named


def _compared(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that define a group; `table` is replaced by the settings of the run that it names."""
    settings = {name: value for name, value in config.items() if name not in _NOT_COMPARED}
    if settings.get("table"):
        with contextlib.suppress(RunError):  # folder is gone: keep the path
            source = TrainConfig.load(Path(settings["table"]) / "config.yaml")
            settings["table"] = _compared(source.resolved().as_dict())
    return settings


def _label(settings: dict[str, Any]) -> str:
    parts = []
    for name, value in settings.items():
        if isinstance(value, dict) and "weighting" in value:  # settings of the table's run
            value = f"of {value['weighting']}"
        if isinstance(value, dict):  # options, whose names say enough
            given = " ".join(f"{option} {_short(number)}" for option, number in value.items())
            name, value = "", given or f"default {name}"
        parts.append(f"{'' if name == 'weighting' else name} {_short(value)}".replace("_", " ").strip())
    return ", ".join(parts)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _held_out(lines: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Array]]]:
    return [
        (line["images"], {name: np.array(values, dtype=float) for name, values in line["held_out"].items()})
        for line in lines
        if line.get("held_out")
    ]


def _evaluated_with(path: Path, batch_size: int) -> dict[int, dict[str, Any]]:
    """Options with which images were compared, by the training images seen."""
    steps = [int(folder.name.removeprefix("step-")) for folder in path.glob("evaluation/step-*")]
    found = {step * batch_size: drawn_with(path, step) for step in steps}
    return {images: options for images, options in found.items() if options is not None}


def _evaluated(path: Path, name: str) -> dict[str, Array]:
    """The columns of the table of this name from the last evaluated checkpoint that has it; empty cells are NaN."""
    measured = [(int(folder.name.removeprefix("step-")), folder) for folder in path.glob("evaluation/step-*")]
    for _, folder in sorted(measured, reverse=True):
        if (folder / name).exists():
            with (folder / name).open(newline="") as file:
                rows = list(csv.DictReader(file))
            return {column: np.array([float(row[column] or "nan") for row in rows]) for column in rows[0]}
    return {}


def _samples(path: Path) -> list[tuple[int, Path]]:
    pictures = []
    for file in path.glob("samples/step-*.png"):
        number = file.stem.removeprefix("step-")
        if number.isdigit():
            pictures.append((int(number), file))
    return sorted(pictures)
