"""The compiled kernels of csrc/: the four functions of a backend, see `vadiff.ops.problem`.

CPU tensors in any float dtype, on `torch.get_num_threads()` threads; CUDA tensors where the module was built with nvcc.
Prediction, target and noise share one dense layout with the batch outermost: `vadiff.ops.operators` sees to that.
csrc/ knows no torch: it gets the address of a `Call`, which holds addresses and numbers.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import NoReturn

import torch
from torch import Tensor

from .. import _native
from .problem import Gather, Inputs, Problem, State, Step, compute_dtype

INTERFACE = 7  # kInterface of csrc/module.cpp: one more there and here when what is called there changes

if getattr(_native, "INTERFACE", None) != INTERFACE:
    raise ImportError(
        f"{_native.__file__} was compiled from another version of vadiff: its interface is "
        f"{getattr(_native, 'INTERFACE', 'not numbered')}, expected {INTERFACE}"
    )

CUDA_ARCHITECTURES: str | None = _native.cuda_architectures  # None: built without CUDA

# enum Dtype and enum Statistic in csrc/loss_math.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
STATISTICS = {"": 0, "std": 1, "mean": 2, "rms": 3}


def _integers(names: str) -> list[tuple[str, type]]:
    """Fields of a struct that are addresses or whole numbers."""
    return [(name, ctypes.c_int64) for name in names.split()]


def _floats(names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_double) for name in names.split()]


class ProblemFields(ctypes.Structure):
    """`struct ProblemFields` of csrc/call.h."""

    __slots__ = ()
    _fields_ = [
        *_integers("bins"), *_floats("low high half_life"), *_integers("statistic"),
        *_floats("strength smoothing log_clip prior"), *_integers("radius"), *_floats("huber_delta"),
    ]  # fmt: skip


class Call(ctypes.Structure):
    """`struct Call` of csrc/call.h, which says what each field is. 0 stands for "not given"."""

    __slots__ = ()  # a misspelt field raises
    _fields_ = [
        ("problem", ProblemFields),
        *_integers("device threads stream workspace"),
        *_integers("samples elements prediction prediction_dtype target target_dtype noise noise_dtype"),
        *_integers("a_each b_each c_each"), *_floats("a b c"),
        *_integers("log_snr base_weight sample_weight weight mean"),
        *_integers("state log_weights update batch"),
        *_integers("loss per_sample gradient factors"),
        *_integers("upstream upstream_stride out gathered ranks"),
    ]  # fmt: skip


if ctypes.sizeof(Call) != _native.CALL_SIZE:
    raise ImportError(f"{_native.__file__} reads a call of {_native.CALL_SIZE} bytes, expected {ctypes.sizeof(Call)}")


def instruction_set() -> str:
    """What the CPU kernels run on this processor: "avx512", "avx2" or "generic"."""
    return _native.cpu_selected()


def step(
    problem: Problem, inputs: Inputs, state: State, *, gradient: bool, update: bool, gather: Gather | None
) -> Step:
    """See `vadiff.ops.reference.step`."""
    prediction = inputs.prediction
    call = _call(problem, inputs)
    like = prediction if prediction.dtype is torch.float64 else inputs.log_snr  # of the compute dtype
    per_sample = like.new_empty(4, call.samples)  # sizes as a tuple take 0.3 µs more
    loss = like.new_empty(()) if inputs.mean else like.new_empty(call.samples)
    call.loss = loss.data_ptr()
    call.per_sample = per_sample.data_ptr()
    if gradient:
        made = torch.empty_like(prediction)
        call.gradient = made.data_ptr()
    else:
        made = prediction.new_empty(0)
    batch = _give_state(call, state, update, gather)
    _workspace = _place(call, prediction)
    _native.step(ctypes.addressof(call))
    if batch is not None and gather is not None:
        _fold(problem, gather(batch), state)
    return Step(loss, per_sample, made)


def backward(problem: Problem, inputs: Inputs, per_sample: Tensor, upstream: Tensor) -> Tensor:
    """See `vadiff.ops.reference.backward`. A saved-tensor hook may have changed `per_sample` and coefficients."""
    prediction = inputs.prediction
    call = _call(problem, inputs)
    dtype = compute_dtype(prediction)
    gradient = torch.empty_like(prediction)
    call.gradient = gradient.data_ptr()
    call.per_sample = _checked(per_sample, dtype, "per_sample")
    call.upstream = _checked(upstream, dtype, "upstream", any_stride=True)
    call.mean = upstream.dim() == 0
    if not call.mean:
        call.upstream_stride = upstream.stride(0)  # 0 where autograd expanded a scalar
    _place(call, prediction)
    _native.backward(ctypes.addressof(call))
    return gradient


def scale(gradient: Tensor, upstream: Tensor, out: Tensor) -> None:
    """See `vadiff.ops.reference.scale`."""
    dtype = gradient.dtype
    call = Call(
        prediction_dtype=DTYPES[dtype],
        elements=gradient.numel(),
        gradient=gradient.data_ptr() or _freed(gradient, "gradient"),
        upstream=_checked(upstream, torch.float64 if dtype is torch.float64 else torch.float32, "upstream"),
        out=out.data_ptr(),
    )
    _place(call, gradient)
    _native.scale(ctypes.addressof(call))


def reweight(problem: Problem, inputs: Inputs, state: State, *, update: bool, gather: Gather | None) -> Tensor:
    """See `vadiff.ops.reference.reweight`."""
    loss = inputs.prediction
    call = _call(problem, inputs)
    factors = loss.new_empty(loss.shape)
    call.factors = factors.data_ptr()
    batch = _give_state(call, state, update, gather)
    _workspace = _place(call, loss)
    _native.reweight(ctypes.addressof(call))
    if batch is not None and gather is not None:
        _fold(problem, gather(batch), state)
    return factors


def _fold(problem: Problem, gathered: Tensor, state: State) -> None:
    """Merge the batch statistics of all ranks [ranks, 4K + 1] and fold them into the state."""
    call = Call(
        problem=_fields(problem),
        gathered=_checked(gathered, torch.float64, "gathered statistics"),
        ranks=gathered.shape[0],
    )
    _give_state(call, state, True, None)
    _workspace = _place(call, gathered)
    _native.fold(ctypes.addressof(call))


def _call(problem: Problem, inputs: Inputs) -> Call:
    """What a problem and its inputs fill of a call."""
    prediction, target, noise, a, b, c, log_snr, base_weight, sample_weight, weight, mean = inputs
    samples = prediction.shape[0]
    call = Call(
        problem=_fields(problem),
        samples=samples,
        elements=prediction.numel() // samples,
        prediction=prediction.data_ptr() or _freed(prediction, "prediction"),
        prediction_dtype=DTYPES[prediction.dtype],
        mean=mean,
    )
    if log_snr is not None:  # a backward has none
        call.log_snr = log_snr.data_ptr() or _freed(log_snr, "log_snr")
    if target is not None:
        call.target = target.data_ptr() or _freed(target, "target")
        call.target_dtype = DTYPES[target.dtype]
    if noise is not None:
        call.noise = noise.data_ptr() or _freed(noise, "noise")
        call.noise_dtype = DTYPES[noise.dtype]
    if base_weight is not None:
        call.base_weight = base_weight.data_ptr() or _freed(base_weight, "base_weight")
    if sample_weight is not None:
        call.sample_weight = sample_weight.data_ptr() or _freed(sample_weight, "sample_weight")
    if weight is not None:
        call.weight = weight.data_ptr() or _freed(weight, "weighting(log_snr)")
    for name, value in (("a", a), ("b", b), ("c", c)):
        if isinstance(value, float):
            setattr(call, name, value)
        else:
            setattr(call, f"{name}_each", _checked(value, compute_dtype(prediction), f"coefficients {name}"))
    return call


def _give_state(call: Call, state: State, update: bool, gather: Gather | None) -> Tensor | None:
    """The state's part of a call. Returns where the batch statistics go instead, if there are ranks to gather from."""
    call.state = state.state.data_ptr()
    call.log_weights = state.log_weights.data_ptr()
    call.update = update
    if gather is None or not update:
        return None
    batch = state.state.new_empty(4 * state.log_weights.shape[0] + 1, dtype=torch.float64)
    call.batch = batch.data_ptr()
    return batch


def _place(call: Call, tensor: Tensor) -> Tensor | None:
    """Where a call runs: threads of the CPU, or a device and its current stream. Returns scratch memory of the device.

    It is to be kept until the kernels are launched; the allocator reuses it in the order of the stream."""
    if tensor.is_cpu:
        call.device = -1
        call.threads = torch.get_num_threads()
        return None
    call.device = tensor.get_device()
    call.stream = torch.cuda.current_stream(call.device).cuda_stream
    size = _native.cuda_workspace_size(ctypes.addressof(call))
    if not size:
        return None
    workspace = torch.empty(size, device=tensor.device, dtype=torch.float64)
    call.workspace = workspace.data_ptr()
    return workspace


_last: tuple[Problem | None, ProblemFields] = (None, ProblemFields())


def _fields(problem: Problem) -> ProblemFields:
    """A problem as csrc/ reads it; remembered, and without hashing while the same object returns."""
    global _last
    known, fields = _last
    if known is not problem:
        fields = _fields_of(problem)
        _last = problem, fields
    return fields


@functools.lru_cache(maxsize=64)
def _fields_of(problem: Problem) -> ProblemFields:
    bins, rule = problem.bins, problem.rule
    return ProblemFields(
        bins=bins.size, low=bins.low, high=bins.high, half_life=problem.half_life,
        statistic=STATISTICS[rule.statistic], strength=rule.strength, smoothing=rule.smoothing,
        log_clip=math.log(rule.clip), prior=rule.prior, radius=rule.radius(bins), huber_delta=problem.huber_delta,
    )  # fmt: skip


def _checked(tensor: Tensor, dtype: torch.dtype, name: str, any_stride: bool = False) -> int:
    """The address of a tensor that has to be of that dtype and contiguous: the kernels do not check."""
    if tensor.dtype is not dtype or not (any_stride or tensor.is_contiguous()):
        raise TypeError(f"{name} is {tensor.dtype}, strides {tensor.stride()}, expected dense {dtype}")
    return tensor.data_ptr() or _freed(tensor, name)


def _freed(tensor: Tensor, name: str) -> NoReturn:
    raise TypeError(f"{name} {tuple(tensor.shape)} has no memory, expected a tensor whose storage was not freed")
