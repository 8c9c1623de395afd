"""Private names of torch that vadiff uses, each with a fallback for torch versions without it.

They are called at every step, and are C functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

_C: Any = torch._C


def _private(path: str, fallback: Callable[..., Any]) -> Callable[..., Any]:
    """torch._C.<path>, or `fallback` if torch has none."""
    found = _C
    for name in path.split("."):
        found = getattr(found, name, None)
    return found or fallback


# Whether the running backward keeps its graph for another one; fallback: yes, so that the gradient is copied.
graph_is_kept: Callable[[], bool] = _private("_autograd._get_current_graph_task_keep_graph", lambda: True)

# Id of the backward pass that makes this call, -1 outside of one; fallback: outside.
backward_pass: Callable[[], int] = _private("_current_graph_task_id", lambda: -1)


# The default process group, None without one. `dist.is_initialized` calls three Python functions, which takes 2 µs in a
# training step, where their code is not in the cache.
_world = getattr(getattr(dist, "distributed_c10d", None), "_world", None)
default_group: Callable[[], object] = functools.partial(getattr, _world, "_default_pg")
if not hasattr(_world, "_default_pg"):
    default_group = getattr(dist, "is_initialized", lambda: None)

# Observers that must see the operators of a call: torch.jit's tracer, the profiler, dispatch modes, torch.func.
_tracing_state: Callable[[], object] = _private("_get_tracing_state", torch.jit.is_tracing)
_profiling: Callable[[], bool] = getattr(torch.autograd, "_profiler_enabled", lambda: True)
dispatch_modes: Callable[[], int] = _private("_len_torch_dispatch_stack", lambda: 1)
_transforms: Callable[[], bool] = _private("_are_functorch_transforms_active", lambda: False)
_guards: Callable[..., Any] = _private("_dynamo.guards.TensorGuards", lambda *_, **__: None)
PLAIN = frozenset((Tensor, torch.nn.Parameter))  # types that are no subclasses with operators of their own


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active."""
    return _transforms() or forward_ad._current_level >= 0


def observed() -> bool:
    """Whether a compiler, tracer, profiler, dispatch mode or transform is active, which must see a call's operators."""
    return (
        is_compiling()
        or bool(_tracing_state())
        or _profiling()
        or dispatch_modes() > 0
        or _transforms()
        or forward_ad._current_level >= 0
    )


def plain(values: Iterable[Any]) -> bool:
    """Whether the tensors among values can be read at their addresses: no subclass, lazily negated or lazily zero."""
    tensors = (value for value in values if isinstance(value, Tensor))
    return all(type(each) in PLAIN and not each.is_neg() and each.data_ptr() != 0 for each in tensors)


def comparison_with(tensors: tuple[Tensor, ...]) -> Callable[..., bool] | None:
    """A function that tells whether as many tensors look like these; None if this version of torch has none.

    It compares type, dtype, shape, strides, device, requires_grad and dispatch keys (those of a mode too) in 0.5 µs;
    reading them takes 3.5. It is false if one tensor is given twice, and ends the process for a nested one."""
    try:
        return _guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    except (AttributeError, TypeError):
        return None


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The C++ part of `function.apply`, without the check for transforms of torch.func, which are refused before."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def raising_if_differentiated(gradient: Tensor | None, message: str) -> Tensor | None:
    """A gradient that raises `message` when it is differentiated.

    `once_differentiable` would silently omit the missing derivative if other terms have one."""
    if gradient is None:
        return None
    delayed = getattr(_C._functions, "DelayedError", None)
    if delayed is None:
        raise RuntimeError(message)
    raising: Tensor = delayed(message, 1)(gradient.detach().requires_grad_())
    return raising
