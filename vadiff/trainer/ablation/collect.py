"""Results of a grid: every arm compared with the baseline, paired by seed.

The primary figure of a pair is the mean over the held-out noise levels of ln(loss of the arm / loss of the baseline),
with averaged weights on the same images and noise. The ratio is the same for the x0 loss and for EDM's loss if both
runs have the same sigma_data.
Below 0 the arm is better; -0.01 is 1 % less loss.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...extras import import_extra
from ..training.metrics import stacked
from ..training.run import open_run
from .evaluation import drawn_with, first_difference
from .grid import Grid, GridError, PlannedRun


class Interval(NamedTuple):
    """Mean of paired values, with a 95 % confidence interval by Student's t; NaN bounds from fewer than two."""

    mean: float
    low: float
    high: float
    number: int


@dataclass(frozen=True)
class ArmResult:
    """One arm."""

    arm: str
    held_out: Interval  # ln ratio to the baseline, mean over noise levels
    per_level: tuple[Interval, ...]  # ln ratio, by noise level
    images_to_reach: Interval  # the baseline's final held-out loss ÷ the baseline's images; NaN unless all seeds do
    reached: int  # seeds that reach this loss
    evaluation: Mapping[str, Interval]  # difference to the baseline in each metric of `vadiff evaluate`
    seconds: float  # of training, mean over seeds
    per_seed: Mapping[int, float]  # seed → primary figure


@dataclass(frozen=True)
class Results:
    """Collected results of a grid."""

    name: str
    baseline: str
    seeds: tuple[int, ...]
    log_snr: tuple[float, ...]  # of the held-out levels
    arms: tuple[ArmResult, ...]
    missing: tuple[str, ...]  # arm/seed of runs that are unfinished, or whose baseline run is

    def as_text(self) -> str:
        """The results as a text table, without a trailing newline."""
        width = max([len(arm.arm) for arm in self.arms] + [len(self.baseline), 8])
        metrics = sorted({metric for arm in self.arms for metric in arm.evaluation})
        header = f"{'arm':<{width}}  {'seeds':>5}  {'held-out loss':>24}  {'images to reach':>22}  {'seconds':>7}"
        lines = [
            f"{self.name}: compared with {self.baseline}, paired by seed; mean [95 % interval]",
            "",
            header + "".join(f"  {metric:>24}" for metric in metrics),
        ]
        for arm in self.arms:
            change = [f"{100 * math.expm1(value):+.2f}" for value in arm.held_out[:3]]
            reach = f"{arm.reached} of {arm.held_out.number} reached"
            if arm.reached == arm.held_out.number:
                reach = "{:.2f} × [{:.2f}, {:.2f}]".format(*arm.images_to_reach)
            line = f"{arm.arm:<{width}}  {arm.held_out.number:>5}  "
            line += f"{f'{change[0]} % [{change[1]}, {change[2]}]':>24}  {reach:>22}  {arm.seconds:>7.0f}"
            for metric in metrics:
                value = arm.evaluation.get(metric)
                text = "" if value is None else f"{value.mean:+.3g} [{value.low:+.3g}, {value.high:+.3g}]"
                line += f"  {text:>24}"
            lines.append(line)
        lines += [
            "",
            "Held-out loss: mean over noise levels of ln(loss / loss of the baseline), in percent; below 0 is better.",
            "Images to reach the baseline's final held-out loss ÷ images the baseline saw; below 1 is faster.",
        ]
        if len(self.seeds) < 10:
            lines.append(f"{len(self.seeds)} seeds say nothing about the spread over seeds.")
        if self.missing:
            lines.append(f"Not finished: {', '.join(self.missing)}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON; NaN is None."""
        arms = {
            arm.arm: {
                "held_out": _plain(arm.held_out),
                "per_level": [_plain(level) for level in arm.per_level],
                "images_to_reach": _plain(arm.images_to_reach),
                "reached": arm.reached,
                "evaluation": {name: _plain(value) for name, value in arm.evaluation.items()},
                "seconds": arm.seconds,
                "per_seed": {str(seed): value for seed, value in arm.per_seed.items()},
            }
            for arm in self.arms
        }
        fields = {"name": self.name, "baseline": self.baseline, "seeds": list(self.seeds)}
        return {**fields, "log_snr": list(self.log_snr), "arms": arms, "missing": list(self.missing)}


def collect(grid: Grid, out: Path) -> Results:
    """Read the runs of a grid that are done.

    Raises:
        GridError: a run was trained with other settings than the grid has, a pair cannot be compared, or runs were
            evaluated differently; the message names them.
        MissingExtraError: SciPy is not installed.
    """
    runs = {(run.arm, run.seed): run for run in grid.runs(out)}
    for run in runs.values():
        run.check()
    done = {key: _Outcome.of(run) for key, run in runs.items() if run.is_done}
    paired = {key: outcome for key, outcome in done.items() if (grid.baseline, key[1]) in done}
    _check_evaluated_alike(paired)
    arms = []
    for arm in grid.arms:
        pairs = {s: (paired[arm, s], paired[grid.baseline, s]) for s in grid.seeds if (arm, s) in paired}
        if arm != grid.baseline and pairs:
            arms.append(_arm_result(arm, pairs))
    log_snr = next((tuple(outcome.log_snr) for outcome in done.values()), ())
    missing = tuple(f"{arm}/seed-{seed}" for arm, seed in runs if (arm, seed) not in paired)
    return Results(grid.name, grid.baseline, grid.seeds, log_snr, tuple(arms), missing)


@dataclass(frozen=True)
class _Outcome:
    """Results of one run."""

    log_snr: list[float]  # [L]
    sigma_data: float
    images: Tensor  # [R], at each measurement of the held-out loss
    log_loss: Tensor  # [R, L] float64, ln of the held-out loss, averaged weights
    evaluation: dict[str, float]
    evaluated: dict[str, Any] | None  # options of `vadiff evaluate`; None if it was not run
    seconds: float

    @classmethod
    def of(cls, run: PlannedRun) -> "_Outcome":
        opened = open_run(run.path)
        entries = opened.metrics()
        measured = [entry for entry in entries if "held_out" in entry]
        evaluations = dict(opened.evaluations()).get(entries[-1]["images"], {})  # of the last step only
        return cls(
            measured[-1]["held_out"]["log_snr"],
            run.config.sigma_data,
            stacked(measured, "images"),
            stacked(measured, "held_out", "loss_ema").log(),
            {name: value for name, value in evaluations.items() if isinstance(value, (int, float))},
            drawn_with(run.path, entries[-1]["step"]),
            max(entry["seconds"] for entry in entries if "seconds" in entry),
        )

    def images_to(self, log_loss: float) -> float:
        """Images until the mean ln loss over levels first reached `log_loss`, interpolated; NaN if it never did."""
        means = self.log_loss.mean(1).tolist()
        images = self.images.tolist()
        for index, mean in enumerate(means):
            if mean <= log_loss:
                if index == 0 or mean == log_loss:
                    return float(images[index])
                part = (means[index - 1] - log_loss) / (means[index - 1] - mean)
                return float(images[index - 1] + part * (images[index] - images[index - 1]))
        return math.nan


def _arm_result(arm: str, pairs: Mapping[int, tuple[_Outcome, _Outcome]]) -> ArmResult:
    for seed, (mine, other) in pairs.items():
        _check_comparable(arm, seed, mine, other)
    ratios = torch.stack([mine.log_loss[-1] - other.log_loss[-1] for mine, other in pairs.values()])  # [S, L]
    reach = [m.images_to(float(o.log_loss[-1].mean())) / float(o.images[-1]) for m, o in pairs.values()]
    reached = [share for share in reach if not math.isnan(share)]
    shared = set.intersection(*({*mine.evaluation} & {*other.evaluation} for mine, other in pairs.values()))
    return ArmResult(
        arm,
        interval(ratios.mean(1).tolist()),
        tuple(interval(level.tolist()) for level in ratios.T),
        # NaN unless all seeds reached the loss: without the slow seeds the mean would be too low.
        interval(reached) if len(reached) == len(reach) else Interval(math.nan, math.nan, math.nan, len(reach)),
        len(reached),
        {
            name: interval([m.evaluation[name] - o.evaluation[name] for m, o in pairs.values()])
            for name in sorted(shared)
        },
        float(np.mean([mine.seconds for mine, _ in pairs.values()])),
        dict(zip(pairs, ratios.mean(1).tolist(), strict=True)),
    )


def _check_comparable(arm: str, seed: int, mine: _Outcome, other: _Outcome) -> None:
    for name in ("sigma_data", "log_snr"):
        values = getattr(mine, name), getattr(other, name)
        if values[0] != values[1]:
            what = "weighs its held-out loss by" if name == "sigma_data" else "measured its held-out loss at"
            raise GridError(
                f"arm {arm}, seed {seed} {what} {name} {values[0]}, the baseline {values[1]}: their losses cannot be "
                "compared. Give both arms the same"
            )


def _check_evaluated_alike(outcomes: Mapping[tuple[str, int], _Outcome]) -> None:
    """Raise GridError unless all runs were evaluated alike: image metrics such as FID depend on the number of images,
    the seeds and the layer."""
    measured = [(run, outcome.evaluated) for run, outcome in outcomes.items() if outcome.evaluated is not None]
    for (arm, seed), evaluated in measured[1:]:
        (first_arm, first_seed), expected = measured[0]
        assert evaluated is not None
        assert expected is not None
        name = first_difference(evaluated, expected)
        if name is not None:
            raise GridError(
                f"arm {arm}, seed {seed} was evaluated with {name} {evaluated.get(name)!r}, arm {first_arm}, seed "
                f"{first_seed} with {expected.get(name)!r}: their metrics cannot be compared. `vadiff ablate "
                "--evaluate` measures all of them alike"
            )


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % confidence interval of paired differences, mean ± t·s/√n with n - 1 degrees of freedom."""
    number = len(values)
    if number == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(np.mean(values))
    if number == 1:
        return Interval(mean, math.nan, math.nan, 1)
    t = float(import_extra("scipy.stats", "train").t.ppf(0.975, number - 1))
    reach = t * float(np.std(values, ddof=1)) / math.sqrt(number)
    return Interval(mean, mean - reach, mean + reach, number)


def _plain(value: Interval) -> dict[str, float | int | None]:
    return {name: None if math.isnan(number) else number for name, number in value._asdict().items()}
