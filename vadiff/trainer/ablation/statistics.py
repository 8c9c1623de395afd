"""Statistics of paired differences over seeds: intervals, Holm's correction, and what may be claimed from them."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from ...extras import import_extra

LEAST_SEEDS = 5  # fewer say nothing about the spread over seeds: no interval, no p-value
LEVEL = 0.05


class Interval(NamedTuple):
    """Mean over seeds, with a 95 % confidence interval by Student's t.

    Bounds are NaN from fewer than `LEAST_SEEDS`; mean and bounds are NaN if a value is not finite.
    """

    mean: float
    low: float
    high: float
    number: int

    def exp(self) -> "Interval":
        """Of the ratio, if this is of its logarithm."""
        return Interval(math.exp(self.mean), math.exp(self.low), math.exp(self.high), self.number)


class Effect(NamedTuple):
    """ln(figure of an arm / figure of the baseline), paired by seed. Below 0 the arm is better."""

    ratio: Interval
    p: float  # that the mean is 0: two-sided t-test, corrected for the number of arms; see `p_value`
    per_seed: Mapping[int, float] = MappingProxyType({})  # seed → ln ratio

    @classmethod
    def of(cls, per_seed: Mapping[int, float]) -> "Effect":
        """The effect of paired differences; its p-value is not corrected."""
        values = list(per_seed.values())
        return cls(interval(values), p_value(values), per_seed)

    @property
    def finite(self) -> bool:
        """Whether every seed has a figure above 0 and finite, as all have unless a run diverged."""
        return math.isfinite(self.ratio.mean)

    @property
    def better(self) -> bool:
        """Whether the arm is better, at `LEVEL` for all arms together."""
        return self.p < LEVEL and self.ratio.mean < 0.0

    @property
    def worse(self) -> bool:
        """Whether the arm is worse, at `LEVEL` for all arms together."""
        return self.p < LEVEL and self.ratio.mean > 0.0

    @property
    def may_be_worse(self) -> bool:
        """Whether the arm's own interval, without correction, lies above 0 or is missing: enough to spoil a claim."""
        return not self.ratio.low <= 0.0


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % confidence interval of paired differences, mean ± t·s/√n with n - 1 degrees of freedom.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    number = len(values)
    finite = number > 0 and all(map(math.isfinite, values))
    mean = float(np.mean(values)) if finite else math.nan
    if number < LEAST_SEEDS or not finite:
        return Interval(mean, math.nan, math.nan, number)
    t = float(import_extra("scipy.stats", "train").t.ppf(1.0 - LEVEL / 2.0, number - 1))
    reach = t * float(np.std(values, ddof=1)) / math.sqrt(number)
    return Interval(mean, mean - reach, mean + reach, number)


def p_value(values: Sequence[float]) -> float:
    """Of the two-sided t-test that paired differences have mean 0; NaN from fewer than `LEAST_SEEDS`.

    It is 1 if a value is not finite: nothing is shown then, but the arm counts in `holm`.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    if len(values) < LEAST_SEEDS:
        return math.nan
    if not all(map(math.isfinite, values)):
        return 1.0
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    if error == 0.0:  # the seeds agree exactly
        return 1.0 if mean == 0.0 else 0.0
    return float(2.0 * import_extra("scipy.stats", "train").t.sf(abs(mean) / error, len(values) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down procedure; NaN stays, and is not counted.

    The i-th smallest of n becomes the largest of (n - j)·p_j over the j ≤ i smallest, counted from 0, and at most 1.
    Source: Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    order = sorted((place for place, p in enumerate(p_values) if not math.isnan(p)), key=lambda place: p_values[place])
    corrected, largest = list(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def verdict(held_out: Effect, distance: Effect | None, measured: int = 0, runs: int = 0) -> str:
    """What may be claimed of an arm: "better" needs one figure better and the other not worse.

    Args:
        held_out: of the held-out loss.
        distance: of the Fréchet distance; None unless all runs were measured.
        measured: how many runs, of the arm and of its baseline, have a Fréchet distance.
        runs: how many there are.

    Returns:
        "better", "worse" (one figure worse, none better), "mixed" (one better, the other worse), "not shown" (neither),
        or "no claim: ..." with the reason.
    """
    if not held_out.finite:
        return "no claim: a run diverged"
    if distance is None:
        return f"no claim: images of {measured} of {runs} runs" if measured else "no claim: no images"
    if not distance.finite:
        return "no claim: a distance is not above 0"
    effects = (held_out, distance)
    fewest = min(effect.ratio.number for effect in effects)
    if fewest < LEAST_SEEDS:
        return f"no claim: {fewest} seeds"
    if any(effect.better for effect in effects):
        return "mixed" if any(effect.may_be_worse for effect in effects) else "better"
    return "worse" if any(effect.worse for effect in effects) else "not shown"
