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
    """Mean over seeds, with a 95 % confidence interval by Student's t; NaN bounds from fewer than `LEAST_SEEDS`."""

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
    p: float  # that the mean is 0: two-sided t-test, corrected for the number of arms; NaN without an interval
    per_seed: Mapping[int, float] = MappingProxyType({})  # seed → ln ratio

    @classmethod
    def of(cls, per_seed: Mapping[int, float]) -> "Effect":
        """The effect of paired differences; its p-value is not corrected."""
        values = list(per_seed.values())
        return cls(interval(values), p_value(values), per_seed)

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
        """Whether the arm's own interval, without correction, lies above 0: enough to spoil a claim."""
        return self.ratio.low > 0.0


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % confidence interval of paired differences, mean ± t·s/√n with n - 1 degrees of freedom.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    number = len(values)
    mean = float(np.mean(values)) if number else math.nan
    if number < LEAST_SEEDS:
        return Interval(mean, math.nan, math.nan, number)
    t = float(import_extra("scipy.stats", "train").t.ppf(1.0 - LEVEL / 2.0, number - 1))
    reach = t * float(np.std(values, ddof=1)) / math.sqrt(number)
    return Interval(mean, mean - reach, mean + reach, number)


def p_value(values: Sequence[float]) -> float:
    """Of the two-sided t-test that paired differences have mean 0; NaN from fewer than `LEAST_SEEDS`.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    if len(values) < LEAST_SEEDS:
        return math.nan
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


def verdict(held_out: Effect, distance: Effect | None) -> str:
    """What may be claimed of an arm: "better" needs one figure better and the other not worse.

    Args:
        held_out: of the held-out loss.
        distance: of the Fréchet distance; None if it was not measured.

    Returns:
        "better", "worse" (one figure worse, none better), "mixed" (one better, the other worse), "not shown" (neither),
        or "no claim: ..." with the reason.
    """
    if distance is None:
        return "no claim: no images"
    fewest = min(held_out.ratio.number, distance.ratio.number)
    if fewest < LEAST_SEEDS:
        return f"no claim: {fewest} seeds"
    effects = (held_out, distance)
    if any(effect.better for effect in effects):
        return "mixed" if any(effect.may_be_worse for effect in effects) else "better"
    return "worse" if any(effect.worse for effect in effects) else "not shown"
