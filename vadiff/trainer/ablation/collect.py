"""Results of a grid: every arm compared with the baseline of the same objective, paired by seed.

Two primary figures of a pair, both logarithms of ratios; below 0 the arm is better, -0.01 is 1 % less.

- A, held-out loss: the mean over the held-out noise levels of ln(x0 loss of the arm / of the baseline), with averaged
  weights on the same images and noise. It is the same in every form of the loss: the weights of a form cancel.
- B, images: ln(Fréchet distance of the arm / of the baseline), each averaged over the sets of images drawn.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..training.held_out import level_mean
from ..training.metrics import stacked
from ..training.run import open_run
from .evaluation import drawn_with, first_difference
from .grid import Grid, GridError, PlannedRun, arm_label
from .statistics import Effect, Interval, holm, interval, verdict


@dataclass(frozen=True)
class ArmResult:
    """One arm of one objective."""

    objective: str  # "" in a grid without objectives
    arm: str
    held_out: Effect  # primary figure A
    distance: Effect | None  # primary figure B; None unless all runs of the arm and their baselines were measured
    distance_name: str | None  # of the metric, such as fid or fd-digits; None if no run was measured
    measured: int  # runs of the arm and their baselines that have this metric
    log_snr: tuple[float, ...]  # of the held-out levels
    per_level: tuple[Interval, ...]  # ln ratio of the held-out loss, by noise level
    images_to_reach: Interval  # the baseline's final held-out loss ÷ the baseline's images; NaN unless all seeds do
    reached: int  # seeds that reach this loss
    evaluation: Mapping[str, Interval]  # difference to the baseline in each metric of `vadiff evaluate`
    seconds: float  # of training, mean over seeds

    @property
    def label(self) -> str:
        """objective/arm, or the arm in a grid without objectives."""
        return arm_label(self.objective, self.arm)

    @property
    def verdict(self) -> str:
        """What may be claimed, see `statistics.verdict`."""
        return verdict(self.held_out, self.distance, self.measured, 2 * self.held_out.ratio.number)


@dataclass(frozen=True)
class Results:
    """Collected results of a grid."""

    name: str
    baseline: str
    seeds: tuple[int, ...]
    arms: tuple[ArmResult, ...]
    missing: tuple[str, ...]  # arm/seed of runs that are unfinished, or whose baseline run is

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON; what is not finite is None."""
        arms = {
            arm.label: {
                "objective": arm.objective or None,
                "held_out": _plain_effect(arm.held_out),
                "distance": None
                if arm.distance is None
                else {"metric": arm.distance_name, **_plain_effect(arm.distance)},
                "measured": arm.measured,
                "verdict": arm.verdict,
                "log_snr": list(arm.log_snr),
                "per_level": [_plain(level) for level in arm.per_level],
                "images_to_reach": _plain(arm.images_to_reach),
                "reached": arm.reached,
                "evaluation": {name: _plain(value) for name, value in arm.evaluation.items()},
                "seconds": arm.seconds,
            }
            for arm in self.arms
        }
        fields = {"name": self.name, "baseline": self.baseline, "seeds": list(self.seeds)}
        return {**fields, "arms": arms, "missing": list(self.missing)}


def collect(grid: Grid, out: Path) -> Results:
    """Read the runs of a grid that are done.

    p-values are corrected, figure by figure, for the number of arms of an objective.

    Raises:
        GridError: a run was trained with other settings than the grid has, a pair cannot be compared, or runs were
            evaluated differently; the message names them.
        MissingExtraError: SciPy is not installed.
    """
    runs = {(run.objective, run.arm, run.seed): run for run in grid.runs(out)}
    for run in runs.values():
        run.check()
    done = {key: _Outcome.of(run) for key, run in runs.items() if run.is_done}
    paired = {key: outcome for key, outcome in done.items() if (key[0], grid.baseline, key[2]) in done}
    arms: list[ArmResult] = []
    for objective in grid.objectives:
        _check_evaluated_alike({key[1:]: outcome for key, outcome in paired.items() if key[0] == objective})
        pairs = {
            arm: {
                seed: (paired[objective, arm, seed], paired[objective, grid.baseline, seed])
                for seed in grid.seeds
                if (objective, arm, seed) in paired
            }
            for arm in grid.arms_of(objective)
            if arm != grid.baseline
        }
        arms += _corrected([_arm_result(objective, arm, found) for arm, found in pairs.items() if found])
    missing = tuple(f"{runs[key].label}/seed-{key[2]}" for key in runs if key not in paired)
    return Results(grid.name, grid.baseline, grid.seeds, tuple(arms), missing)


@dataclass(frozen=True)
class _Outcome:
    """Results of one run."""

    log_snr: list[float]  # [L]
    sigma_data: float
    images: Tensor  # [R], at each measurement of the held-out loss
    log_loss: Tensor  # [R, L] float64, ln of the held-out loss, averaged weights
    means: list[float]  # [R], its mean over levels
    evaluation: dict[str, float]
    evaluated: dict[str, Any] | None  # options of `vadiff evaluate`; None if it was not run
    seconds: float

    @classmethod
    def of(cls, run: PlannedRun) -> "_Outcome":
        opened = open_run(run.path)
        entries = opened.metrics()
        measured = [entry for entry in entries if "held_out" in entry]
        log_snr, loss = measured[-1]["held_out"]["log_snr"], stacked(measured, "held_out", "loss_ema")
        evaluations = dict(opened.evaluations()).get(entries[-1]["images"], {})  # of the last step only
        return cls(
            log_snr,
            run.config.sigma_data,
            stacked(measured, "images"),
            loss.log(),
            level_mean(loss, torch.tensor(log_snr), sigma_data=run.config.sigma_data).tolist(),
            {name: value for name, value in evaluations.items() if isinstance(value, (int, float))},
            drawn_with(run.path, entries[-1]["step"]),
            max(entry["seconds"] for entry in entries if "seconds" in entry),
        )

    def images_to(self, loss: float) -> float:
        """Images until the mean loss over levels first reached `loss`, interpolated in its logarithm; NaN if it never
        did, or if `loss` is not finite."""
        if not math.isfinite(loss):
            return math.nan
        images = self.images.tolist()
        for index, mean in enumerate(self.means):
            if mean <= loss:
                if index == 0 or mean == loss:
                    return float(images[index])
                before = self.means[index - 1]
                part = math.log(before / loss) / math.log(before / mean)
                return float(images[index - 1] + part * (images[index] - images[index - 1]))
        return math.nan


def _arm_result(objective: str, arm: str, pairs: Mapping[int, tuple[_Outcome, _Outcome]]) -> ArmResult:
    """The result of an arm, with p-values not yet corrected."""
    for seed, (mine, other) in pairs.items():
        _check_comparable(arm_label(objective, arm), seed, mine, other)
    ratios = torch.stack([mine.log_loss[-1] - other.log_loss[-1] for mine, other in pairs.values()])  # [S, L]
    figure_a = {seed: _log_ratio(mine.means[-1], other.means[-1]) for seed, (mine, other) in pairs.items()}
    reach = [mine.images_to(other.means[-1]) / float(other.images[-1]) for mine, other in pairs.values()]
    reached = [math.log(share) for share in reach if not math.isnan(share)]
    shared = set.intersection(*({*mine.evaluation} & {*other.evaluation} for mine, other in pairs.values()))
    evaluations = [outcome.evaluation for pair in pairs.values() for outcome in pair]
    distances = {name for values in evaluations for name in values if name.split("-")[0] in ("fid", "fd")}
    name = min(distances, key=lambda name: (name not in shared, name), default=None)
    distance = None
    if name in shared:
        distance = Effect.of(
            {seed: _log_ratio(m.evaluation[name], o.evaluation[name]) for seed, (m, o) in pairs.items()}
        )
    return ArmResult(
        objective,
        arm,
        Effect.of(figure_a),
        distance,
        name,
        sum(name in values for values in evaluations),
        tuple(next(iter(pairs.values()))[0].log_snr),
        tuple(interval(level.tolist()) for level in ratios.T),
        # NaN unless all seeds reached the loss: without the slow seeds the mean would be too low.
        interval(reached).exp() if len(reached) == len(reach) else Interval(math.nan, math.nan, math.nan, len(reach)),
        len(reached),
        {
            name: interval([m.evaluation[name] - o.evaluation[name] for m, o in pairs.values()])
            for name in sorted(shared)
        },
        float(np.mean([mine.seconds for mine, _ in pairs.values()])),
    )


def _log_ratio(mine: float, other: float) -> float:
    """ln(mine / other); NaN unless both are positive and finite, as the figures of runs that diverged are not."""
    return math.log(mine / other) if 0.0 < mine < math.inf and 0.0 < other < math.inf else math.nan


def _corrected(arms: Sequence[ArmResult]) -> list[ArmResult]:
    """The arms of an objective with p-values that are corrected for their number, figure by figure."""
    held_out = holm([arm.held_out.p for arm in arms])
    # Images cannot be drawn of a run that diverged: its arm counts all the same.
    unmeasured = [math.nan if arm.held_out.finite else 1.0 for arm in arms]
    distance = holm([p if arm.distance is None else arm.distance.p for arm, p in zip(arms, unmeasured, strict=True)])
    return [
        dataclasses.replace(
            arm,
            held_out=arm.held_out._replace(p=p_held_out),
            distance=None if arm.distance is None else arm.distance._replace(p=p_distance),
        )
        for arm, p_held_out, p_distance in zip(arms, held_out, distance, strict=True)
    ]


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


def _plain_effect(effect: Effect) -> dict[str, Any]:
    """With the p-value, which is corrected for the number of arms, and each seed's ln ratio."""
    per_seed = {str(seed): _plain_number(value) for seed, value in effect.per_seed.items()}
    return {**_plain(effect.ratio), "p": _plain_number(effect.p), "per_seed": per_seed}


def _plain(value: Interval) -> dict[str, float | int | None]:
    return {name: _plain_number(number) for name, number in value._asdict().items()}


def _plain_number(value: float) -> float | None:
    return value if math.isfinite(value) else None
