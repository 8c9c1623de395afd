"""The check before each measurement: a provider that computes something else is not timed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from providers import Batch, Loss, Moments, moments_of
from torch import Tensor

import vadiff

STEPS = 3  # the weights of the first are all 1
_LARGE = 2**25  # elements above which the truth is computed in float32: float64 would not fit beside the rest

# Relative, in the L2 norm: rounding of the result, with room for another order of the sums.
_LOSS_TOLERANCE = 1e-5
_GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
_MOMENT_TOLERANCE = 1e-4

# A float16 gradient is mostly subnormal without a loss scale; trainers use a gradient scaler.
LOSS_SCALE = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 32768.0}


class WrongResultError(AssertionError):
    """A provider's loss, gradient or statistics are not the reference's."""


class Truth(NamedTuple):
    """What STEPS calls on consecutive batches must give."""

    losses: list[Tensor]
    gradients: list[Tensor]  # empty for forward only
    moments: Moments


def truth(batches: Sequence[Batch], *, backward: bool, weighting: str = "variance_aware") -> Truth:
    """The reference backend's answers, in float64 where memory allows."""
    dtype = torch.float64 if batches[0].prediction.numel() <= _LARGE else torch.float32
    criterion = vadiff.DiffusionLoss(weighting, backend="reference").to(batches[0].prediction.device)
    scale = LOSS_SCALE[batches[0].prediction.dtype]
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    for batch in itertools.islice(itertools.cycle(batches), STEPS):
        prediction = batch.prediction.detach().to(dtype).requires_grad_(backward)
        noise = None if batch.noise is None else batch.noise.to(dtype)
        coefficients = None if noise is None else (1.0, 1.0, -1.0)
        loss = criterion(prediction, batch.target.to(dtype), batch.log_snr, noise=noise, coefficients=coefficients)
        if backward:
            gradients += torch.autograd.grad(loss, prediction, torch.full_like(loss, scale))
        losses.append(loss.detach())
    return Truth(losses, gradients, moments_of(criterion.statistics))


def check(loss: Loss, batches: Sequence[Batch], expected: Truth, *, deferred: bool) -> None:
    """Run a fresh provider over the batches of `truth`.

    Raises:
        WrongResultError: naming what differs, and by how much.
    """
    dtype = batches[0].prediction.dtype
    for step, batch in enumerate(itertools.islice(itertools.cycle(batches), STEPS)):
        found = loss(batch, deferred)
        if expected.gradients:
            upstream = torch.full_like(found, LOSS_SCALE[dtype])
            (gradient,) = torch.autograd.grad(found, batch.prediction, upstream)
            if gradient.dtype != dtype or gradient.shape != batch.prediction.shape:
                raise WrongResultError(
                    f"the gradient of step {step + 1} is {gradient.dtype} {tuple(gradient.shape)}, "
                    f"expected {dtype} {tuple(batch.prediction.shape)}"
                )
            _compare(f"gradient of step {step + 1}", gradient, expected.gradients[step], _GRADIENT_TOLERANCE[dtype])
        _compare(f"loss of step {step + 1}", found.detach(), expected.losses[step], _LOSS_TOLERANCE)
    for name, found in (loss.moments() or {}).items():
        _compare(f"statistics, {name},", found, expected.moments[name], _MOMENT_TOLERANCE)


def _compare(what: str, found: Tensor, right: Tensor, tolerance: float) -> None:
    size = torch.linalg.vector_norm(right)
    error = torch.linalg.vector_norm(found.to(right.dtype) - right)
    relative = (error / size if size > 0 else error).item()
    if not (math.isfinite(relative) and relative <= tolerance):
        raise WrongResultError(f"the {what} is off by {relative:.1e} (relative, L2), allowed is {tolerance:.0e}")
