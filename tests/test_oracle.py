"""The tolerance of variances: what rounding can do is allowed, and a wrong formula is not."""

from __future__ import annotations

import numpy as np
import pytest
from oracle import LOSS_EPSILON, Oracle, assert_variance_close

ROUNDINGS = {
    "random": lambda rng, loss: rng.uniform(-1, 1, loss.shape),
    "apart": lambda rng, loss: np.where(loss > np.median(loss), 1.0, -1.0),  # all spread the losses
    "together": lambda rng, loss: np.where(loss > np.median(loss), -1.0, 1.0),
}


def recorded(losses: list[np.ndarray], bins: int = 8) -> Oracle:
    """Four batches of losses, each sample in its bin in turn, of which half are forgotten after one batch."""
    oracle = Oracle(bins, -4.0, 4.0, half_life=len(losses[0]) / bins)
    for loss in losses:
        oracle.reweight(loss, oracle.centers[np.arange(len(loss)) % bins])
    return oracle


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3, 0.3])
@pytest.mark.parametrize("samples", [16, 200])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_variances_of_rounded_losses_are_within_the_bound(rounding: str, samples: int, spread: float) -> None:
    """Two of them reach it to nine digits: it is the smallest bound."""
    rng = np.random.default_rng(samples)
    losses = [np.exp(rng.normal()) * (1 + spread * rng.uniform(-1, 1, samples)) for _ in range(4)]
    for batches in (losses, losses[:1] * 4):  # means that differ between batches spread a bin, too
        rounded = [loss * (1 + 0.999999 * LOSS_EPSILON * ROUNDINGS[rounding](rng, loss)) for loss in batches]
        exact, found = recorded(batches), recorded(rounded)
        assert_variance_close(found.variance, exact.count, exact.mean, exact.variance)


@pytest.mark.parametrize("samples", [16, 200])
def test_a_wrong_variance_is_not(samples: int) -> None:
    """M2 off by 1e-4, one sample more in the denominator; relative std 3 %, as of CIFAR's losses at one level."""
    rng = np.random.default_rng(0)
    exact = recorded([rng.normal(1.0, 0.03, samples)])
    for wrong in (exact.variance * (1 + 1e-4), exact.m2 / exact.count, exact.m2 / (exact.count - 2 + 1e-9)):
        with pytest.raises(AssertionError, match="the variance of bin 0 is"):
            assert_variance_close(wrong, exact.count, exact.mean, exact.variance)
    missing = np.where(np.arange(8) == 3, np.nan, exact.variance)
    with pytest.raises(AssertionError):
        assert_variance_close(missing, exact.count, exact.mean, exact.variance)
