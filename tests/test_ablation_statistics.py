"""vadiff.trainer.ablation.statistics: intervals, Holm's correction, and what may be claimed."""

import math

import numpy as np
import pytest
from scipy import stats

from vadiff.trainer.ablation.statistics import Effect, Interval, holm, interval, p_value, verdict


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [low <= 1.0 <= high for _, low, high, _ in (interval(rng.normal(1, 2, 5)) for _ in range(2000))]
    assert 0.935 < np.mean(covered) < 0.965


@pytest.mark.parametrize("number", [0, 1, 4])
def test_fewer_than_five_seeds_have_a_mean_and_no_interval(number: int) -> None:
    values = [0.1] * number
    found = interval(values)
    assert found.number == number
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert math.isnan(p_value(values))
    assert number == 0 or found.mean == pytest.approx(0.1)


def test_p_value_is_that_of_scipys_t_test() -> None:
    values = [0.2, -0.1, 0.4, 0.3, 0.1, 0.25]
    assert p_value(values) == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue)
    assert p_value([0.3] * 5) == 0.0
    assert p_value([0.0] * 5) == 1.0


def test_p_values_are_corrected_by_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_p_value_that_is_missing_is_not_counted() -> None:
    corrected = holm([0.01, math.nan, 0.04])
    assert corrected[0::2] == pytest.approx([0.02, 0.04])
    assert math.isnan(corrected[1])


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_seed_without_a_finite_figure_shows_nothing_but_counts(broken: float) -> None:
    diverged = Effect.of(dict(enumerate([-0.3, -0.31, -0.32, -0.3, broken])))
    assert not diverged.finite
    assert all(map(math.isnan, diverged.ratio[:3]))
    assert (diverged.better, diverged.worse, diverged.may_be_worse) == (False, False, True)
    assert holm([0.01, diverged.p]) == pytest.approx([0.02, 1.0])


BETTER = Effect(Interval(-0.05, -0.08, -0.02, 5), 0.01)
WORSE = Effect(Interval(0.05, 0.02, 0.08, 5), 0.01)
SAME = Effect(Interval(-0.01, -0.04, 0.02, 5), 0.4)
ONLY_UNCORRECTED = Effect(Interval(0.03, 0.001, 0.06, 5), 0.2)
FEW = Effect(Interval(-0.05, math.nan, math.nan, 4), math.nan)
DIVERGED = Effect(Interval(math.nan, math.nan, math.nan, 5), 1.0)


@pytest.mark.parametrize(
    ("held_out", "distance", "claim"),
    [
        (BETTER, SAME, "better"),
        (SAME, BETTER, "better"),
        (BETTER, BETTER, "better"),
        (BETTER, WORSE, "mixed"),
        (ONLY_UNCORRECTED, BETTER, "mixed"),  # enough to spoil a claim, too little to make one
        (SAME, ONLY_UNCORRECTED, "not shown"),
        (SAME, WORSE, "worse"),
        (SAME, SAME, "not shown"),
        (BETTER, None, "no claim: no images"),
        (BETTER, FEW, "no claim: 4 seeds"),
        (BETTER, DIVERGED, "no claim: a distance is not above 0"),
        (DIVERGED, BETTER, "no claim: a run diverged"),
        (DIVERGED, None, "no claim: a run diverged"),
    ],
)
def test_claim_needs_one_figure_better_and_the_other_not_worse(
    held_out: Effect, distance: Effect | None, claim: str
) -> None:
    assert verdict(held_out, distance) == claim


def test_images_of_some_runs_are_no_claim_and_said_as_such() -> None:
    assert verdict(BETTER, None, 9, 10) == "no claim: images of 9 of 10 runs"
    assert verdict(BETTER, None, 0, 10) == "no claim: no images"
