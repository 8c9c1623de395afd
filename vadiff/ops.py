"""Operators, dispatch and gradients: the only module that knows there is more than one backend.

Four operators in the namespace `vadiff`, opaque to the compiler, so that what Python decides (backend, environment,
process group) is decided at call time:

    diffusion_loss             one step: loss, per-sample rows [3, B], gradient of the mean loss; moves the statistics
    diffusion_loss_backward    gradient from the saved inputs
    scale_gradient             gradient * upstream into a new tensor, or (scale_gradient_) in place
    reweight                   factors for a per-sample loss computed elsewhere; moves the statistics

Gradients come in two modes. *Fused*: the forward writes the gradient, the backward scales it; nothing else is saved.
*Deferred* (float16, float64, reduction "none", under torch.compile): the inputs are saved and the backward computes
it. An fp16 gradient written before a gradient scaler has acted would be mostly subnormal, and a mutation in backward
makes the compiler clone its tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends
from .reference import ROW_LOSS, ROW_SLOPE, Bins, Coefficient, Gather, TableRule, compute_dtype

FUSED_DTYPES = (torch.float32, torch.bfloat16)

_STATE = "Tensor(a!) state, Tensor(b!) log_weights, float low, float high, float half_life"
_RULE = "str statistic, float strength, float smoothing, float clip, float prior"
_RESIDUAL = (
    "Tensor output, Tensor? target, Tensor? noise, "
    "Tensor? a_each, Tensor? b_each, Tensor? c_each, float a, float b, float c"
)

_library = torch.library.Library("vadiff", "DEF")
_library.define(
    f"diffusion_loss({_RESIDUAL}, Tensor log_snr, Tensor? base_weight, Tensor? sample_weight, Tensor? weight, "
    f"{_STATE}, {_RULE}, float huber_delta, bool mean, bool with_gradient, bool update, bool sync, str backend)"
    " -> (Tensor loss, Tensor rows, Tensor gradient)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    f"diffusion_loss_backward(Tensor upstream, Tensor loss, Tensor rows, {_RESIDUAL}, float huber_delta, str backend)"
    " -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "scale_gradient(Tensor gradient, Tensor upstream, Tensor loss, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "scale_gradient_(Tensor(a!) gradient, Tensor upstream, Tensor loss, str backend) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    f"reweight(Tensor loss, Tensor log_snr, Tensor? sample_weight, Tensor? weight, {_STATE}, {_RULE}, "
    "bool update, bool sync, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)

# What runs


def _diffusion_loss(
    output: Tensor,
    target: Tensor | None,
    noise: Tensor | None,
    a_each: Tensor | None,
    b_each: Tensor | None,
    c_each: Tensor | None,
    a: float,
    b: float,
    c: float,
    log_snr: Tensor,
    base_weight: Tensor | None,
    sample_weight: Tensor | None,
    weight: Tensor | None,
    state: Tensor,
    log_weights: Tensor,
    low: float,
    high: float,
    half_life: float,
    statistic: str,
    strength: float,
    smoothing: float,
    clip: float,
    prior: float,
    huber_delta: float,
    mean: bool,
    with_gradient: bool,
    update: bool,
    sync: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if update or with_gradient:
        _refuse_inside_backward()
    output, target, noise = _one_layout(output, target, noise)
    rule = TableRule(statistic, strength, smoothing, clip, prior)
    result: tuple[Tensor, Tensor, Tensor] = backends.select(backend, output).diffusion_loss(
        output, target, noise, _either(a_each, a), _either(b_each, b), _either(c_each, c), log_snr,
        base_weight, sample_weight, weight, state, log_weights, Bins(len(log_weights), low, high), half_life, rule,
        huber_delta, mean, with_gradient, update, _gather(sync),
    )  # fmt: skip
    return result


def _diffusion_loss_backward(
    upstream: Tensor,
    loss: Tensor,
    rows: Tensor,
    output: Tensor,
    target: Tensor | None,
    noise: Tensor | None,
    a_each: Tensor | None,
    b_each: Tensor | None,
    c_each: Tensor | None,
    a: float,
    b: float,
    c: float,
    huber_delta: float,
    backend: str,
) -> Tensor:
    output, target, noise = _one_layout(output, target, noise)
    result: Tensor = backends.select(backend, output).diffusion_loss_backward(
        upstream, loss, rows, output, target, noise, _either(a_each, a), _either(b_each, b), _either(c_each, c),
        huber_delta,
    )  # fmt: skip
    return result


def _scale_gradient(gradient: Tensor, upstream: Tensor, loss: Tensor, backend: str) -> Tensor:
    out = torch.empty_like(gradient)
    backends.select(backend, gradient).scale_gradient(gradient, upstream, loss, out)
    return out


def _scale_gradient_in_place(gradient: Tensor, upstream: Tensor, loss: Tensor, backend: str) -> None:
    backends.select(backend, gradient).scale_gradient(gradient, upstream, loss, gradient)


def _reweight(
    loss: Tensor,
    log_snr: Tensor,
    sample_weight: Tensor | None,
    weight: Tensor | None,
    state: Tensor,
    log_weights: Tensor,
    low: float,
    high: float,
    half_life: float,
    statistic: str,
    strength: float,
    smoothing: float,
    clip: float,
    prior: float,
    update: bool,
    sync: bool,
    backend: str,
) -> Tensor:
    if update:
        _refuse_inside_backward()
    rule = TableRule(statistic, strength, smoothing, clip, prior)
    result: Tensor = backends.select(backend, loss).reweight(
        loss, log_snr, sample_weight, weight, state, log_weights, Bins(len(log_weights), low, high), half_life, rule,
        update, _gather(sync),
    )  # fmt: skip
    return result


def _either(each: Tensor | None, number: float) -> Coefficient:
    return number if each is None else each


def _layout(output: Tensor) -> torch.memory_format:
    """The output's dense layout, batch outermost; contiguous (one copy) for any other strides."""
    if output.is_contiguous():
        return torch.contiguous_format
    for dim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if output.dim() == dim and output.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


def _one_layout(
    output: Tensor, target: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    layout = _layout(output)
    return (
        output.contiguous(memory_format=layout),
        None if target is None else target.contiguous(memory_format=layout),
        None if noise is None else noise.contiguous(memory_format=layout),
    )


def _gather(sync: bool) -> Gather | None:
    """How this rank's batch statistics [4K + 1] become those of all ranks [ranks, 4K + 1]; None on one rank."""
    if not (sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None

    ranks = dist.get_world_size()
    # all_gather_into_tensor, under the name it has since torch 2.13
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def gather(batch: Tensor) -> Tensor:
        everyone = batch.new_empty(ranks * batch.numel())
        all_gather(everyone, batch)
        return everyone.view(ranks, -1)

    return gather


def _refuse_inside_backward() -> None:
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "the criterion was called from inside a backward pass, where it would record the same batch twice and "
            "scale the gradient wrongly. Activation checkpointing does this: put the criterion outside the "
            "checkpointed function"
        )


for _name, _run in {
    "diffusion_loss": _diffusion_loss,
    "diffusion_loss_backward": _diffusion_loss_backward,
    "scale_gradient": _scale_gradient,
    "scale_gradient_": _scale_gradient_in_place,
    "reweight": _reweight,
}.items():
    _library.impl(_name, _run, "CompositeExplicitAutograd")


@torch.library.register_fake("vadiff::diffusion_loss")
def _(output: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, with_gradient = args[-5], args[-4]
    dtype = compute_dtype(output)
    loss = output.new_empty(() if mean else (output.shape[0],), dtype=dtype)
    rows = output.new_empty((3, output.shape[0]), dtype=dtype)
    return loss, rows, _fake_gradient(output) if with_gradient else output.new_empty(0)


@torch.library.register_fake("vadiff::diffusion_loss_backward")
def _(upstream: Tensor, loss: Tensor, rows: Tensor, output: Tensor, *args: Any) -> Tensor:
    return _fake_gradient(output)


@torch.library.register_fake("vadiff::scale_gradient")
def _(gradient: Tensor, upstream: Tensor, loss: Tensor, backend: str) -> Tensor:
    return torch.empty_like(gradient)


@torch.library.register_fake("vadiff::scale_gradient_")
def _(gradient: Tensor, upstream: Tensor, loss: Tensor, backend: str) -> None:
    return None


@torch.library.register_fake("vadiff::reweight")
def _(loss: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(loss, memory_format=torch.contiguous_format)


def _fake_gradient(output: Tensor) -> Tensor:
    return torch.empty_like(output, memory_format=_layout(output))


# Gradients


class _Loss(torch.autograd.Function):
    """Takes the operator's arguments in its order; differentiates by output (0) and base_weight (10)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        loss, rows, gradient = torch.ops.vadiff.diffusion_loss(*args)
        ctx.fused = gradient.numel() > 0
        ctx.residual, ctx.huber_delta, ctx.backend = args[6:9], args[23], args[-1]
        ctx.needs = ctx.needs_input_grad[0], ctx.needs_input_grad[10]
        if ctx.fused:
            ctx.save_for_backward(loss, rows, gradient)
        elif ctx.needs[0]:
            ctx.save_for_backward(loss, rows, *args[:6])
        else:
            ctx.save_for_backward(loss, rows)
        ctx.mark_non_differentiable(rows)
        return loss, rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        by_output = by_base_weight = None
        loss, rows, *saved = ctx.saved_tensors
        if ctx.needs[0]:
            if not ctx.fused:
                by_output = torch.ops.vadiff.diffusion_loss_backward(
                    upstream, loss, rows, *saved, *ctx.residual, ctx.huber_delta, ctx.backend
                )
            elif _graph_is_kept():
                by_output = torch.ops.vadiff.scale_gradient(saved[0], upstream, loss, ctx.backend)
            else:
                by_output = saved[0]
                torch.ops.vadiff.scale_gradient_(by_output, upstream, loss, ctx.backend)
        if ctx.needs[1]:
            scale = rows[ROW_SLOPE] / (rows.shape[1] if loss.dim() == 0 else 1)
            by_base_weight = scale * torch.where(loss.isnan(), loss, upstream)
        return by_output, *[None] * 9, by_base_weight, *[None] * 18


def _graph_is_kept() -> bool:
    """Whether a second backward may follow. Where torch does not say, assume so: the gradient is then copied."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def _split(coefficient: Coefficient) -> tuple[Tensor | None, float]:
    return (coefficient, 0.0) if isinstance(coefficient, Tensor) else (None, float(coefficient))


def diffusion_loss(
    output: Tensor,
    target: Tensor | None,
    noise: Tensor | None,
    a: Coefficient,
    b: Coefficient,
    c: Coefficient,
    log_snr: Tensor,
    base_weight: Tensor | None,
    sample_weight: Tensor | None,
    weight: Tensor | None,
    state: Tensor,
    log_weights: Tensor,
    bins: Bins,
    half_life: float,
    rule: TableRule,
    huber_delta: float,
    mean: bool,
    update: bool,
    sync: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Differentiable step on validated inputs: loss (scalar, or [B] if not `mean`) and per-sample ell [B].

    [B]-shaped inputs are float32 (float64 for float64 outputs; log_snr always float32)."""
    recorded = torch.is_grad_enabled() and (
        output.requires_grad or (base_weight is not None and base_weight.requires_grad)
    )
    fused = (
        recorded
        and mean
        and output.requires_grad
        and output.dtype in FUSED_DTYPES
        and not torch.compiler.is_compiling()
    )
    (a_each, a), (b_each, b), (c_each, c) = _split(a), _split(b), _split(c)
    arguments = (
        output, target, noise, a_each, b_each, c_each, a, b, c, log_snr, base_weight, sample_weight, weight,
        state, log_weights, bins.low, bins.high, half_life, *rule, huber_delta, mean, fused, update, sync, backend,
    )  # fmt: skip
    if recorded:
        loss, rows = _Loss.apply(*arguments)
    else:
        loss, rows, _ = torch.ops.vadiff.diffusion_loss(*arguments)
    return loss, rows[ROW_LOSS]


def reweight(
    loss: Tensor,
    log_snr: Tensor,
    sample_weight: Tensor | None,
    weight: Tensor | None,
    state: Tensor,
    log_weights: Tensor,
    bins: Bins,
    half_life: float,
    rule: TableRule,
    update: bool,
    sync: bool,
    backend: str,
) -> Tensor:
    """w*v*loss [B] for a validated per-sample loss [B], differentiable by the loss; weights are detached."""
    factor = torch.ops.vadiff.reweight(
        loss.detach().contiguous(), log_snr, sample_weight, weight, state, log_weights, bins.low, bins.high, half_life,
        *rule, update, sync, backend,
    )  # fmt: skip
    return loss.masked_fill(factor == 0, 0.0) * factor  # masked: a sample left out may have lost a NaN
