"""The short way of a training step: plain tensors, the native kernels, nobody watching.

At the size of a CIFAR batch the arithmetic takes less time than the Python around it, on a GPU as on a CPU, and between
the steps of a network that Python runs cold. So the common call is one call into csrc/direct.cpp, which looks at the
arguments and either runs the kernel on them or leaves them alone. What it leaves takes the long way, with its checks,
conversions and operators (`vadiff.loss`, `vadiff.ops`). Both compute the same to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from ._validation import check_per_sample
from .autograd import graph_keeps, not_differentiable, scaled
from .reference import Coefficient, TableRule
from .weighting import AdaptiveWeighting, Constant, FixedWeighting

NO_TABLE = TableRule()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)  # csrc/ask.h's order
_DL_CUDA = 2  # kDLCUDA of dlpack.h
_SCALAR = torch.zeros((), dtype=torch.float32, device="cpu")


class _NoWorld:
    """In place of torch's object that knows the default process group, where it cannot be asked."""

    @property
    def default_pg(self) -> object:
        return True if dist.is_available() and dist.is_initialized() else None


# `torch.distributed.is_initialized` is three calls of Python; `_c10d._world.default_pg is not None` is one.
_c10d: Any = getattr(dist, "distributed_c10d", None)
if not hasattr(getattr(_c10d, "_world", None), "default_pg"):
    _c10d = SimpleNamespace(_world=_NoWorld())
# Torch's own, whose `default_pg` is a property: one more call.
_World = type(_c10d._world) if hasattr(_c10d._world, "_default_pg") else None

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
    criterion: Any,
    prediction: Tensor,
    target: Tensor,
    log_snr: Tensor,
    noise: Tensor | None,
    coefficients: tuple[Coefficient, Coefficient, Coefficient] | None,
    base_weight: Tensor | None,
    sample_weight: Tensor | None,
) -> Tensor | None:
    """Mean loss of a step of a `DiffusionLoss` that moves its statistics, or None where it takes the long way.

    The tensors are not checked yet."""
    native = _native()
    if native is None or forward_ad._current_level >= 0:
        return None
    if criterion.sync:
        world = _c10d._world
        if (world._default_pg if type(world) is _World else world.default_pg) is not None:
            return None
    weighting, rule, weigh = criterion.weighting, NO_TABLE, None
    if isinstance(weighting, AdaptiveWeighting):
        rule = weighting.rule
    elif not isinstance(weighting, Constant):
        if not (isinstance(weighting, FixedWeighting) and weighting.pointwise):
            return None
        weigh = functools.partial(_weights, weighting, prediction)  # called only where the short way is open
    statistics = criterion._modules["statistics"]  # as an attribute it would be looked for elsewhere first
    kernels, buffers, losses = native._native, statistics._buffers, criterion._last
    if type(losses) is not kernels.Losses:
        losses = kernels.Losses()
    found = kernels.direct_step(
        prediction, target, noise, coefficients, log_snr, base_weight, sample_weight, weigh, buffers["state"],
        buffers["log_weights"], statistics.bins, statistics.half_life, rule,
        criterion.huber_delta if criterion.loss == "huber" else 0.0, criterion.backend, losses,
    )  # fmt: skip
    if found is None:
        return None
    if losses is not criterion._last:
        object.__setattr__(criterion, "_last", losses)
    return _apply(prediction, found)


def _weights(weighting: FixedWeighting, prediction: Tensor, log_snr: Tensor) -> Tensor:
    return check_per_sample("weighting(log_snr)", weighting.for_batch(log_snr, sync=False), prediction)


def tensor_of(losses: Any) -> Tensor | None:
    """Per-sample losses [B] that a step left behind; None from a copy, which has none."""
    if losses.tensor is not None:
        found: Tensor = losses.tensor
        return found
    numbers = losses.copy()
    with torch.inference_mode(False):
        return torch.frombuffer(numbers, dtype=torch.float32) if numbers else None


@functools.cache
def _native() -> ModuleType | None:
    """`vadiff.native`, its module told of torch; None where it cannot be loaded."""
    native = backends.load_native()
    if isinstance(native, backends.Obstacle) or type(_SCALAR) is not Tensor:
        return None

    def runs_on(device: int) -> bool:
        return backends.native_obstacle(native, torch.device("cuda", device)) is None

    introduce(native._native, native.settings_of, _DL_CUDA if native.CUDA_ARCHITECTURES else 0, runs_on, _stream_of)
    return native


def introduce(
    kernels: Any,
    settings_of: Callable[..., Any],
    cuda: int,
    runs_on: Callable[[int], bool],
    stream_of: Callable[[int], int],
    exchange: object = getattr(Tensor, "__dlpack_c_exchange_api__", None),
) -> bool:
    """Tell the compiled module of torch. Says whether it asks tensors by DLPack's functions.

    `settings_of` is `vadiff.native`'s, for these kernels. `cuda` is DLPack's number of the kind of device that its CUDA
    kernels run on, 0 where it has none; by the number of a device, `runs_on` says whether they run there, `stream_of`
    gives the address of its current stream. `exchange` is DLPack's table of C functions, None where tensors are asked
    for their attributes."""
    by_exchange: bool = kernels.know_torch(
        Tensor, _DTYPES, exchange, torch.empty_like, _SCALAR, torch.get_num_threads, cuda, settings_of, runs_on,
        stream_of, _FORWARD, _BACKWARD,
    )  # fmt: skip
    return by_exchange


# What torch.cuda.current_stream(device).cuda_stream says, without making an object.
_stream_of: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda device: torch.cuda.current_stream(device).cuda_stream
)


class _Step(torch.autograd.Function):
    """What was computed already, as the result of a function of `prediction`."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, found: tuple[Tensor, ...]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*found[1:])  # never what is returned: `loss /= n` would spoil it
        return found[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, None]:
        if upstream is None:
            return None, None
        gradient, *saved = ctx.saved_tensors
        native = _native()
        if native is not None and native._native.direct_scale(upstream, gradient, *saved):
            return gradient, None
        upstream = upstream.detach()
        # On the CPU, nothing is saved: the gradient is NaN already where it has to be.
        gradient = scaled(gradient, upstream, saved[0] if saved else upstream.new_zeros(1), "native")
        return not_differentiable(gradient) if torch.is_grad_enabled() else gradient, None


# Function.apply without its Python, which looks for functorch's transforms: there are none.
_apply = super(torch.autograd.Function, _Step).apply
