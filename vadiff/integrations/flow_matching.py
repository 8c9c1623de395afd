"""Flow matching as torchcfm and facebookresearch's flow_matching write it: noise at t = 0, data at t = 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._validation import require_number
from ..log_snr import from_flow_time
from ..loss import DiffusionLoss
from ..process import coefficients
from ..targets import PosteriorMean
from .form import criterion_in_form, training_target

__all__ = ["FlowMatchingLoss", "log_snr"]


def log_snr(t: Tensor, *, data_at: int = 1, sigma: float = 0.0, sigma_min: float = 0.0) -> Tensor:
    """λ of the path x_t = t·x1 + (1 - (1 - sigma_min)·t)·x0 + sigma·eps, x1 data and x0 noise.

    ln(t² / ((1 - (1 - sigma_min)·t)² + sigma²)).

    Args:
        t: [B] times in [0, 1], any floating dtype.
        data_at: 1; 0 where t = 0 is data (SD3, diffusers).
        sigma: standard deviation of added noise, torchcfm's ``ConditionalFlowMatcher(sigma)``.
        sigma_min: noise that is left at the data, of Lipman et al. (arXiv 2210.02747, eq. 20): torchcfm's
            ``TargetConditionalFlowMatcher(sigma)``.

    Returns:
        [B] float32 (float64 for float64 t); -inf at t = 0, +inf at t = 1 if sigma and sigma_min are 0.

    Raises:
        TypeError: t is not a floating-point tensor.
        ValueError: t is not [B], or out of range, or another argument is out of bounds.
    """
    require_number("sigma", sigma, at_least=0.0)
    if require_number("sigma_min", sigma_min, at_least=0.0) > 1.0:
        raise ValueError(f"sigma_min is {sigma_min!r}, expected at most 1: noise of the path has at most 1")
    straight = from_flow_time(t, data_at)
    if sigma == sigma_min == 0.0:
        return straight
    alpha, noise = _path(t.double(), data_at, sigma_min)
    return (2.0 * alpha.log() - (noise.square() + sigma**2).log()).to(straight.dtype)


def _path(t: Tensor, data_at: int, sigma_min: float) -> tuple[Tensor, Tensor]:
    """Scales of data and noise at times t."""
    time = t if data_at == 1 else 1.0 - t
    return time, 1.0 - (1.0 - sigma_min) * time


class FlowMatchingLoss(nn.Module):
    """The loss of the velocity, weighted and recorded per noise level.

    ``loss(vt, ut, t)`` replaces ``torch.mean((vt - ut) ** 2)``.

    Args:
        criterion: a `vadiff.DiffusionLoss`, or the name of a weighting for one with the default settings; "constant" is
            the plain mean. Fixed weights must be written for "flow"; they are exact for sigma = sigma_min = 0, and
            with a sigma_min (1 + sigma_min·t)² too low.
        data_at, sigma, sigma_min: see `log_snr`.
        target: regress on the posterior mean's velocity, in training mode; becomes `criterion.target`. For noise that
            is drawn independently of the data (no optimal-transport pairs) and sigma = 0.
        options: of the named weighting and of `vadiff.DiffusionLoss`, such as ``strength=0.5, fresh_statistics=True``.

    Raises:
        ValueError, TypeError: an argument out of bounds, or a criterion with fixed weights for another loss.
    """

    def __init__(
        self,
        criterion: DiffusionLoss | str = "variance_aware",
        *,
        data_at: int = 1,
        sigma: float = 0.0,
        sigma_min: float = 0.0,
        target: PosteriorMean | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        log_snr(torch.zeros(1), data_at=data_at, sigma=sigma, sigma_min=sigma_min)  # checks them
        self.criterion = criterion_in_form(criterion, "flow", target=target, options=options)
        self.data_at = data_at
        self.sigma = float(sigma)
        self.sigma_min = float(sigma_min)
        if self.criterion.target is not None:
            self._check_path()

    def forward(
        self,
        velocity: Tensor,
        target: Tensor,
        t: Tensor,
        *,
        noise: Tensor | None = None,
        sample_weight: Tensor | None = None,
        reduction: str = "mean",
        index: Tensor | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            velocity: what the network returned, [B, ...].
            target: the path's velocity, torchcfm's `ut`, flow_matching's `dx_t`; or the data x1 if `noise` is given.
            t: [B] times in [0, 1].
            noise: the x0 that is in x_t; the target velocity x1 - (1 - sigma_min)·x0 (its negative where data_at = 0)
                is then never written to memory. A posterior-mean target needs x1 and x0. Not the x0 given to torchcfm's
                optimal-transport matchers, which pair anew, or to `TargetConditionalFlowMatcher`, which draws its own.
            sample_weight, reduction: as for `vadiff.DiffusionLoss`.
            index, labels, generator: of `vadiff.targets.PosteriorMean`, where there is a target.

        Returns:
            The loss, a float32 scalar, or [B] for "none".

        Raises:
            ValueError, TypeError: a bad argument; the message names it.
        """
        terms = None
        posterior_mean = training_target(self.criterion)
        if posterior_mean is not None:
            if noise is None:
                raise ValueError(
                    "noise is None with a posterior-mean target, expected x0, and x1 as target: "
                    "criterion(vt, x1, t, noise=x0)"
                )
            self._check_path()
            alpha, sigma = _path(t, self.data_at, self.sigma_min)
            target, noise = posterior_mean.pair(
                target, noise, alpha, sigma, index=index, labels=labels, generator=generator
            )
        elif self.criterion.target is None and (index is not None or labels is not None or generator is not None):
            raise ValueError(
                "index, labels or generator is given without a target, expected None: the target reads them"
            )
        if noise is not None:
            a, b, c = coefficients("flow", 1.0, 1.0, data_at=self.data_at)  # the same at every level of the path
            terms = a, b, c * (1.0 - self.sigma_min)
        loss: Tensor = self.criterion(
            velocity,
            target,
            log_snr(t, data_at=self.data_at, sigma=self.sigma, sigma_min=self.sigma_min),
            noise=noise,
            coefficients=terms,
            sample_weight=sample_weight,
            reduction=reduction,
        )
        return loss

    def _check_path(self) -> None:
        if self.sigma > 0.0:
            raise ValueError(
                f"sigma is {self.sigma:g} with a target, expected 0: the target's velocity leaves out noise that is "
                "added to the path"
            )

    def extra_repr(self) -> str:
        return f"data_at={self.data_at}, sigma={self.sigma:g}, sigma_min={self.sigma_min:g}"
