"""What the recorded losses of a criterion are errors against: the data, or a target that is less random.

Posterior-mean targets (`vadiff.targets`) take a part out of the loss that does not depend on the network. Whatever
computes x0 errors or gaps from a criterion's statistics adds it back by `removed_error`.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class RegressionTarget(Protocol):
    """The attributes of a `vadiff.targets.PosteriorMean` that are read here."""

    @property
    def description(self) -> str:
        """In words."""

    def removed_error(self, log_snr: Tensor) -> Tensor:
        """What the target takes out of the mean squared error of x0, per element. [N] → [N] float64."""


def target_of(criterion: Any) -> RegressionTarget | None:
    """`criterion.target`; None is the data itself, also of criteria saved before there was a choice."""
    target: RegressionTarget | None = getattr(criterion, "target", None)
    return target


def removed_error(criterion: Any, log_snr: Tensor) -> Tensor:
    """What the criterion's target takes out of the x0 error at each log-SNR. [N] → [N] float64, on the same device."""
    target = target_of(criterion)
    return torch.zeros_like(log_snr, dtype=torch.float64) if target is None else target.removed_error(log_snr)


def check_target(target: object, loss: str) -> None:
    """Raise unless a criterion with this loss can have this target."""
    if target is None:
        return
    if not isinstance(target, RegressionTarget):
        raise TypeError(f"target is a {type(target).__name__}, expected a vadiff.targets.PosteriorMean, or None")
    if loss != "mse":
        raise ValueError(
            f"loss is {loss!r} with a posterior-mean target, expected 'mse': only the squared error has the same "
            "minimiser against the posterior mean"
        )
