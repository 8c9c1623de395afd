"""Scaling laws of the loss, with and without the irreducible part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor


class ScalingLaw(NamedTuple):
    """loss - J* = beta·compute**alpha, fitted in logs."""

    beta: float
    alpha: float
    correlation: float  # Pearson's, of ln(compute) with ln(loss - J*); -1 is a perfect law


def fit_scaling_law(
    compute: Sequence[float] | Tensor, loss: Sequence[float] | Tensor, optimal: float = 0.0
) -> ScalingLaw:
    """Least squares of ln(loss - optimal) on ln(compute) (arXiv 2506.13763, section 6).

    Args:
        compute: cost of each model, > 0: FLOPs, parameters, images.
        loss: each model's loss, at one noise level or in total, in the same unit as `optimal`.
        optimal: J* at the same level or in total; 0 fits the loss itself.

    Raises:
        ValueError: fewer than two models, a loss at or below `optimal`, or a compute that is not positive.

    Example:
        >>> fit_scaling_law([1.0, 10.0, 100.0], [1.1, 0.6, 0.35], optimal=0.1)
        ScalingLaw(beta=1.0, alpha=-0.3010..., correlation=-1.0)
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (compute, loss))
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
        raise ValueError(
            f"compute has shape {x.shape} and loss {y.shape}, expected the same (M,): one value for each of two models "
            "or more"
        )
    if not (np.isfinite(x).all() and (x > 0).all()):
        raise ValueError("compute has a value that is not positive and finite, expected numbers > 0")
    if not (np.isfinite(y).all() and (y > optimal).all()):
        raise ValueError(
            f"loss has a value of {y.min():g} with optimal {optimal:g}, expected losses above it: lower ones are "
            "within the error of J*, or measured on other data"
        )
    log_x, log_y = np.log(x), np.log(y - optimal)
    spread = log_x - log_x.mean()
    if not spread.any():
        raise ValueError("compute is the same for all models, expected at least two sizes")
    alpha = float(spread @ log_y / (spread @ spread))
    beta = float(np.exp(log_y.mean() - alpha * log_x.mean()))
    flat = np.ptp(log_y) == 0
    return ScalingLaw(beta, alpha, 0.0 if flat else float(np.corrcoef(log_x, log_y)[0, 1]))
