"""What the recorded losses of a criterion are errors against: the data, or a target that is less random.

Posterior-mean targets (`vadiff.targets`) take a part out of the loss that does not depend on the network. Whatever
computes x0 errors or gaps from a criterion's statistics adds it back by `removed_error`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

_RECORDED = "removed.sums"  # in the state of a target: what it has taken out


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
    if not isinstance(target, RegressionTarget) or not isinstance(target, nn.Module):
        raise TypeError(f"target is a {type(target).__name__}, expected a vadiff.targets.PosteriorMean, or None")
    if loss != "mse":
        raise ValueError(
            f"loss is {loss!r} with a posterior-mean target, expected 'mse': only the squared error has the same "
            "minimiser against the posterior mean"
        )


def check_change(criterion: Any, target: object) -> None:
    """Raise if the criterion has recorded losses, which are errors against another target.

    Reads the number of samples, which synchronises with the GPU.
    """
    now = target_of(criterion)
    count = criterion.statistics.count
    if target is now or count.device.type == "meta" or not bool(count.sum() > 0):
        return
    held = "the data" if now is None else f"the {now.description}"
    raise ValueError(
        f"target is a {type(target).__name__}, but the statistics hold errors against {held}: what is read from them "
        "would be wrong. Assign the target before the first call and before a state is loaded, or call "
        "criterion.statistics.reset() first"
    )


def problem_with_state(criterion: Any, state_dict: Mapping[str, Any], prefix: str) -> str | None:
    """Why the statistics of a saved state cannot be read with the criterion's target; None if they can."""
    saved, now = f"{prefix}target.{_RECORDED}" in state_dict, target_of(criterion)
    if saved and now is None:
        return (
            "the saved statistics are errors against posterior means, but the criterion has no target: assign "
            "criterion.target = vadiff.targets.PosteriorMean(...) as in that training before you load the state, or "
            "vadiff.targets.Recorded(description) to read the statistics only"
        )
    if not saved and now is not None and f"{prefix}statistics.state" in state_dict:
        return (
            f"the saved statistics are errors against the data, but the criterion's target is the {now.description}: "
            "load the state before you assign the target, and call criterion.statistics.reset() in between"
        )
    return None
