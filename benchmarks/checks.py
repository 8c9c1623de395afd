"""The check before each measurement: a provider with wrong results is not timed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from providers import Batch, Loss, Moments, moments_of
from torch import Tensor

import vadiff

STEPS = 3  # the weights of the first step are all 1
_LARGE = 2**25  # elements above which the truth is computed in float32, to save memory

# Relative, in the L2 norm: rounding of the result, and of sums in another order.
_LOSS_TOLERANCE = 1e-5
_GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
_MOMENT_TOLERANCE = 1e-4

# A float16 gradient is mostly subnormal without a loss scale; trainers use a gradient scaler.
LOSS_SCALE = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 32768.0}


class WrongResultError(AssertionError):
    """A provider's loss, gradient or statistics are not the reference's."""


class Truth(NamedTuple):
    """Expected results of calls on consecutive batches."""

    losses: list[Tensor]
    gradients: list[Tensor]  # empty for forward only
    moments: Moments  # after the last call


def truth(batches: Sequence[Batch], *, backward: bool, weighting: str = "variance_aware", steps: int = STEPS) -> Truth:
    """The reference backend's results, in float64 unless the batch is too large."""
    dtype = torch.float64 if batches[0].prediction.numel() <= _LARGE else torch.float32
    criterion = vadiff.DiffusionLoss(weighting, backend="reference").to(batches[0].prediction.device)
    scale = LOSS_SCALE[batches[0].prediction.dtype]
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    for batch in itertools.islice(itertools.cycle(batches), steps):
        prediction = batch.prediction.detach().to(dtype).requires_grad_(backward)
        noise = None if batch.noise is None else batch.noise.to(dtype)
        coefficients = None if noise is None else (1.0, 1.0, -1.0)
        loss = criterion(prediction, batch.target.to(dtype), batch.log_snr, noise=noise, coefficients=coefficients)
        if backward:
            gradients += torch.autograd.grad(loss, prediction, torch.full_like(loss, scale))
        losses.append(loss.detach())
    return Truth(losses, gradients, moments_of(criterion.statistics))


def check(loss: Loss, batches: Sequence[Batch], expected: Truth, *, deferred: bool) -> None:
    """Run a provider without statistics over the batches of `truth`, and compare.

    Raises:
        WrongResultError: the message says what differs, and by how much.
    """
    dtype = batches[0].prediction.dtype
    for step, batch in enumerate(itertools.islice(itertools.cycle(batches), STEPS)):
        found = loss(batch, deferred)
        gradients: tuple[Tensor, ...] = ()
        if expected.gradients:
            gradients = torch.autograd.grad(found, batch.prediction, torch.full_like(found, LOSS_SCALE[dtype]))
        check_step((found.detach(), *gradients), batch, expected, step)
    check_moments(loss, expected)


def check_step(results: Sequence[Tensor], batch: Batch, expected: Truth, step: int) -> None:
    """Compare the loss, and the gradient if any, of one call; `step` counts from 0.

    Raises:
        WrongResultError: the message says what differs, and by how much.
    """
    found, *gradients = results
    for gradient in gradients:
        like = batch.prediction
        if gradient.dtype != like.dtype or gradient.shape != like.shape:
            raise WrongResultError(
                f"the gradient of step {step + 1} is {gradient.dtype} {tuple(gradient.shape)}, "
                f"expected {like.dtype} {tuple(like.shape)}"
            )
        _compare(f"gradient of step {step + 1}", gradient, expected.gradients[step], _GRADIENT_TOLERANCE[like.dtype])
    _compare(f"loss of step {step + 1}", found, expected.losses[step], _LOSS_TOLERANCE)


def check_moments(loss: Loss, expected: Truth) -> None:
    """Compare the statistics of a provider, if it keeps any.

    Raises:
        WrongResultError: the message says what differs, and by how much.
    """
    for name, found in (loss.moments() or {}).items():
        _compare(f"statistics, {name},", found, expected.moments[name], _MOMENT_TOLERANCE)


def _compare(what: str, found: Tensor, right: Tensor, tolerance: float) -> None:
    size = torch.linalg.vector_norm(right)
    error = torch.linalg.vector_norm(found.to(right.dtype) - right)
    relative = (error / size if size > 0 else error).item()
    if not (math.isfinite(relative) and relative <= tolerance):
        raise WrongResultError(f"the {what} is off by {relative:.1e} (relative, L2), allowed is {tolerance:.0e}")
