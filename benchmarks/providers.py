"""Providers of the loss: the line that vadiff replaces, a careful user's own code, and each backend.

A provider makes a `Loss`: a callable on a `Batch`, with statistics to check if it keeps any.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from hand_written import HandWrittenLoss
from torch import Tensor

import vadiff
from vadiff.ops import reference
from vadiff.ops.problem import Inputs, Problem, State
from vadiff.statistics import LogSNRStatistics
from vadiff.weighting import VarianceAware


class Batch(NamedTuple):
    """One set of inputs."""

    prediction: Tensor  # [B, ...]
    target: Tensor  # [B, ...]; x0 if there is noise
    log_snr: Tensor  # [B] float32
    noise: Tensor | None = None  # eps [B, ...]: the residual is then prediction + target - noise


Moments = dict[str, Tensor]  # n, mean, m2, mass and log_weights, [K] each


class Loss(Protocol):
    """A loss under measurement."""

    def __call__(self, batch: Batch, deferred: bool) -> Tensor:
        """The mean loss, float32 scalar. `deferred`: with the gradient computed in the backward pass."""

    def moments(self) -> Moments | None:
        """The statistics, None if the loss keeps none."""


def _made_target(batch: Batch) -> Tensor:
    """The target that a trainer without a fused loss has to compute: for flow matching, noise - x0."""
    return batch.target if batch.noise is None else batch.noise - batch.target


class _MSELoss:
    """The line that vadiff replaces, as in diffusers' training scripts: in float32, no statistics, no weights."""

    def __call__(self, batch: Batch, deferred: bool) -> Tensor:
        return F.mse_loss(batch.prediction.float(), _made_target(batch).float())

    def moments(self) -> None:
        return None


class _HandWritten:
    def __init__(self, device: torch.device, **compile_options: Any) -> None:
        self.module = HandWrittenLoss().to(device)
        self.step_begins: Callable[[], None] = lambda: None
        self.call: Callable[..., Tensor] = self.module
        if compile_options:
            self.call = torch.compile(self.module, fullgraph=True, dynamic=False, **compile_options)
        if compile_options.get("mode") == "reduce-overhead":
            self.step_begins = torch.compiler.cudagraph_mark_step_begin

    def __call__(self, batch: Batch, deferred: bool) -> Tensor:
        self.step_begins()
        return self.call(batch.prediction, _made_target(batch), batch.log_snr)

    def moments(self) -> Moments:
        return {name: getattr(self.module, name).double() for name in ("n", "mean", "m2", "mass", "log_weights")}


class _Criterion:
    """`vadiff.DiffusionLoss`, as users call it."""

    def __init__(self, device: torch.device, backend: str) -> None:
        self.module = vadiff.DiffusionLoss(backend=backend).to(device)

    def __call__(self, batch: Batch, deferred: bool) -> Tensor:
        prediction, target, log_snr, noise = batch
        loss: Tensor = self.module(
            prediction, target, log_snr, noise=noise,
            coefficients=None if noise is None else (1.0, 1.0, -1.0), reduction="none" if deferred else "mean",
        )  # fmt: skip
        return loss.mean() if deferred else loss

    def moments(self) -> Moments:
        return moments_of(self.module.statistics)


def moments_of(statistics: LogSNRStatistics) -> Moments:
    """Copies of vadiff's statistics."""
    parts = statistics.state[: 4 * statistics.bins.size].view(torch.float64).view(4, -1)
    return {
        **dict(zip(("n", "mean", "m2", "mass"), parts.clone(), strict=True)),
        "log_weights": statistics.log_weights.view(torch.float32).double(),
    }


def problem_of(statistics: LogSNRStatistics) -> Problem:
    """Squared error with `VarianceAware`'s table, on one rank."""
    return Problem(statistics.bins, statistics.half_life, VarianceAware().rule, sync=False)


def state_of(statistics: LogSNRStatistics) -> State:
    """The buffers that a call updates."""
    return State(statistics.state, statistics.log_weights)


def inputs_of(batch: Batch, prediction: Tensor) -> Inputs:
    """A batch as a backend's inputs, without weights and with reduction "mean"."""
    b, c = (-1.0, 0.0) if batch.noise is None else (1.0, -1.0)
    return Inputs(prediction, batch.target, batch.noise, 1.0, b, c, batch.log_snr, None, None, None, mean=True)


class _CompiledReference:
    """The functions of `vadiff.ops.reference` under torch.compile, without the operators, which are opaque to it.

    Like the fused backends, it computes the gradient in the forward pass unless told otherwise."""

    def __init__(self, device: torch.device) -> None:
        self.statistics = LogSNRStatistics().to(device)
        self.problem = problem_of(self.statistics)
        self.state = state_of(self.statistics)
        self.forward = torch.compile(reference.step, fullgraph=True, dynamic=False)
        self.backward = torch.compile(reference.backward, fullgraph=True, dynamic=False)
        self.scale = torch.compile(reference.scale, fullgraph=True, dynamic=False)

    def __call__(self, batch: Batch, deferred: bool) -> Tensor:
        loss: Tensor = _CompiledFunction.apply(batch.prediction, batch, deferred, self)
        return loss

    def moments(self) -> Moments:
        return moments_of(self.statistics)


class _CompiledFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, batch: Batch, deferred: bool, provider: _CompiledReference) -> Tensor:
        fused = ctx.needs_input_grad[0] and not deferred and prediction.dtype != torch.float16
        inputs = inputs_of(batch, prediction.detach())
        loss, per_sample, gradient = provider.forward(
            provider.problem, inputs, provider.state, gradient=fused, update=True, gather=None
        )
        ctx.provider, ctx.fused = provider, fused
        if fused:
            ctx.save_for_backward(gradient)
        else:
            ctx.save_for_backward(per_sample, inputs.prediction, inputs.target, inputs.noise)
            ctx.inputs = inputs._replace(prediction=None, target=None, noise=None)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        if not ctx.fused:
            per_sample, prediction, target, noise = ctx.saved_tensors
            inputs = ctx.inputs._replace(prediction=prediction, target=target, noise=noise)
            return ctx.provider.backward(ctx.provider.problem, inputs, per_sample, upstream), None, None, None
        (gradient,) = ctx.saved_tensors
        ctx.provider.scale(gradient, upstream)
        return gradient, None, None, None


class Provider(NamedTuple):
    """One way to compute the loss. `ours` names the backend if it is one of vadiff's."""

    title: str
    make: Callable[[torch.device], Loss]
    compiled: bool = False
    cuda_only: bool = False
    ours: str | None = None


def _backend(name: str, *, cuda_only: bool = False) -> Provider:
    return Provider(f"vadiff, {name}", functools.partial(_Criterion, backend=name), cuda_only=cuda_only, ours=name)


PROVIDERS = {
    "mse_loss": Provider("F.mse_loss", lambda device: _MSELoss()),
    "hand_written": Provider("hand-written, eager", _HandWritten),
    "hand_written_compiled": Provider(
        "hand-written, torch.compile", lambda device: _HandWritten(device, mode="default"), compiled=True
    ),
    "hand_written_reduce_overhead": Provider(
        "hand-written, compile reduce-overhead",
        lambda device: _HandWritten(device, mode="reduce-overhead"),
        compiled=True,
        cuda_only=True,
    ),
    "reference": _backend("reference"),
    "reference_compiled": Provider("vadiff's reference.py, torch.compile", _CompiledReference, compiled=True),
    "native": _backend("native"),
    "triton": _backend("triton", cuda_only=True),
}


@functools.cache
def obstacle(name: str, device_type: str) -> str | None:
    """Why a provider cannot run on this machine, None if it can; tried on a small batch."""
    provider, device = PROVIDERS[name], torch.device(device_type)
    if provider.cuda_only and device.type != "cuda":
        return "runs on CUDA devices only"
    if provider.compiled:
        return _compiler_obstacle(device_type)
    prediction = torch.ones(2, 8, device=device, requires_grad=True)
    batch = Batch(prediction, torch.zeros(2, 8, device=device), torch.zeros(2, device=device))
    return _complaint(lambda: torch.autograd.grad(provider.make(device)(batch, False), prediction))


@functools.cache
def _compiler_obstacle(device_type: str) -> str | None:
    """As `obstacle`, for torch.compile with a minimal function."""
    double = torch.compile(lambda x: 2 * x)
    return _complaint(lambda: double(torch.ones(2, device=device_type)))


def _complaint(run: Callable[[], object]) -> str | None:
    try:
        run()
    except Exception as error:  # compilers, drivers and builds raise any kind
        return describe_error(error)
    return None


def describe_error(error: BaseException) -> str:
    """Kind and first line of an exception."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"
