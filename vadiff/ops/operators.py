"""Operators and dispatch: here it is decided which backend runs a call. Gradients: `vadiff.autograd`.

Four operators in the namespace `vadiff`, opaque to the compiler, so that what Python decides (backend, environment,
process group) is decided at call time:

    diffusion_loss             one step: loss, ell, what a backward needs, gradient; moves the statistics
    diffusion_loss_backward    gradient from the saved inputs
    scale_gradient             gradient * upstream into a new tensor, or (scale_gradient_) in place
    reweight                   factors for a per-sample loss computed elsewhere; moves the statistics
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends
from .reference import Bins, Coefficient, Gather, TableRule, compute_dtype

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
    return step(
        output, target, noise, _either(a_each, a), _either(b_each, b), _either(c_each, c), log_snr,
        base_weight, sample_weight, weight, state, log_weights, Bins(len(log_weights), low, high), half_life,
        TableRule(statistic, strength, smoothing, clip, prior), huber_delta, mean, with_gradient, update, sync, backend,
    )  # fmt: skip


def step(
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
    output, target, noise = one_layout(output, target, noise)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = backends.select(backend, output).diffusion_loss(
        output, target, noise, a, b, c, log_snr, base_weight, sample_weight, weight, state, log_weights, bins,
        half_life, rule, huber_delta, mean, with_gradient, update, _gather(sync),
    )  # fmt: skip
    return result


def dispatched_step(
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
    """`step` through the operator."""
    (a_each, a), (b_each, b), (c_each, c) = split(a), split(b), split(c)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.vadiff.diffusion_loss(
        output, target, noise, a_each, b_each, c_each, a, b, c, log_snr, base_weight, sample_weight, weight, state,
        log_weights, bins.low, bins.high, half_life, *rule, *others,
    )  # fmt: skip
    return result


def loss_backward(
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
    output, target, noise = one_layout(output, target, noise)
    result: Tensor = backends.select(backend, output).diffusion_loss_backward(
        upstream, saved, output, target, noise, _either(a_each, a), _either(b_each, b), _either(c_each, c),
        huber_delta,
    )  # fmt: skip
    return result


def _scale_gradient(gradient: Tensor, upstream: Tensor, saved: Tensor, backend: str) -> Tensor:
    out = torch.empty_like(gradient)
    backends.select(backend, gradient).scale_gradient(gradient, upstream, saved, out)
    return out


def scale_in_place(gradient: Tensor, upstream: Tensor, saved: Tensor, backend: str) -> None:
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


def split(coefficient: Coefficient) -> tuple[Tensor | None, float]:
    return (coefficient, 0.0) if isinstance(coefficient, Tensor) else (None, float(coefficient))


def _layout(output: Tensor) -> torch.memory_format:
    """The output's dense layout, batch outermost; contiguous (one copy) for any other strides."""
    if output.is_contiguous():
        return torch.contiguous_format
    for dim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if output.dim() == dim and output.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


def one_layout(
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
    "diffusion_loss_backward": loss_backward,
    "scale_gradient": _scale_gradient,
    "scale_gradient_": scale_in_place,
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
