"""The torch operators, and the dispatch of a call to a backend.

Five operators in the namespace `vadiff`, opaque to the compiler, so that decisions in Python (backend, environment,
process group) are made at call time:

    diffusion_loss             one step: loss, per-sample results, gradient; updates the statistics
    diffusion_loss_backward    gradient from the inputs of a step
    scale_gradient             gradient * upstream into a new tensor, or (scale_gradient_) in place
    reweight                   factors for per-sample losses computed elsewhere; updates the statistics

`step`, `backward`, `scale` and `reweight` are what the rest of vadiff calls. They go through the dispatcher if
something observes the call (`vadiff.ops._torch.observed`), else directly to the backend, which saves 40 to 55 µs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends
from ._torch import inside_backward, observed
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
_ARGUMENTS = {
    "diffusion_loss": f"{_INPUTS}, {_STATE}, {_PROBLEM}, bool gradient, bool update",
    "diffusion_loss_backward": f"{_RESIDUAL}, Tensor per_sample, Tensor upstream, float huber_delta, str backend",
    "scale_gradient": "Tensor gradient, Tensor upstream, str backend",
    "scale_gradient_": "Tensor(a!) gradient, Tensor upstream, str backend",
    "reweight": f"{_INPUTS}, {_STATE}, {_PROBLEM}, bool update",
}
_RETURNS = {"diffusion_loss": "(Tensor loss, Tensor per_sample, Tensor gradient)", "scale_gradient_": "()"}

_library = torch.library.Library("vadiff", "DEF")


# Dispatch of a call


def step(problem: Problem, inputs: Inputs, state: State, *, gradient: bool, update: bool) -> Step:
    """One step; see `vadiff.ops.reference.step`.

    Raises:
        RuntimeError: with `update`, from inside a backward pass; or the backend cannot run it."""
    if observed(inputs):
        flat = _flat(inputs, state, problem)
        return Step(*torch.ops.vadiff.diffusion_loss(**flat, gradient=gradient, update=update))
    return _step(problem, inputs, state, gradient=gradient, update=update)


def backward(problem: Problem, inputs: Inputs, per_sample: Tensor, upstream: Tensor) -> Tensor:
    """Gradient by the prediction from the inputs of a step; see `vadiff.ops.reference.backward`."""
    if observed((upstream, *inputs)):
        flat = _selected(_flat(inputs), _ARGUMENTS["diffusion_loss_backward"])
        result: Tensor = torch.ops.vadiff.diffusion_loss_backward(
            **flat, per_sample=per_sample, upstream=upstream, huber_delta=problem.huber_delta, backend=problem.backend
        )
        return result
    return _backward(problem, inputs, per_sample, upstream)


def scale(gradient: Tensor, upstream: Tensor, backend: str, *, in_place: bool) -> Tensor:
    """gradient * upstream (a scalar), in place or in a new tensor."""
    if not in_place:
        result: Tensor = torch.ops.vadiff.scale_gradient(gradient, upstream, backend)
        return result
    if observed((gradient, upstream)):
        torch.ops.vadiff.scale_gradient_(gradient, upstream, backend)
    else:
        backends.select(backend, gradient).scale(gradient, upstream, gradient)
    return gradient


def reweight(problem: Problem, inputs: Inputs, state: State, *, update: bool) -> Tensor:
    """Factors [B] of per-sample losses; see `vadiff.ops.reference.reweight`."""
    result: Tensor = torch.ops.vadiff.reweight(**_flat(inputs, state, problem), update=update)
    return result


def one_layout(inputs: Inputs) -> Inputs:
    """The inputs with prediction, target and noise in one dense layout; tensors already in it are not copied."""
    prediction, target, noise = inputs.prediction, inputs.target, inputs.noise
    layout = layout_of(prediction)
    if (
        prediction.is_contiguous(memory_format=layout)
        and (target is None or target.is_contiguous(memory_format=layout))
        and (noise is None or noise.is_contiguous(memory_format=layout))
    ):
        return inputs
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


def _step(problem: Problem, inputs: Inputs, state: State, *, gradient: bool, update: bool) -> Step:
    if update:
        _refuse_inside_backward()
    inputs = one_layout(inputs)
    kernels = backends.select(problem.backend, inputs.prediction)
    result: Step = kernels.step(
        problem, inputs, state, gradient=gradient, update=update, gather=_gather(problem) if update else None
    )
    return result


def _backward(problem: Problem, inputs: Inputs, per_sample: Tensor, upstream: Tensor) -> Tensor:
    inputs = one_layout(inputs)
    result: Tensor = backends.select(problem.backend, inputs.prediction).backward(problem, inputs, per_sample, upstream)
    return result


def _gather(problem: Problem) -> Gather | None:
    """Function that gathers batch statistics [4K + 1] of all ranks to [ranks, 4K + 1]; None on one rank."""
    if not (problem.sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    ranks = dist.get_world_size()
    # all_gather_into_tensor, under the name it has since torch 2.13
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def gather(batch: Tensor) -> Tensor:
        gathered = batch.new_empty(ranks * batch.numel())
        all_gather(gathered, batch)
        return gathered.view(ranks, -1)

    return gather


def _refuse_inside_backward() -> None:
    if inside_backward():
        raise RuntimeError(
            "the criterion was called from inside a backward pass, where it would record the same batch twice. "
            "Activation checkpointing does this: put the criterion outside the checkpointed function"
        )


# Flat arguments, by name


def _flat(inputs: Inputs, state: State | None = None, problem: Problem | None = None) -> dict[str, Any]:
    flat: dict[str, Any] = _fields(inputs)
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


def _names(arguments: str) -> list[str]:
    return [argument.split()[-1] for argument in arguments.split(", ")]


def _selected(flat: dict[str, Any], arguments: str) -> dict[str, Any]:
    return {name: flat[name] for name in _names(arguments) if name in flat}


def _from_flat(kind: type[Fields], flat: dict[str, Any]) -> Fields:
    """The NamedTuple `kind` from the flat arguments; a field is None if the operator has no such argument."""
    return kind(**{name: flat.get(name) for name in kind._fields})  # type: ignore[attr-defined]


def _unflat(flat: dict[str, Any]) -> tuple[Problem, Inputs, State]:
    for name in "abc":
        if flat[f"{name}_each"] is not None:
            flat[name] = flat[f"{name}_each"]
    state = _from_flat(State, flat)
    if state.log_weights is not None:
        bins = Bins(len(state.log_weights), flat["low"], flat["high"])
        flat = {**flat, "bins": bins, "rule": _from_flat(TableRule, flat)}
    return _from_flat(Problem, flat), _from_flat(Inputs, flat), state


# Implementations of the operators


def _run_step(flat: dict[str, Any]) -> Step:
    return _step(*_unflat(flat), gradient=flat["gradient"], update=flat["update"])


def _run_backward(flat: dict[str, Any]) -> Tensor:
    problem, inputs, _ = _unflat(flat)
    return _backward(problem, inputs, flat["per_sample"], flat["upstream"])


def _run_scale(flat: dict[str, Any]) -> Tensor:
    out = torch.empty_like(flat["gradient"])
    backends.select(flat["backend"], out).scale(flat["gradient"], flat["upstream"], out)
    return out


def _run_scale_in_place(flat: dict[str, Any]) -> None:
    gradient = flat["gradient"]
    backends.select(flat["backend"], gradient).scale(gradient, flat["upstream"], gradient)


def _run_reweight(flat: dict[str, Any]) -> Tensor:
    problem, inputs, state = _unflat(flat)
    if flat["update"]:
        _refuse_inside_backward()
    gather = _gather(problem) if flat["update"] else None
    result: Tensor = backends.select(problem.backend, inputs.prediction).reweight(
        problem, inputs, state, update=flat["update"], gather=gather
    )
    return result


# Fake implementations: shapes and dtypes for the compiler


def _fake_step(flat: dict[str, Any]) -> Step:
    prediction = flat["prediction"]
    samples, dtype = prediction.shape[0], compute_dtype(prediction)
    loss = prediction.new_empty(() if flat["mean"] else (samples,), dtype=dtype)
    gradient = _fake_gradient(flat) if flat["gradient"] else prediction.new_empty(0)
    return Step(loss, prediction.new_empty((4, samples), dtype=dtype), gradient)


def _fake_gradient(flat: dict[str, Any]) -> Tensor:
    return torch.empty_like(flat["prediction"], memory_format=layout_of(flat["prediction"]))


def _define(name: str, run: Callable[[dict[str, Any]], Any], fake: Callable[[dict[str, Any]], Any]) -> None:
    names = _names(_ARGUMENTS[name])

    def by_name(function: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result = function(dict(zip(names, arguments, strict=True)))
            return tuple(result) if isinstance(result, Step) else result

        return call

    returns = _RETURNS.get(name, "Tensor")
    _library.define(f"{name}({_ARGUMENTS[name]}) -> {returns}", tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, by_name(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"vadiff::{name}", by_name(fake), lib=_library)


_define("diffusion_loss", _run_step, _fake_step)
_define("diffusion_loss_backward", _run_backward, _fake_gradient)
_define("scale_gradient", _run_scale, lambda flat: torch.empty_like(flat["gradient"]))
_define("scale_gradient_", _run_scale_in_place, lambda flat: None)
_define("reweight", _run_reweight, lambda flat: torch.empty_like(flat["prediction"]))
