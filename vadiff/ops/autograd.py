"""Gradients of the operators: one autograd Function, two modes.

*Fused* (reduction "mean", float32 or bfloat16, eager): the forward writes the gradient and saves it alone (with the
per-sample results if the base weight requires grad); the backward scales it by upstream. *Deferred* (float16, float64,
reduction "none", under torch.compile): the inputs are saved and the backward computes the gradient. A float16 gradient
written before a gradient scaler has acted would be mostly subnormal, and a mutation in the backward makes the compiler
clone its tensor. An upstream of NaN or infinity makes the fused gradient of masked samples NaN, as 0 times it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import operators
from ._torch import graph_is_kept, plain_apply, raising_if_differentiated, transformed
from .problem import SLOPE, Inputs, Problem, State, Step

FUSED_DTYPES = (torch.float32, torch.bfloat16)
_ONCE = "the gradient of vadiff's loss cannot be differentiated a second time"
_NO_GRADIENTS = (None,) * 4  # of the arguments after prediction and base_weight
_RESIDUAL = ("prediction", "target", "noise", "a", "b", "c")  # inputs that a deferred backward reads


class _Loss(torch.autograd.Function):
    """Differentiable with respect to `prediction` and `base_weight`.

    For a call with a plan `step` are the results of the step, and only the loss is returned, because a second output
    costs 5 µs. Otherwise the step is made here, from `step` = (state, update), and the per-sample results are a second
    output. Under torch.compile, which refuses a tensor that is passed twice, `inputs` lack `prediction` and
    `base_weight`."""

    @staticmethod
    def forward(
        ctx: Any, prediction: Tensor, base_weight: Tensor | None,
        problem: Problem, inputs: Inputs, fused: bool, step: Step | tuple[State, bool],
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        made_here = not isinstance(step, Step)
        if not isinstance(step, Step):
            state, update = step
            if inputs.prediction is None:
                inputs = inputs._replace(prediction=prediction, base_weight=base_weight)
            if not fused:  # save one dense layout, so that the backward copies nothing
                inputs = operators.one_layout(inputs)
            step = operators.step(problem, inputs, state, gradient=fused, update=update)
        loss, per_sample, gradient = step
        ctx.set_materialize_grads(False)
        ctx.call = problem, fused, inputs.mean
        # Never save a returned tensor: the caller's in-place `loss /= n` would invalidate it.
        if fused and base_weight is None:
            ctx.save_for_backward(gradient)
        elif fused:
            ctx.save_for_backward(gradient, per_sample)
        else:
            read = [name for name in _RESIDUAL if isinstance(getattr(inputs, name), Tensor)]
            ctx.save_for_backward(*(getattr(inputs, name) for name in read), per_sample)
            ctx.read, ctx.numbers = read, (inputs.a, inputs.b, inputs.c)
        if made_here:
            ctx.mark_non_differentiable(per_sample)
            return loss, per_sample
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None, None, *_NO_GRADIENTS)
        differentiated_again = torch.is_grad_enabled()  # create_graph
        if differentiated_again:
            upstream = upstream.detach()
        problem, fused, mean = ctx.call
        by_prediction = by_base_weight = None
        saved = ctx.saved_tensors
        if fused and graph_is_kept():  # for a later backward
            by_prediction = (saved[0].float() * upstream).to(saved[0].dtype)
        elif fused:
            by_prediction = operators.scale(saved[0], upstream, problem.backend)
        elif ctx.needs_input_grad[0]:
            by_prediction = operators.backward(problem, _residual_inputs(ctx, saved), saved[-1], upstream)
        if len(saved) > 1 and ctx.needs_input_grad[1]:  # one saved tensor: no base weight
            by_base_weight = saved[-1][SLOPE] * upstream
            if mean:
                by_base_weight = by_base_weight / by_base_weight.shape[0]
        if differentiated_again:
            by_prediction = raising_if_differentiated(by_prediction, _ONCE)
            by_base_weight = raising_if_differentiated(by_base_weight, _ONCE)
        return (by_prediction, by_base_weight, *_NO_GRADIENTS)


def _residual_inputs(ctx: Any, saved: tuple[Tensor, ...]) -> Inputs:
    """The inputs saved by a deferred forward; fields that the backward does not read are None."""
    fields: dict[str, Any] = {**dict.fromkeys(Inputs._fields), "mean": ctx.call[2]}
    fields.update(zip("abc", ctx.numbers, strict=True))
    fields.update(zip(ctx.read, saved[:-1], strict=True))
    return Inputs(**fields)


_apply = plain_apply(_Loss)


def diffusion_loss(problem: Problem, inputs: Inputs, state: State, *, update: bool) -> tuple[Tensor, Tensor]:
    """Differentiable step: the loss (scalar, or [B]) and the per-sample results [4, B] of `Step`.

    Raises:
        RuntimeError: under a transform of torch.func or forward-mode differentiation; or as `operators.step`.
    """
    compiling = inputs.plan is None and is_compiling()  # nothing observes a call with a plan
    prediction, base_weight = inputs.prediction, inputs.base_weight
    if inputs.plan is None and not compiling and transformed():
        _refuse_transforms()
    by_prediction = prediction.requires_grad
    if not torch.is_grad_enabled() or not (by_prediction or (base_weight is not None and base_weight.requires_grad)):
        loss, per_sample, _ = operators.step(problem, inputs, state, gradient=False, update=update)
        return loss, per_sample
    if compiling:
        inputs = inputs._replace(prediction=None, base_weight=None)  # type: ignore[arg-type]
        applied: tuple[Tensor, Tensor] = _Loss.apply(prediction, base_weight, problem, inputs, False, (state, update))
        return applied
    if base_weight is not None and not base_weight.requires_grad:
        base_weight = None
    fused = by_prediction and inputs.mean and prediction.dtype in FUSED_DTYPES
    if inputs.plan is None:
        made: tuple[Tensor, Tensor] = _apply(prediction, base_weight, problem, inputs, fused, (state, update))
        return made
    step = operators.step(problem, inputs, state, gradient=fused, update=update)
    return _apply(prediction, base_weight, problem, inputs, fused, step), step.per_sample


def reweight(problem: Problem, inputs: Inputs, state: State, *, update: bool) -> Tensor:
    """w*v*loss [B] of per-sample losses [B], differentiable with respect to them; the weights are constants.

    Raises:
        RuntimeError: as `diffusion_loss`.
    """
    if not is_compiling() and transformed():
        _refuse_transforms()
    loss = inputs.prediction
    detached = inputs._replace(prediction=loss.detach().contiguous())
    factor = operators.reweight(problem, detached, state, update=update)
    if inputs.sample_weight is not None:  # a masked sample's loss may be NaN, and NaN * 0 is NaN
        loss = loss.masked_fill(inputs.sample_weight == 0, 0.0)
    return loss * factor


def _refuse_transforms() -> None:
    raise RuntimeError(
        "vadiff's loss has no rule for torch.func transforms and forward-mode differentiation: "
        "use loss.backward() or torch.autograd.grad"
    )
