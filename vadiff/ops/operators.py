"""The torch operators, and the dispatch of a call to a backend.

Four operators in the namespace `vadiff`, opaque to the compiler, so that decisions in Python (backend, environment,
process group) are made at call time:

    diffusion_loss             one step: loss, per-sample results, gradient; updates the statistics
    diffusion_loss_backward    gradient from the inputs of a step
    scale_gradient_            gradient * upstream, in place
    reweight                   factors for per-sample losses computed elsewhere; updates the statistics

`step`, `backward`, `scale` and `reweight` are what the rest of vadiff calls. They go through the dispatcher if
something observes the call (`vadiff.ops._torch.observed`) or a tensor is not plain, else directly to the backend, which
saves 40 to 55 µs. A step with a plan goes directly: `vadiff.ops.plan` has looked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

from .._ranks import number_of_ranks
from . import backends
from ._torch import PLAIN, backward_pass, default_group, dispatch_modes, observed, plain, transformed
from .problem import Bins, Gather, Inputs, Problem, State, Step, TableRule, compute_dtype

Fields = TypeVar("Fields", bound=tuple[Any, ...])

# The flat arguments, named as the fields of Inputs, State, Problem, TableRule; `a_each` [B] or the number `a`.
_RESIDUAL = (
    "Tensor prediction, Tensor? target, Tensor? noise, "
    "Tensor? a_each, Tensor? b_each, Tensor? c_each, float a, float b, float c"
)
_INPUTS = f"{_RESIDUAL}, Tensor log_snr, Tensor? base_weight, Tensor? sample_weight, Tensor? weight, bool mean"
_STATE = "Tensor(a!) state, Tensor(b!) log_weights"
_PROBLEM = (
    "float low, float high, float half_life, str statistic, float strength, float smoothing, float clip, float prior, "
    "float huber_delta, bool sync, str backend"
)
_SCHEMAS = {
    "diffusion_loss": f"({_INPUTS}, {_STATE}, {_PROBLEM}, bool gradient, bool update)"
    " -> (Tensor loss, Tensor per_sample, Tensor gradient)",
    "diffusion_loss_backward": f"({_RESIDUAL}, Tensor per_sample, Tensor upstream, float huber_delta, str backend)"
    " -> Tensor",
    "scale_gradient_": "(Tensor(a!) gradient, Tensor upstream, str backend) -> ()",
    "reweight": f"({_INPUTS}, {_STATE}, {_PROBLEM}, bool update) -> Tensor",
}
_NAMES = {
    name: [argument.split()[-1] for argument in schema[1:].split(") -> ")[0].split(", ")]
    for name, schema in _SCHEMAS.items()
}

_NO_STATISTICS = Problem(Bins(2, -1.0, 1.0), half_life=1.0)  # of a backward, which reads none
_library = torch.library.Library("vadiff", "DEF")


# Dispatch of a call


def step(
    problem: Problem, inputs: Inputs, state: State, *, gradient: bool, update: bool, dispatched: bool = False
) -> Step:
    """One step; see `vadiff.ops.reference.step`.

    dispatched: the call has passed the dispatcher.

    Raises:
        RuntimeError: with `update`, from inside a backward pass; or the backend cannot run it."""
    plan = inputs.plan
    if plan is None and not dispatched and (observed() or not plain(inputs)):
        flat = _flat(inputs, state, problem)
        return Step(*torch.ops.vadiff.diffusion_loss(**flat, gradient=gradient, update=update))
    gather = _begin_update(problem) if update else None
    if plan is None:
        inputs = one_layout(inputs)
    kernels: Any = backends.select(problem.backend, inputs.prediction) if plan is None else plan.kernels
    result: Step = kernels.step(problem, inputs, state, gradient=gradient, update=update, gather=gather)
    return result


def backward(problem: Problem, inputs: Inputs, per_sample: Tensor, upstream: Tensor) -> Tensor:
    """Gradient by the prediction from the inputs of a step; see `vadiff.ops.reference.backward`."""
    if observed() or not plain((upstream, *inputs)):
        flat = {**_flat(inputs), "per_sample": per_sample, "upstream": upstream}
        flat.update(huber_delta=problem.huber_delta, backend=problem.backend)
        names = _NAMES["diffusion_loss_backward"]
        result: Tensor = torch.ops.vadiff.diffusion_loss_backward(**{name: flat[name] for name in names})
        return result
    return _backward(problem, inputs, per_sample, upstream)


def scale(gradient: Tensor, upstream: Tensor, backend: str) -> Tensor:
    """The gradient, multiplied by upstream (a scalar) in place."""
    # Where one of these is active, a tensor may have no number, or the number would be recorded as a constant.
    readable = not (dispatch_modes() or is_compiling() or transformed())
    if readable and upstream.is_cpu and type(upstream) in PLAIN and upstream.item() == 1.0:
        return gradient  # reading a number takes 0.3 µs, calling a kernel 2
    if observed() or not plain((gradient, upstream)):
        torch.ops.vadiff.scale_gradient_(gradient, upstream, backend)
    else:
        backends.select(backend, gradient).scale(gradient, upstream)
    return gradient


def reweight(problem: Problem, inputs: Inputs, state: State, *, update: bool) -> Tensor:
    """Factors [B] of per-sample losses; see `vadiff.ops.reference.reweight`."""
    result: Tensor = torch.ops.vadiff.reweight(**_flat(inputs, state, problem), update=update)
    return result


def one_layout(inputs: Inputs) -> Inputs:
    """The inputs with prediction, target and noise in one dense layout; those that are in it already are the same."""
    prediction, target, noise = inputs[:3]
    if prediction.is_contiguous() and noise is None and (target is None or target.is_contiguous()):
        return inputs  # the common case, without arguments to parse
    layout = layout_of(prediction)
    return inputs._replace(
        prediction=prediction.contiguous(memory_format=layout),
        target=None if target is None else target.contiguous(memory_format=layout),
        noise=None if noise is None else noise.contiguous(memory_format=layout),
    )


def layout_of(prediction: Tensor) -> torch.memory_format:
    """The prediction's dense layout with the batch outermost; contiguous (one copy) for any other strides."""
    if prediction.is_contiguous():
        return torch.contiguous_format
    for dim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if prediction.dim() == dim and prediction.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


def _backward(problem: Problem, inputs: Inputs, per_sample: Tensor, upstream: Tensor) -> Tensor:
    inputs = one_layout(inputs)
    result: Tensor = backends.select(problem.backend, inputs.prediction).backward(problem, inputs, per_sample, upstream)
    return result


def _begin_update(problem: Problem) -> Gather | None:
    """Refuse to record inside a backward pass; return how this rank's batch statistics [4K + 5] become those of all
    ranks [ranks, 4K + 5], None on one rank."""
    if backward_pass() != -1:
        raise RuntimeError(
            "the criterion was called from inside a backward pass, where it would record the same batch twice. "
            "Activation checkpointing does this: put the criterion outside the checkpointed function"
        )
    ranks = number_of_ranks() if problem.sync and default_group() else 1
    if ranks == 1:
        return None
    # all_gather_into_tensor, under the name it has since torch 2.13
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def gather(batch: Tensor) -> Tensor:
        gathered = batch.new_empty(ranks * batch.numel())
        all_gather(gathered, batch)
        return gathered.view(ranks, -1)

    return gather


# Flat arguments, by name


def _flat(inputs: Inputs, state: State | None = None, problem: Problem | None = None) -> dict[str, Any]:
    flat: dict[str, Any] = _fields(inputs)
    del flat["plan"]
    for name in "abc":
        value = flat[name]
        each = isinstance(value, Tensor)
        flat[f"{name}_each"], flat[name] = (value, 0.0) if each else (None, value)
    if state is not None:
        flat.update(_fields(state))
    if problem is not None:
        flat.update(_fields(problem.rule))
        flat.update(low=problem.bins.low, high=problem.bins.high, half_life=problem.half_life)
        flat.update(huber_delta=problem.huber_delta, sync=problem.sync, backend=problem.backend)
    return flat


def _fields(values: Any) -> dict[str, Any]:
    return dict(zip(values._fields, values, strict=True))


def _made(kind: type[Fields], flat: dict[str, Any]) -> Fields:
    """A NamedTuple of what has its fields' names; None for what an operator is not given."""
    return kind(**{name: flat.get(name) for name in kind._fields})  # type: ignore[attr-defined]


def _unflat(flat: dict[str, Any]) -> tuple[Problem, Inputs, State]:
    for name in "abc":
        if flat[f"{name}_each"] is not None:
            flat[name] = flat[f"{name}_each"]
    state = _made(State, flat)
    if state.log_weights is not None:
        bins = Bins(len(state.log_weights), flat["low"], flat["high"])
        flat = {**flat, "bins": bins, "rule": _made(TableRule, flat)}
    return _made(Problem, flat), _made(Inputs, flat), state


# Implementations of the operators


def _run_step(flat: dict[str, Any]) -> tuple[Tensor, ...]:
    return tuple(step(*_unflat(flat), gradient=flat["gradient"], update=flat["update"], dispatched=True))


def _run_backward(flat: dict[str, Any]) -> Tensor:
    _, inputs, _ = _unflat({**flat, "mean": flat["upstream"].dim() == 0})
    problem = _NO_STATISTICS._replace(huber_delta=flat["huber_delta"], backend=flat["backend"])
    return _backward(problem, inputs, flat["per_sample"], flat["upstream"])


def _run_scale(flat: dict[str, Any]) -> None:
    backends.select(flat["backend"], flat["gradient"]).scale(flat["gradient"], flat["upstream"])


def _run_reweight(flat: dict[str, Any]) -> Tensor:
    (problem, inputs, state), update = _unflat(flat), flat["update"]
    gather = _begin_update(problem) if update else None
    kernels: Any = backends.select(problem.backend, inputs.prediction)
    result: Tensor = kernels.reweight(problem, inputs, state, update=update, gather=gather)
    return result


# Fake implementations: shapes and dtypes for the compiler


def _fake_step(flat: dict[str, Any]) -> tuple[Tensor, ...]:
    prediction = flat["prediction"]
    samples, dtype = prediction.shape[0], compute_dtype(prediction)
    loss = prediction.new_empty(() if flat["mean"] else (samples,), dtype=dtype)
    gradient = _fake_gradient(flat) if flat["gradient"] else prediction.new_empty(0)
    return loss, prediction.new_empty((4, samples), dtype=dtype), gradient


def _fake_gradient(flat: dict[str, Any]) -> Tensor:
    return torch.empty_like(flat["prediction"], memory_format=layout_of(flat["prediction"]))


def _define(name: str, run: Callable[[dict[str, Any]], Any], fake: Callable[[dict[str, Any]], Any]) -> None:
    def by_name(function: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
        return lambda *arguments: function(dict(zip(_NAMES[name], arguments, strict=True)))

    _library.define(name + _SCHEMAS[name], tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, by_name(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"vadiff::{name}", by_name(fake), lib=_library)


_define("diffusion_loss", _run_step, _fake_step)
_define("diffusion_loss_backward", _run_backward, _fake_gradient)
_define("scale_gradient_", _run_scale, lambda flat: None)
_define("reweight", _run_reweight, lambda flat: torch.empty_like(flat["prediction"]))
