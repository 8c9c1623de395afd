"""The compiled kernels of csrc/: the four functions of a backend, see `vadiff.ops.problem`.

CPU tensors in any float dtype, on `torch.get_num_threads()` threads; CUDA tensors where the module was built with nvcc.
Prediction, target and noise share one dense layout with the batch outermost: `vadiff.ops.operators` sees to that.
csrc/ knows no torch: it gets the address of a `Call`, which holds addresses and numbers.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from ctypes import c_double, c_int64
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .. import _native
from .problem import BATCH_TOTALS, Gather, Inputs, Problem, State, Step, compute_dtype

INTERFACE = 12  # kInterface of csrc/module.cpp: one more there and here when what is called there changes

if getattr(_native, "INTERFACE", None) != INTERFACE:
    raise ImportError(
        f"{_native.__file__} was compiled from another version of vadiff: its interface is "
        f"{getattr(_native, 'INTERFACE', 'not numbered')}, expected {INTERFACE}"
    )

CUDA_ARCHITECTURES: str | None = _native.cuda_architectures  # None: built without CUDA

# enum Dtype and enum Statistic in csrc/loss_math.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
STATISTICS = {"": 0, "std": 1, "mean": 2, "rms": 3}


def _named(kind: type, names: str) -> list[tuple[str, type]]:
    """Fields of a struct: `c_double`, or `c_int64` for addresses and whole numbers."""
    return [(name, kind) for name in names.split()]


class ProblemFields(ctypes.Structure):
    """`struct ProblemFields` of csrc/call.h."""

    __slots__ = ()
    _fields_ = [
        *_named(c_int64, "bins"), *_named(c_double, "low high half_life"), *_named(c_int64, "statistic"),
        *_named(c_double, "strength smoothing log_clip prior"), *_named(c_int64, "radius"),
        *_named(c_double, "huber_delta"),
    ]  # fmt: skip


class Call(ctypes.Structure):
    """`struct Call` of csrc/call.h, which says what each field is. 0 stands for "not given"."""

    __slots__ = ()  # a misspelt field raises
    _fields_ = [
        ("problem", ProblemFields),
        *_named(c_int64, "device threads stream workspace"),
        *_named(c_int64, "samples elements prediction prediction_dtype target target_dtype noise noise_dtype"),
        *_named(c_int64, "a_each b_each c_each"), *_named(c_double, "a b c"),
        *_named(c_int64, "log_snr base_weight sample_weight weight mean"),
        *_named(c_int64, "state log_weights update batch"),
        *_named(c_int64, "loss per_sample gradient factors"),
        *_named(c_int64, "upstream upstream_stride gathered ranks"),
    ]  # fmt: skip


if ctypes.sizeof(Call) != _native.CALL_SIZE:
    raise ImportError(f"{_native.__file__} reads a call of {_native.CALL_SIZE} bytes, expected {ctypes.sizeof(Call)}")


def instruction_set() -> str:
    """What the CPU kernels use on this processor: "avx2" or "generic"."""
    best: str = _native.cpu_instruction_sets()[0]
    return best


def step(
    problem: Problem, inputs: Inputs, state: State, *, gradient: bool, update: bool, gather: Gather | None
) -> Step:
    """See `vadiff.ops.reference.step`."""
    prediction, plan = inputs.prediction, inputs.plan
    if plan is None:
        call = _call(_blank(problem, inputs), inputs)
        like = prediction if prediction.dtype is torch.float64 else inputs.log_snr  # of the compute dtype
        per_sample = like.new_empty(4, call.samples)  # sizes as a tuple take 0.3 µs more
        loss = like.new_empty(()) if inputs.mean else like.new_empty(call.samples)
    else:
        prepared: _Prepared | None = plan.prepared
        if prepared is None:
            prepared = plan.prepared = _prepare(problem, inputs)
        call = _call(prepared.call, inputs)
        per_sample = torch.empty_like(prepared.per_sample)
        loss = torch.empty_like(prepared.mean if inputs.mean else prepared.losses)
    made = torch.empty_like(prediction) if gradient else prediction.new_empty(0)
    call.loss = loss.data_ptr()
    call.per_sample = per_sample.data_ptr()
    call.gradient = made.data_ptr()
    _run(_native.step, call, problem, state, update, gather)
    return tuple.__new__(Step, (loss, per_sample, made))


def backward(problem: Problem, inputs: Inputs, per_sample: Tensor, upstream: Tensor) -> Tensor:
    """See `vadiff.ops.reference.backward`. A saved-tensor hook may have changed `per_sample` and coefficients."""
    prediction = inputs.prediction
    call = _call(_blank(problem, inputs), inputs)
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


def scale(gradient: Tensor, upstream: Tensor) -> None:
    """See `vadiff.ops.reference.scale`."""
    call = _copy_call(_EMPTY)
    call.prediction_dtype = DTYPES[gradient.dtype]
    call.elements = gradient.numel()
    call.gradient = gradient.data_ptr() or _freed(gradient, "gradient")
    call.upstream = _checked(upstream, compute_dtype(gradient), "upstream")
    call.threads = torch.get_num_threads()
    _place(call, gradient)
    _native.scale(ctypes.addressof(call))


def reweight(problem: Problem, inputs: Inputs, state: State, *, update: bool, gather: Gather | None) -> Tensor:
    """See `vadiff.ops.reference.reweight`."""
    loss = inputs.prediction
    call = _call(_blank(problem, inputs), inputs)
    factors = loss.new_empty(loss.shape)
    call.factors = factors.data_ptr()
    _run(_native.reweight, call, problem, state, update, gather)
    return factors


def _run(
    kernel: Callable[[int], None], call: Call, problem: Problem, state: State, update: bool, gather: Gather | None
) -> None:
    """Run a kernel that reads the state, and moves it with `update`, on the state's device.

    With `gather` the kernel leaves the batch statistics to it, and those of all ranks [ranks, 4K + 5] are folded."""
    call.state = state.state.data_ptr() or _freed(state.state, "statistics.state")
    call.log_weights = state.log_weights.data_ptr() or _freed(state.log_weights, "statistics.log_weights")
    call.update = update
    if gather is not None:
        batch = state.state.new_empty(4 * problem.bins.size + len(BATCH_TOTALS), dtype=torch.float64)
        call.batch = batch.data_ptr()
    _workspace = _place(call, state.state)
    kernel(ctypes.addressof(call))
    if gather is None:
        return
    gathered = gather(batch)
    fold = _copy_call(_blank_of(problem))
    fold.state, fold.log_weights, fold.update = call.state, call.log_weights, True
    fold.gathered = _checked(gathered, torch.float64, "gathered statistics")
    fold.ranks = gathered.shape[0]
    _workspace = _place(fold, gathered)
    _native.fold(ctypes.addressof(fold))


def _call(blank: bytes, inputs: Inputs) -> Call:
    """A blank call, filled with what the inputs give."""
    prediction, target, noise, a, b, c, log_snr, base_weight, sample_weight, weight, mean, _ = inputs
    call = _copy_call(blank)  # setting a field takes 0.02 µs, an argument of Call(...) four times as long
    call.prediction = prediction.data_ptr() or _freed(prediction, "prediction")
    call.mean = mean
    call.threads = torch.get_num_threads()
    if log_snr is not None:  # a backward has none
        call.log_snr = log_snr.data_ptr() or _freed(log_snr, "log_snr")
    if target is not None:
        call.target = target.data_ptr() or _freed(target, "target")
    if noise is not None:
        call.noise = noise.data_ptr() or _freed(noise, "noise")
    if base_weight is not None:
        call.base_weight = base_weight.data_ptr() or _freed(base_weight, "base_weight")
    if sample_weight is not None:
        call.sample_weight = sample_weight.data_ptr() or _freed(sample_weight, "sample_weight")
    if weight is not None:
        call.weight = weight.data_ptr() or _freed(weight, "weighting(log_snr)")
    if type(a) is type(b) is type(c) is float:
        call.a, call.b, call.c = a, b, c
    else:
        for name, value in (("a", a), ("b", b), ("c", c)):
            if isinstance(value, float):
                setattr(call, name, value)
            else:
                setattr(call, f"{name}_each", _checked(value, compute_dtype(prediction), f"coefficients {name}"))
    return call


class _Prepared(NamedTuple):
    """What the steps of a plan have in common."""

    call: bytes
    # Tensors like the results, because `empty_like` takes half the time of `new_empty`.
    mean: Tensor
    losses: Tensor
    per_sample: Tensor


def _prepare(problem: Problem, inputs: Inputs) -> _Prepared:
    prediction = inputs.prediction
    results = torch.empty(4, len(prediction), dtype=compute_dtype(prediction), device=prediction.device)
    return _Prepared(_blank(problem, inputs), results[0, 0], results[0], results)


def _place(call: Call, tensor: Tensor) -> Tensor | None:
    """Have a call run where its tensors are. Returns scratch memory of a CUDA device, if the call needs some.

    It is to be kept until the kernels are launched; the allocator reuses it in the order of the stream."""
    if tensor.is_cpu:
        return None  # a new call is one for the CPU
    call.device = tensor.get_device()
    call.stream = torch.cuda.current_stream(call.device).cuda_stream
    size = _native.cuda_workspace_size(ctypes.addressof(call))
    if not size:
        return None
    workspace = torch.empty(size, device=tensor.device, dtype=torch.float64)
    call.workspace = workspace.data_ptr()
    return workspace


_copy_call: Callable[[bytes], Call] = Call.from_buffer_copy
_EMPTY = bytes(Call(device=-1))  # on the CPU


def _blank(problem: Problem, inputs: Inputs) -> bytes:
    """A call with all but the addresses and what may change between two calls that look alike."""
    prediction = inputs.prediction
    call = _copy_call(_blank_of(problem))
    call.samples = samples = prediction.shape[0]
    call.elements = prediction.numel() // samples
    call.prediction_dtype = DTYPES[prediction.dtype]
    if inputs.target is not None:
        call.target_dtype = DTYPES[inputs.target.dtype]
    if inputs.noise is not None:
        call.noise_dtype = DTYPES[inputs.noise.dtype]
    return bytes(call)


@functools.lru_cache(maxsize=64)
def _blank_of(problem: Problem) -> bytes:
    bins, rule = problem.bins, problem.rule
    fields = ProblemFields(
        bins=bins.size, low=bins.low, high=bins.high, half_life=problem.half_life,
        statistic=STATISTICS[rule.statistic], strength=rule.strength, smoothing=rule.smoothing,
        log_clip=math.log(rule.clip), prior=rule.prior, radius=rule.radius(bins), huber_delta=problem.huber_delta,
    )  # fmt: skip
    return bytes(Call(problem=fields, device=-1))


def _checked(tensor: Tensor, dtype: torch.dtype, name: str, any_stride: bool = False) -> int:
    """The address of a tensor that has to be of that dtype and contiguous: the kernels do not check."""
    if tensor.dtype is not dtype or not (any_stride or tensor.is_contiguous()):
        raise TypeError(f"{name} is {tensor.dtype}, strides {tensor.stride()}, expected dense {dtype}")
    return tensor.data_ptr() or _freed(tensor, name)


def _freed(tensor: Tensor, name: str) -> NoReturn:
    raise TypeError(f"{name} {tuple(tensor.shape)} has no memory, expected a tensor whose storage was not freed")
