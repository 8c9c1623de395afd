"""Operators, dispatch and gradients: the only module that knows there is more than one backend.

Four operators in the namespace `vadiff`, opaque to the compiler, so that what Python decides (backend, environment,
process group) is decided at call time:

    diffusion_loss             one step: loss, ell, what a backward needs, gradient; moves the statistics
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
from torch.autograd import forward_ad

from . import backends
from .reference import Bins, Coefficient, Gather, TableRule, compute_dtype

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
    " -> (Tensor loss, Tensor ell, Tensor saved, Tensor gradient)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    f"diffusion_loss_backward(Tensor upstream, Tensor saved, {_RESIDUAL}, float huber_delta, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "scale_gradient(Tensor gradient, Tensor upstream, Tensor saved, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "scale_gradient_(Tensor(a!) gradient, Tensor upstream, Tensor saved, str backend) -> ()",
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _step(
        output, target, noise, _either(a_each, a), _either(b_each, b), _either(c_each, c), log_snr,
        base_weight, sample_weight, weight, state, log_weights, Bins(len(log_weights), low, high), half_life,
        TableRule(statistic, strength, smoothing, clip, prior), huber_delta, mean, with_gradient, update, sync, backend,
    )  # fmt: skip


def _step(
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
    with_gradient: bool,
    update: bool,
    sync: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if update:
        _refuse_inside_backward()
    output, target, noise = _one_layout(output, target, noise)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = backends.select(backend, output).diffusion_loss(
        output, target, noise, a, b, c, log_snr, base_weight, sample_weight, weight, state, log_weights, bins,
        half_life, rule, huber_delta, mean, with_gradient, update, _gather(sync),
    )  # fmt: skip
    return result


def _dispatched_step(
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
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_step` through the operator."""
    (a_each, a), (b_each, b), (c_each, c) = _split(a), _split(b), _split(c)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.vadiff.diffusion_loss(
        output, target, noise, a_each, b_each, c_each, a, b, c, log_snr, base_weight, sample_weight, weight, state,
        log_weights, bins.low, bins.high, half_life, *rule, *others,
    )  # fmt: skip
    return result


def _diffusion_loss_backward(
    upstream: Tensor,
    saved: Tensor,
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
        upstream, saved, output, target, noise, _either(a_each, a), _either(b_each, b), _either(c_each, c),
        huber_delta,
    )  # fmt: skip
    return result


def _scale_gradient(gradient: Tensor, upstream: Tensor, saved: Tensor, backend: str) -> Tensor:
    out = torch.empty_like(gradient)
    backends.select(backend, gradient).scale_gradient(gradient, upstream, saved, out)
    return out


def _scale_gradient_in_place(gradient: Tensor, upstream: Tensor, saved: Tensor, backend: str) -> None:
    backends.select(backend, gradient).scale_gradient(gradient, upstream, saved, gradient)


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
            "the criterion was called from inside a backward pass, where it would record the same batch twice. "
            "Activation checkpointing does this: put the criterion outside the checkpointed function"
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
def _(output: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, with_gradient = args[-5], args[-4]
    samples, dtype = output.shape[0], compute_dtype(output)
    loss = output.new_empty(() if mean else (samples,), dtype=dtype)
    ell, saved = output.new_empty(samples, dtype=dtype), output.new_empty(2 * samples + 1, dtype=dtype)
    return loss, ell, saved, _fake_gradient(output) if with_gradient else output.new_empty(0)


@torch.library.register_fake("vadiff::diffusion_loss_backward")
def _(upstream: Tensor, saved: Tensor, output: Tensor, *args: Any) -> Tensor:
    return _fake_gradient(output)


@torch.library.register_fake("vadiff::scale_gradient")
def _(gradient: Tensor, upstream: Tensor, saved: Tensor, backend: str) -> Tensor:
    return torch.empty_like(gradient)


@torch.library.register_fake("vadiff::scale_gradient_")
def _(gradient: Tensor, upstream: Tensor, saved: Tensor, backend: str) -> None:
    return None


@torch.library.register_fake("vadiff::reweight")
def _(loss: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(loss, memory_format=torch.contiguous_format)


def _fake_gradient(output: Tensor) -> Tensor:
    return torch.empty_like(output, memory_format=_layout(output))


# Gradients


class _Loss(torch.autograd.Function):
    """Differentiates by `output` and `base_weight`; `others` are the remaining arguments of `_step` in its order.

    They come in a tuple because torch unwraps each argument in Python, and refuses to compile one tensor passed twice.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, base_weight: Tensor | None, others: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        target, noise, a, b, c, log_snr = others[:6]
        step: Any = _dispatched_step if _observed(output, base_weight, *others[:8]) else _step
        mean, fused = others[-5:-3]
        if not fused:  # what is saved
            output, target, noise = _one_layout(output, target, noise)
        loss, ell, saved, gradient = step(output, target, noise, a, b, c, log_snr, base_weight, *others[6:])
        ctx.set_materialize_grads(False)  # or a backward begins with zeros for ell
        ctx.mark_non_differentiable(ell)
        ctx.fused, ctx.mean, ctx.backend = fused, mean, others[-1]
        # Never what is returned: `loss /= n` would spoil it.
        if ctx.fused:
            ctx.save_for_backward(saved, gradient)
        elif ctx.needs_input_grad[0]:
            (a_each, a), (b_each, b), (c_each, c) = _split(a), _split(b), _split(c)
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
        if ctx.needs_input_grad[0]:
            if not ctx.fused:
                run: Any = (
                    torch.ops.vadiff.diffusion_loss_backward
                    if _observed(upstream, *inputs)
                    else _diffusion_loss_backward
                )
                by_output = run(upstream, saved, *inputs, *ctx.numbers, ctx.backend)
            elif _graph_is_kept():
                by_output = torch.ops.vadiff.scale_gradient(inputs[0], upstream, saved, ctx.backend)
            else:
                by_output = inputs[0]
                run = torch.ops.vadiff.scale_gradient_ if _observed(upstream, by_output) else _scale_gradient_in_place
                run(by_output, upstream, saved, ctx.backend)
        if ctx.needs_input_grad[1]:
            samples = saved.numel() // 2
            by_base_weight = saved[samples : 2 * samples] * upstream
            if ctx.mean:
                by_base_weight = by_base_weight.masked_fill(saved[-1].isnan(), torch.nan) / samples
        if torch.is_grad_enabled():  # create_graph: this gradient is right, its own derivative would be missing
            by_output, by_base_weight = _not_differentiable(by_output), _not_differentiable(by_base_weight)
        return by_output, by_base_weight, None


# Function.apply without its Python, which looks for functorch's transforms: those are refused before.
_apply = super(torch.autograd.Function, _Loss).apply


def _not_differentiable(gradient: Tensor | None) -> Tensor | None:
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
    profiler, a dispatch mode, a tensor subclass or a lazily negated tensor. Otherwise what it would call is called."""
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
            if tensor.is_neg():
                return True
        elif isinstance(tensor, Tensor):
            return True
    return False


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
        step: Any = _dispatched_step if _observed(output, base_weight, *others[:8]) else _step
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
