"""The compiled kernels of csrc/: the four functions of `vadiff.reference`, with the same arguments in the same order.

CPU tensors in any float dtype, on `torch.get_num_threads()` threads; CUDA tensors where the module was built with nvcc.
Inputs are validated, and output, target and noise share one dense layout with the batch outermost (`vadiff.ops` sees to
it). Nothing here but addresses and sizes: csrc/ knows no torch.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from . import _native
from .reference import Bins, Coefficient, Gather, TableRule, compute_dtype

INTERFACE = 6  # kInterface of csrc/module.cpp: one more there and here when what is called there changes

if getattr(_native, "INTERFACE", None) != INTERFACE:
    raise ImportError(
        f"{_native.__file__} was compiled from another version of vadiff: its interface is "
        f"{getattr(_native, 'INTERFACE', 'not numbered')}, expected {INTERFACE}"
    )

CUDA_ARCHITECTURES: str | None = _native.cuda_architectures  # None: built without CUDA

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # enum Dtype in csrc/loss_math.h


def instruction_set() -> str:
    """What the CPU kernels run on this processor: "avx512", "avx2" or "generic"."""
    name: str = _native.cpu_selected()
    return name


@functools.lru_cache(maxsize=64)
def settings_of(bins: Bins, half_life: float, rule: TableRule) -> Any:
    return _native.Settings(
        bins.size, bins.low, bins.high, half_life, rule.statistic, rule.strength, rule.smoothing, math.log(rule.clip),
        rule.prior, rule.radius(bins),
    )  # fmt: skip


def _address(tensor: Tensor | None, dtype: torch.dtype, name: str = "a tensor") -> int:
    """Of a contiguous tensor of that dtype: the kernels believe what they are told."""
    if tensor is None:
        return 0
    address = _memory_of(tensor, name)
    if tensor.dtype != dtype or not tensor.is_contiguous():
        raise TypeError(f"{name} is {tensor.dtype}, strides {tensor.stride()}, expected dense {dtype}")
    return address


def _address_and_dtype(tensor: Tensor | None, name: str) -> tuple[int, int]:
    return (0, 0) if tensor is None else (_memory_of(tensor, name), DTYPES[tensor.dtype])


def _memory_of(tensor: Tensor, name: str) -> int:
    address = tensor.data_ptr()
    if not address:
        raise TypeError(f"{name} {tuple(tensor.shape)} has no memory, expected a tensor whose storage was not freed")
    return address


def _each_and_number(coefficient: Coefficient, dtype: torch.dtype) -> tuple[int, float]:
    return (_address(coefficient, dtype), 0.0) if isinstance(coefficient, Tensor) else (0, coefficient)


def _inputs(
    output: Tensor,
    target: Tensor | None,
    noise: Tensor | None,
    a: Coefficient,
    b: Coefficient,
    c: Coefficient,
    huber_delta: float,
) -> Any:
    dtype = compute_dtype(output)
    a_each, a = _each_and_number(a, dtype)
    b_each, b = _each_and_number(b, dtype)
    c_each, c = _each_and_number(c, dtype)
    return _native.Inputs(
        *_address_and_dtype(output, "prediction"), *_address_and_dtype(target, "target"),
        *_address_and_dtype(noise, "noise"), a_each, b_each, c_each, a, b, c, huber_delta,
        output.numel() // output.shape[0],
    )  # fmt: skip


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
    with_gradient: bool,
    update: bool,
    gather: Gather | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `vadiff.reference.diffusion_loss`."""
    samples = output.shape[0]
    dtype = compute_dtype(output)
    like = output if output.dtype == dtype else output.new_empty(0, dtype=dtype)
    settings = settings_of(bins, half_life, rule)
    gradient = torch.empty_like(output) if with_gradient else output.new_empty(0)
    loss = like.new_empty(() if mean else samples)
    ell = like.new_empty(samples)
    saved = like.new_empty(2 * samples + 1)
    batch = None if gather is None or not update else state.new_empty(4 * bins.size + 1, dtype=torch.float64)
    where, _workspace = _where(output, samples, output.numel() // samples, bins.size)
    _native.diffusion_loss(
        _inputs(output, target, noise, a, b, c, huber_delta), _address(log_snr, torch.float32, "log_snr"),
        _address(base_weight, dtype, "base_weight"), _address(sample_weight, dtype, "sample_weight"),
        _address(weight, dtype, "weighting(log_snr)"),
        state.data_ptr(), log_weights.data_ptr(), settings, samples, loss.data_ptr(), mean, ell.data_ptr(),
        saved.data_ptr(), gradient.data_ptr() if with_gradient else 0, update,
        0 if batch is None else batch.data_ptr(), where,
    )  # fmt: skip
    if batch is not None:
        _fold(gather, batch, state, log_weights, settings, bins)
    return loss, ell, saved, gradient


def diffusion_loss_backward(
    upstream: Tensor,
    saved: Tensor,
    output: Tensor,
    target: Tensor | None,
    noise: Tensor | None,
    a: Coefficient,
    b: Coefficient,
    c: Coefficient,
    huber_delta: float,
) -> Tensor:
    """See `vadiff.reference.diffusion_loss_backward`."""
    gradient = torch.empty_like(output)
    mean = upstream.dim() == 0
    where, _ = _where(output)
    _native.diffusion_loss_backward(
        _inputs(output, target, noise, a, b, c, huber_delta), upstream.data_ptr(), 0 if mean else upstream.stride(0),
        mean, saved.data_ptr(), output.shape[0], gradient.data_ptr(), where,
    )  # fmt: skip
    return gradient


def scale_gradient(gradient: Tensor, upstream: Tensor, saved: Tensor, out: Tensor) -> None:
    """See `vadiff.reference.scale_gradient`."""
    where, _ = _where(gradient)
    dtype = compute_dtype(gradient)
    _native.scale_gradient(
        gradient.data_ptr(), out.data_ptr(), DTYPES[gradient.dtype], gradient.numel(), _address(upstream, dtype),
        _address(saved, dtype) + (saved.shape[0] - 1) * saved.element_size(), where,
    )  # fmt: skip


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
    gather: Gather | None,
) -> Tensor:
    """See `vadiff.reference.reweight`."""
    settings = settings_of(bins, half_life, rule)
    saved = torch.empty(2 * len(loss) + 1, device=loss.device, dtype=loss.dtype)
    batch = None if gather is None or not update else state.new_empty(4 * bins.size + 1, dtype=torch.float64)
    where, _workspace = _where(loss, len(loss), 1, bins.size)
    _native.reweight(
        _address(loss, loss.dtype), DTYPES[loss.dtype], _address(log_snr, torch.float32),
        _address(sample_weight, loss.dtype), _address(weight, loss.dtype), _address(state, torch.int64),
        _address(log_weights, torch.int32), settings, len(loss), saved.data_ptr(), update,
        _address(batch, torch.float64), where,
    )  # fmt: skip
    if batch is not None:
        _fold(gather, batch, state, log_weights, settings, bins)
    return saved[: len(loss)]


def _fold(gather: Gather | None, batch: Tensor, state: Tensor, log_weights: Tensor, settings: Any, bins: Bins) -> None:
    assert gather is not None
    everyone = gather(batch)
    where, _workspace = _where(batch, 0, 1, bins.size)
    _native.fold(everyone.data_ptr(), len(everyone), state.data_ptr(), log_weights.data_ptr(), settings, where)


def _where(tensor: Tensor, samples: int = 0, elements: int = 0, bins: int = 0) -> tuple[Any, Tensor | None]:
    """Where a call runs: a number of threads, or a device, its current stream and scratch memory (if `elements`).

    The second is that memory, to be kept until the call returns; the allocator reuses it in the order of the stream."""
    if tensor.device.type != "cuda":
        return torch.get_num_threads(), None
    device = tensor.get_device()
    workspace = None
    if elements:
        size = _native.cuda_workspace_size(samples, elements, bins, device)
        workspace = torch.empty(size, device=tensor.device, dtype=torch.float64)
    stream = torch.cuda.current_stream(device).cuda_stream
    return _native.Where(device, stream, _address(workspace, torch.float64)), workspace
