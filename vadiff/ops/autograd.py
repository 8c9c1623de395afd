"""Gradients of the operators, in two modes.

*Fused*: the forward writes the gradient, the backward scales it; nothing else is saved. *Deferred* (float16, float64,
reduction "none", under torch.compile): the inputs are saved and the backward computes it. An fp16 gradient written
before a gradient scaler has acted would be mostly subnormal, and a mutation in backward makes the compiler clone its
tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .reference import Bins, Coefficient, TableRule

FUSED_DTYPES = (torch.float32, torch.bfloat16)


class _Loss(torch.autograd.Function):
    """Differentiates by `output` and `base_weight`; `others` are the remaining arguments of `ops.step` in its order.

    They come in a tuple because torch unwraps each argument in Python, and refuses to compile one tensor passed twice.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, base_weight: Tensor | None, others: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        target, noise, a, b, c, log_snr = others[:6]
        step: Any = ops.dispatched_step if _observed(output, base_weight, *others[:8]) else ops.step
        mean, fused = others[-5:-3]
        if not fused:  # what is saved
            output, target, noise = ops.one_layout(output, target, noise)
        loss, ell, saved, gradient = step(output, target, noise, a, b, c, log_snr, base_weight, *others[6:])
        ctx.set_materialize_grads(False)  # or a backward begins with zeros for ell
        ctx.mark_non_differentiable(ell)
        ctx.fused, ctx.mean, ctx.backend = fused, mean, others[-1]
        # Never what is returned: `loss /= n` would spoil it.
        if ctx.fused:
            ctx.save_for_backward(saved, gradient)
        elif ctx.needs_input_grad[0]:
            (a_each, a), (b_each, b), (c_each, c) = ops.split(a), ops.split(b), ops.split(c)
            ctx.numbers = a, b, c, others[-6]
            ctx.save_for_backward(saved, output, target, noise, a_each, b_each, c_each)
        else:
            ctx.save_for_backward(saved)
        return loss, ell

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None
        by_output = by_base_weight = None
        saved, *inputs = ctx.saved_tensors
        if upstream.requires_grad:
            upstream = upstream.detach()
        if ctx.needs_input_grad[0] and ctx.fused:
            by_output = scaled(inputs[0], upstream, saved, ctx.backend)
        elif ctx.needs_input_grad[0]:
            run: Any = torch.ops.vadiff.diffusion_loss_backward if _observed(upstream, *inputs) else ops.loss_backward
            by_output = run(upstream, saved, *inputs, *ctx.numbers, ctx.backend)
        if ctx.needs_input_grad[1]:
            samples = saved.numel() // 2
            by_base_weight = saved[samples : 2 * samples] * upstream
            if ctx.mean:
                by_base_weight = by_base_weight.masked_fill(saved[-1].isnan(), torch.nan) / samples
        if torch.is_grad_enabled():  # create_graph: this gradient is right, its own derivative would be missing
            by_output, by_base_weight = not_differentiable(by_output), not_differentiable(by_base_weight)
        return by_output, by_base_weight, None


# Whether a second backward may follow. Where torch does not say (None), assume so: the gradient is then copied.
graph_keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)

# Function.apply without its Python, which looks for functorch's transforms: those are refused before.
_apply = super(torch.autograd.Function, _Loss).apply


def scaled(gradient: Tensor, upstream: Tensor, saved: Tensor, backend: str) -> Tensor:
    """gradient * upstream: in the gradient's own memory, unless a second backward may follow."""
    if graph_keeps is None or graph_keeps():
        result: Tensor = torch.ops.vadiff.scale_gradient(gradient, upstream, saved, backend)
        return result
    run: Any = torch.ops.vadiff.scale_gradient_ if _observed(upstream, gradient) else ops.scale_in_place
    run(gradient, upstream, saved, backend)
    return gradient


def not_differentiable(gradient: Tensor | None) -> Tensor | None:
    """A gradient that raises when it is differentiated."""
    if gradient is None:
        return None
    message = "the gradient of vadiff's loss cannot be differentiated a second time"
    raising: Tensor = torch._C._functions.DelayedError(message, 1)(gradient.detach().requires_grad_())
    return raising


def _refuse_transforms() -> None:
    """torch.func's transforms would see through the operator, and forward mode would return zeros."""
    if not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    ):
        raise RuntimeError(
            "vadiff's loss has no rule for torch.func transforms and forward-mode differentiation: "
            "use loss.backward() or torch.autograd.grad"
        )


def _observed(*tensors: Any) -> bool:
    """Whether a call has to go through the dispatcher, which costs ten microseconds: for the compiler, a tracer, a
    profiler, a dispatch mode, a tensor subclass, a lazily negated tensor or a lazy zero. Otherwise what it would call
    is called."""
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return True
    for tensor in tensors:
        kind = type(tensor)
        if kind is Tensor or kind is torch.nn.Parameter:
            if tensor.is_neg() or tensor._is_zerotensor():
                return True
        elif isinstance(tensor, Tensor):
            return True
    return False


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
    _refuse_transforms()
    recorded = torch.is_grad_enabled() and (
        output.requires_grad or (base_weight is not None and base_weight.requires_grad)
    )
    compiling = torch.compiler.is_compiling()
    fused = recorded and mean and output.requires_grad and output.dtype in FUSED_DTYPES and not compiling
    others = (
        target, noise, a, b, c, log_snr, sample_weight, weight, state, log_weights, bins, half_life, rule, huber_delta,
        mean, fused, update, sync, backend,
    )  # fmt: skip
    if recorded:
        apply: Any = _Loss.apply if compiling else _apply
        loss, ell = apply(output, base_weight, others)
    else:
        step: Any = ops.dispatched_step if _observed(output, base_weight, *others[:8]) else ops.step
        loss, ell, _, _ = step(output, *others[:6], base_weight, *others[6:])
    return loss, ell


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
    _refuse_transforms()
    factor = torch.ops.vadiff.reweight(
        loss.detach().contiguous(), log_snr, sample_weight, weight, state, log_weights, bins.low, bins.high, half_life,
        *rule, update, sync, backend,
    )  # fmt: skip
    return loss.masked_fill(factor == 0, 0.0) * factor  # masked: a sample left out may have lost a NaN
