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

[objectives.edm]             # optional: every arm is trained with the fields of each objective, and compared with the
process = "edm"              # baseline of the same objective; an arm may name some: objectives = ["edm"]
[objectives.flow]
process = "flow"

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

from ..._validation import did_you_mean
from ...errors import RunError, UserError
from ...extras import import_extra
from ...files import reason
from ..config import TrainConfig
from ..presets import PRESETS
from ..training import run_folder
from ..training.assembly import TABLE_FILE, read_table
from ..training.optimal_curve import CURVE_FILE, read_curve
from ..training.run import open_run
from .evaluation import Evaluation

_KEYS = {"name", "preset", "baseline", "seeds", "config", "objectives", "arms", "grid", "evaluate"}


class GridError(UserError):
    """The TOML file of an experiment is invalid, or does not match its runs."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of the grid, trained or not."""

    objective: str  # "" in a grid without objectives
    arm: str
    seed: int
    path: Path
    config: TrainConfig
    needs: Path | None  # the run whose final weights it uses

    @property
    def label(self) -> str:
        """objective/arm, or the arm in a grid without objectives."""
        return arm_label(self.objective, self.arm)

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
    """An experiment: objectives times arms times seeds.

    Attributes:
        objectives: name → fields of the config that its arms have in common; {"": {}} for a grid without objectives.
        arms: name → fields of the config, in which {"times": x} multiplies and {"arm": name} names another arm's run of
            the same objective.
        limits: name → the objectives of an arm that is not for all.
        evaluation: how `train_all` measures the images of runs, if asked to.
    """

    name: str
    base: TrainConfig
    baseline: str
    seeds: tuple[int, ...]
    arms: Mapping[str, Mapping[str, Any]]
    evaluation: Evaluation
    objectives: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=lambda: {"": {}})
    limits: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def arms_of(self, objective: str) -> list[str]:
        """The arms of an objective, in their order."""
        return [arm for arm in self.arms if objective in self.limits.get(arm, self.objectives)]

    def runs(self, out: Path) -> list[PlannedRun]:
        """All runs, objective by objective, then seed by seed; within a seed, runs that need another run come last.

        An experiment that is cut short lacks objectives rather than seeds, of which fewer than five show nothing.

        Raises:
            GridError: an invalid field; the message names the arm.
        """
        return [
            self._run(objective, arm, seed, out)
            for objective in self.objectives
            for seed in self.seeds
            for arm in sorted(self.arms_of(objective), key=lambda arm: self._needed_by(arm) is not None)
        ]

    def _run(self, objective: str, arm: str, seed: int, out: Path) -> PlannedRun:
        needed = self._needed_by(arm)
        needs = None if needed is None else _run_path(out, objective, needed, seed)
        fields = _multiplied(self.base.as_dict(), self.objectives[objective])
        fields = _multiplied(fields, self.arms[arm])
        if needs is not None:
            fields["table"] = str(needs)
        try:
            config = TrainConfig.from_dict({**fields, "seed": seed})
        except (TypeError, ValueError) as error:
            where = f"objective {objective}, arm {arm}" if objective else f"arm {arm}"
            raise GridError(f"{where}: {error}") from error
        return PlannedRun(objective, arm, seed, _run_path(out, objective, arm, seed), config, needs)

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
        raise GridError(f"{path} cannot be read: {reason(error)}") from error
    unknown = sorted(set(content) - _KEYS)
    if unknown:
        advice = did_you_mean(unknown[0], _KEYS)
        raise GridError(f"{path} has {', '.join(unknown)}, expected only {', '.join(sorted(_KEYS))}{advice}")
    if content.get("preset") not in PRESETS:
        advice = did_you_mean(content.get("preset"), PRESETS)
        raise GridError(f"{path}: preset is {content.get('preset')!r}, expected one of {', '.join(PRESETS)}{advice}")
    fields = {**PRESETS[content["preset"]].as_dict(), **content.get("config", {}), **(overrides or {})}
    try:
        base = TrainConfig.from_dict(fields)
    except ValueError as error:
        raise GridError(f"{path}: {error}") from error
    objectives = content.get("objectives", {"": {}})
    arms, limits = _limits(path, {**content.get("arms", {}), **_combinations(content.get("grid", {}))}, objectives)
    grid_seeds = content.get("seeds", [0])
    if not (isinstance(grid_seeds, list) and grid_seeds and all(type(seed) is int for seed in grid_seeds)):
        raise GridError(f"{path}: seeds is {grid_seeds!r}, expected a list of whole numbers")
    if seeds is not None and not 1 <= seeds <= len(grid_seeds):
        raise GridError(f"seeds is {seeds}, expected 1 to {len(grid_seeds)}: {path} has {len(grid_seeds)}")
    name, baseline = content.get("name", path.stem), content.get("baseline")
    if baseline not in arms:
        raise GridError(f"{path}: baseline is {baseline!r}, expected one of the arms: {', '.join(arms) or 'none'}")
    for objective, settings in objectives.items():
        _check_fields(path, "objective", objective, settings)
        if objective not in limits.get(baseline, objectives):
            raise GridError(f"{path}: objective {objective} lacks the arm {baseline}, the baseline of all others")
    for arm, settings in arms.items():
        _check_fields(path, "arm", arm, settings)
        _check_table(path, arm, arms, {name: limits.get(name, tuple(objectives)) for name in arms})
    try:
        evaluation = Evaluation.from_table(content.get("evaluate", {}))
    except (TypeError, ValueError) as error:
        raise GridError(f"{path}: evaluate: {error}") from error
    return Grid(name, base, baseline, tuple(grid_seeds[:seeds]), arms, evaluation, objectives, limits)


def _combinations(axes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every combination of the values of a [grid], keyed by a name such as "weighting=constant,steps=100"."""
    combinations = itertools.product(*axes.values()) if axes else ()
    arms = {}
    for values in combinations:
        name = ",".join(f"{field}={value}" for field, value in zip(axes, values, strict=True))
        arms[re.sub(r"[^\w=,.+-]+", "_", name)] = dict(zip(axes, values, strict=True))
    return arms


def _limits(path: Path, arms: Mapping[str, Any], objectives: Any) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Separate the field `objectives` of arms from those of the config."""
    if not isinstance(objectives, Mapping) or not objectives:
        raise GridError(f"{path}: objectives is {objectives!r}, expected tables such as [objectives.edm]")
    fields, limits = {}, {}
    for arm, settings in arms.items():
        fields[arm] = settings
        if isinstance(settings, Mapping) and "objectives" in settings:
            names = settings["objectives"]
            if not isinstance(names, list) or not names or not all(name in objectives for name in names):
                known = ", ".join(filter(None, objectives)) or "the tables [objectives.NAME], of which there are none"
                raise GridError(f"{path}: arm {arm} has objectives {names!r}, expected a list of some of {known}")
            fields[arm] = {name: value for name, value in settings.items() if name != "objectives"}
            limits[arm] = tuple(names)
    return fields, limits


def _multiplied(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with `changes`, of which {"times": x} multiplies."""
    values = {
        name: fields.get(name, 0) * value["times"] if isinstance(value, Mapping) and set(value) == {"times"} else value
        for name, value in changes.items()
    }
    return {**fields, **values}


def _check_fields(path: Path, kind: str, name: str, settings: Any) -> None:
    """Raise unless these are fields that a table of this kind, "arm" or "objective", can set."""
    what = f"{kind} {name}"
    if name and not re.fullmatch(r"[\w=,.+-]+", name):
        raise GridError(f"{path}: {kind} {name!r} names a folder: letters, digits and _ = , . + - only")
    if not isinstance(settings, Mapping):
        raise GridError(f"{path}: {what} is {settings!r}, expected fields of the training config")
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    for field, value in settings.items():
        if field not in fields or field == "seed":
            raise GridError(f"{path}: {what} has {field}, which is not a field that an arm can set")
        if isinstance(value, Mapping) and "times" in value and not isinstance(value["times"], (int, float)):
            raise GridError(f"{path}: {what} has {field} times {value['times']!r}, expected a number")


def _check_table(path: Path, arm: str, arms: Mapping[str, Any], objectives: Mapping[str, tuple[str, ...]]) -> None:
    """Raise unless the arm that another arm takes its table from exists wherever the other does."""
    table = arms[arm].get("table")
    if not isinstance(table, Mapping):
        return
    if set(table) != {"arm"} or table["arm"] not in arms:
        raise GridError(f"{path}: arm {arm} has table = {dict(table)}, expected {{ arm = NAME }} of another arm")
    if isinstance(arms[table["arm"]].get("table"), Mapping):
        raise GridError(f"{path}: arm {arm} needs {table['arm']}, which itself needs another arm")
    if lacking := [name for name in objectives[arm] if name not in objectives[table["arm"]]]:
        raise GridError(f"{path}: arm {arm} needs {table['arm']}, which objective {lacking[0]} does not have")


def arm_label(objective: str, arm: str) -> str:
    """objective/arm, or the arm in a grid without objectives."""
    return f"{objective}/{arm}" if objective else arm


def _run_path(out: Path, objective: str, arm: str, seed: int) -> Path:
    return out / objective / arm / f"seed-{seed}"
