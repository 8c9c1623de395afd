"""An experiment as a TOML file.

name = "digits"
preset = "digits"            # what all runs start from
baseline = "constant"        # the arm that the others are compared with
seeds = [0, 1, 2]

[config]                     # fields of the training config, for all runs
steps = 300

[arms.constant]              # fields of one arm
weighting = "constant"
[arms.twice_the_rate]
weighting = "constant"
learning_rate = { times = 2.0 }              # a multiple of the preset's or [config]'s value
[arms.static_twin]
weighting = "table"
table = { arm = "variance_aware" }           # the run of that arm with the same seed; it is trained first

[grid]                       # instead of arms, or in addition: every combination is an arm
weighting = ["constant", "variance_aware"]
learning_rate = [1e-3, 2e-3]

[evaluate]                   # how --evaluate compares images of each run with real ones, see `Evaluation`
layer = "768"
"""

import dataclasses
import itertools
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import RunError, UserError
from ...extras import import_extra
from ..config import TrainConfig
from ..presets import PRESETS
from ..training import run_folder
from ..training.assembly import TABLE_FILE, read_table
from ..training.optimal_curve import CURVE_FILE, read_curve
from ..training.run import open_run
from .evaluation import Evaluation

_KEYS = {"name", "preset", "baseline", "seeds", "config", "arms", "grid", "evaluate"}


class GridError(UserError):
    """The TOML file of an experiment is invalid, or does not match its runs."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of the grid, trained or not."""

    arm: str
    seed: int
    path: Path
    config: TrainConfig
    needs: Path | None  # the run whose final weights it uses

    def steps_done(self) -> int:
        """The last step in the run's metrics, 0 if it has not started."""
        if not (self.path / "config.yaml").is_file():
            return 0
        entries = open_run(self.path).metrics()
        return int(entries[-1]["step"]) if entries else 0

    def check(self) -> None:
        """Raise unless the contents of the run's folder match the plan.

        Raises:
            GridError: the run was trained with other settings, or with an outdated weight table or optimal loss.
        """
        if not (self.path / "config.yaml").is_file():
            return
        saved = open_run(self.path).config
        ignored = run_folder.IMMATERIAL | ({"steps"} if saved.steps < self.config.steps else set())
        if differing := run_folder.differences(saved, self.config, ignored):
            raise GridError(
                f"{self.path} was trained with other settings: {'; '.join(differing)}. Fix the experiment, choose "
                "another --out, or remove that folder to train it again"
            )
        self._check_curve()
        if self.needs is None or not (self.path / TABLE_FILE).is_file() or not (self.needs / "config.yaml").is_file():
            return
        try:
            current = read_table(self.config, None)
        except RunError as error:  # the source run is being trained again
            raise GridError(
                f"{self.path} has a weight table that cannot be compared with its source: {error}"
            ) from error
        if read_table(self.config, self.path) != current:
            raise GridError(
                f"{self.path} is stale: {self.needs} has ended with another weight table since. Remove the folder "
                f"{self.path} to train it again"
            )

    def _check_curve(self) -> None:
        """Raise unless the run's optimal loss equals that in the file named by the plan, if it names one."""
        kept = self.path / CURVE_FILE
        if not kept.is_file():
            return
        try:
            named, own = read_curve(self.config, None), read_curve(self.config, self.path)
        except RunError as error:
            raise GridError(
                f"{self.path} has an optimal loss that cannot be compared with its source: {error}"
            ) from error
        if named is not None and own is not None and named.as_rows() != own.as_rows():
            raise GridError(
                f"{self.path} is stale: {self.config.optimal_loss} has changed since. Remove the folder {self.path} to "
                "train it again"
            )

    @property
    def is_done(self) -> bool:
        return self.steps_done() >= self.config.steps


@dataclass(frozen=True)
class Grid:
    """An experiment: arms times seeds.

    Attributes:
        arms: name → fields of the config, in which {"times": x} multiplies and {"arm": name} names another arm's run.
        evaluation: options of `evaluate_all`.
    """

    name: str
    base: TrainConfig
    baseline: str
    seeds: tuple[int, ...]
    arms: Mapping[str, Mapping[str, Any]]
    evaluation: Evaluation

    def runs(self, out: Path) -> list[PlannedRun]:
        """All runs, seed by seed; within a seed, runs that need another run come last.

        Raises:
            GridError: an invalid field; the message names the arm.
        """
        order = sorted(self.arms, key=lambda arm: self._needed_by(arm) is not None)
        return [self._run(arm, seed, out) for seed in self.seeds for arm in order]

    def _run(self, arm: str, seed: int, out: Path) -> PlannedRun:
        fields = dict(self.arms[arm])
        needed = self._needed_by(arm)
        needs = None if needed is None else _run_path(out, needed, seed)
        for name, value in fields.items():
            if isinstance(value, Mapping) and set(value) == {"times"}:
                fields[name] = getattr(self.base, name, 0) * value["times"]
        if needs is not None:
            fields["table"] = str(needs)
        try:
            config = TrainConfig.from_dict({**self.base.as_dict(), **fields, "seed": seed})
        except (TypeError, ValueError) as error:
            raise GridError(f"arm {arm}: {error}") from error
        return PlannedRun(arm, seed, _run_path(out, arm, seed), config, needs)

    def _needed_by(self, arm: str) -> str | None:
        table = self.arms[arm].get("table")
        return table["arm"] if isinstance(table, Mapping) else None


def read_grid(path: Path, overrides: Mapping[str, Any] | None = None, seeds: int | None = None) -> Grid:
    """Read an experiment's file.

    Args:
        path: the TOML file.
        overrides: fields of the config that override those of the file.
        seeds: use only this many seeds, from the first.

    Raises:
        GridError: the file is missing, not TOML, or invalid; the message says where.
    """
    toml = import_extra("tomllib" if sys.version_info >= (3, 11) else "tomli", "train")
    try:
        content = toml.loads(path.read_text())
    except (OSError, UnicodeDecodeError, toml.TOMLDecodeError) as error:
        raise GridError(f"{path} cannot be read: {error}") from error
    unknown = sorted(set(content) - _KEYS)
    if unknown:
        raise GridError(f"{path} has {', '.join(unknown)}, expected only {', '.join(sorted(_KEYS))}")
    if content.get("preset") not in PRESETS:
        raise GridError(f"{path}: preset is {content.get('preset')!r}, expected one of {', '.join(PRESETS)}")
    fields = {**PRESETS[content["preset"]].as_dict(), **content.get("config", {}), **(overrides or {})}
    try:
        base = TrainConfig.from_dict(fields)
    except ValueError as error:
        raise GridError(f"{path}: {error}") from error
    arms = {**content.get("arms", {}), **_combinations(content.get("grid", {}))}
    grid_seeds = content.get("seeds", [0])
    if not (isinstance(grid_seeds, list) and grid_seeds and all(type(seed) is int for seed in grid_seeds)):
        raise GridError(f"{path}: seeds is {grid_seeds!r}, expected a list of whole numbers")
    name, baseline = content.get("name", path.stem), content.get("baseline")
    if baseline not in arms:
        raise GridError(f"{path}: baseline is {baseline!r}, expected one of the arms: {', '.join(arms) or 'none'}")
    for arm, settings in arms.items():
        _check_arm(path, arm, settings, arms)
    try:
        evaluation = Evaluation.from_table(content.get("evaluate", {}))
    except (TypeError, ValueError) as error:
        raise GridError(f"{path}: evaluate: {error}") from error
    return Grid(name, base, baseline, tuple(grid_seeds[:seeds]), arms, evaluation)


def _combinations(axes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every combination of the values of a [grid], keyed by a name such as "weighting=constant,steps=100"."""
    combinations = itertools.product(*axes.values()) if axes else ()
    arms = {}
    for values in combinations:
        name = ",".join(f"{field}={value}" for field, value in zip(axes, values, strict=True))
        arms[re.sub(r"[^\w=,.+-]+", "_", name)] = dict(zip(axes, values, strict=True))
    return arms


def _check_arm(path: Path, arm: str, settings: Any, arms: Mapping[str, Any]) -> None:
    if not re.fullmatch(r"[\w=,.+-]+", arm):
        raise GridError(f"{path}: arm {arm!r} names a folder: letters, digits and _ = , . + - only")
    if not isinstance(settings, Mapping):
        raise GridError(f"{path}: arm {arm} is {settings!r}, expected fields of the training config")
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    for name, value in settings.items():
        if name not in fields or name == "seed":
            raise GridError(f"{path}: arm {arm} has {name}, which is not a field that an arm can set")
        if isinstance(value, Mapping) and "times" in value and not isinstance(value["times"], (int, float)):
            raise GridError(f"{path}: arm {arm} has {name} times {value['times']!r}, expected a number")
    table = settings.get("table")
    if isinstance(table, Mapping):
        if set(table) != {"arm"} or table["arm"] not in arms:
            raise GridError(f"{path}: arm {arm} has table = {dict(table)}, expected {{ arm = NAME }} of another arm")
        if isinstance(arms[table["arm"]].get("table"), Mapping):
            raise GridError(f"{path}: arm {arm} needs {table['arm']}, which itself needs another arm")


def _run_path(out: Path, arm: str, seed: int) -> Path:
    return out / arm / f"seed-{seed}"
