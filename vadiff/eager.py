"""The short way of a training step: plain tensors on the CPU, the native kernels, nobody watching.

At the size of a CIFAR batch the arithmetic takes less time than the Python around it, and between the steps of a
network that Python runs cold. So the common call is one call into csrc/direct.cpp, which looks at the arguments and
either runs the kernel on them or leaves them alone. What it leaves takes the long way, with its checks, conversions and
operators (`vadiff.loss`, `vadiff.ops`). Both compute the same to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .autograd import graph_keeps, not_differentiable, scaled
from .reference import Bins, Coefficient, TableRule

_DISTRIBUTED = dist.is_available()

# Where the short way may be taken: questions without arguments, and the object that answers each there.
_QUIET: tuple[tuple[Any, object], ...] = (  # nobody who would have to see an operator
    (torch._C._get_tracing_state, None),
    (torch.autograd._profiler_enabled, False),
    (torch._C._len_torch_dispatch_stack, 0),
    (torch._C._functorch.peek_interpreter_stack, None),
)
_FORWARD = (*_QUIET, (torch._C._current_graph_task_id, -1))  # outside a backward pass
_BACKWARD = (*_QUIET, (torch.is_grad_enabled, False), (graph_keeps or (lambda: True), False))  # and not differentiable


def step(
    prediction: Tensor,
    target: Tensor,
    noise: Tensor | None,
    coefficients: tuple[Coefficient, Coefficient, Coefficient] | None,
    log_snr: Tensor,
    base_weight: Tensor | None,
    sample_weight: Tensor | None,
    weigh: Callable[[Tensor], Tensor] | None,
    state: Tensor,
    log_weights: Tensor,
    bins: Bins,
    half_life: float,
    rule: TableRule,
    huber_delta: float,
    sync: bool,
    backend: str,
) -> tuple[Tensor, Tensor] | None:
    """Mean loss and ell [B] of a step that moves the statistics, or None where it takes the long way.

    The tensors are not checked yet. `weigh` gives w [B] for log-SNR; it is called only where the short way is open."""
    native = _native()
    if native is None or forward_ad._current_level >= 0 or (sync and _DISTRIBUTED and dist.is_initialized()):
        return None
    found = native._native.direct_step(
        prediction, target, noise, coefficients, log_snr, base_weight, sample_weight, weigh, state, log_weights,
        native.settings_of(bins, half_life, rule), huber_delta, backend,
    )  # fmt: skip
    return None if found is None else (_apply(prediction, found), found[1])


@functools.cache
def _native() -> ModuleType | None:
    """`vadiff.native`, its module told of torch; None where it cannot be loaded."""
    native = backends.load_native()
    if isinstance(native, backends.Obstacle):
        return None
    dtypes = tuple(native.DTYPES)
    native._native.know_torch(
        Tensor, dtypes, torch.int64, torch.int32, torch.empty_like, torch.get_num_threads, _FORWARD, _BACKWARD
    )
    return native


class _Step(torch.autograd.Function):
    """What was computed already, as the result of a function of `prediction`."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, found: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        loss, _, saved, gradient = found
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(saved, gradient)  # never what is returned: `loss /= n` would spoil it
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, None]:
        if upstream is None:
            return None, None
        saved, gradient = ctx.saved_tensors
        native = _native()
        if native is not None and native._native.direct_scale(gradient, upstream, saved):
            return gradient, None
        gradient = scaled(gradient, upstream.detach(), saved, "native")
        return not_differentiable(gradient) if torch.is_grad_enabled() else gradient, None


# Function.apply without its Python, which looks for functorch's transforms: there are none.
_apply = super(torch.autograd.Function, _Step).apply
