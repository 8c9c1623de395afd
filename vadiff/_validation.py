"""Checks of arguments: each error says the argument, what was got, what was expected and what to do."""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import sys
from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import Tensor, strided

_NUMBERS = {str(kind) for kind in (int, float, bool)} | {"int", "float", "bool"}  # as annotations say it
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_elements(name: str, tensor: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Check that a tensor (target, noise) has the prediction's shape and device and needs no gradient."""
    _check_float(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}: the prediction's")
    if tensor.device != device:
        _refuse_device(name, tensor, device)
    if tensor.requires_grad:
        _refuse_gradient(name)


def check_log_snr(log_snr: Tensor) -> None:
    """Check that log-SNR is a float tensor: integers would be timesteps."""
    _check_float("log_snr", log_snr)


def check_prediction(name: str, prediction: Tensor) -> None:
    """Check that a tensor is non-empty, float, and has the batch as first dimension."""
    _check_float(name, prediction)
    if prediction.dim() == 0 or prediction.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(prediction.shape)}, expected (B, ...) with at least one element per sample"
        )


def check_per_sample(
    name: str, tensor: Tensor, samples: int, device: torch.device, dtype: torch.dtype, differentiable: bool = False
) -> Tensor:
    """Check that a tensor has one value per sample, [B]; return it contiguous, in `dtype`."""
    _check_float(name, tensor)
    if tensor.shape != (samples,):
        advice = f" Use {name}.flatten()." if tensor.numel() == samples and tensor.dim() != 0 else ""
        if tensor.shape == (2 * samples,):
            advice = f" With prior preservation, pass the half of these samples: {name}.chunk(2)[0]."
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected ({samples},): one value per sample.{advice}"
        )
    if tensor.device != device:
        _refuse_device(name, tensor, device)
    if tensor.requires_grad and not differentiable:
        _refuse_gradient(name)
    if tensor.dtype is dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()


def is_number(value: object) -> bool:
    """Whether `value` is a Python or NumPy real number, and not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def require_number(
    name: str, value: float, *, above: float = -math.inf, at_least: float = -math.inf, otherwise: str = ""
) -> float:
    """Check that a number is finite and in bounds; return it as a float. otherwise: the end of the error's text."""
    if not (is_number(value) and abs(value) <= sys.float_info.max and value > above and value >= at_least):
        bound = f" above {above:g}" if above > -math.inf else ""
        bound += f" of at least {at_least:g}" if at_least > -math.inf else ""
        raise ValueError(f"{name} is {value!r}, expected a finite number{bound}{otherwise}")
    return float(value)


def require_count(name: str, value: object, lowest: int) -> None:
    """Check that a value is an integer of at least `lowest`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {lowest}")


def require_known(name: str, value: object, known: Iterable[str]) -> None:
    """Check that a value is one of the known names; the error tells the closest one."""
    names = list(known)
    if value not in names:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(names)}{did_you_mean(value, names)}")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message that refuses a name: the known one that is closest to it, or nothing if none is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def number_options(made: type) -> tuple[str, ...]:
    """The arguments of a class that are numbers, which a command line or a config can give as NAME=NUMBER."""
    parameters = inspect.signature(made).parameters.values()
    return tuple(each.name for each in parameters if str(each.annotation).removesuffix(" | None") in _NUMBERS)


def _check_float(name: str, tensor: Tensor) -> None:
    if isinstance(tensor, Tensor) and tensor.dtype in FLOATS and tensor.layout is strided and not tensor.is_nested:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if name == "log_snr" and tensor.dtype not in FLOATS:
        raise TypeError(
            f"log_snr has dtype {tensor.dtype}, expected float32: ln(alpha**2/sigma**2) per sample. "
            "If these are timesteps, use vadiff.log_snr.from_alphas_cumprod(scheduler.alphas_cumprod, timesteps)."
        )
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, expected float32, bfloat16, float16 or float64. Use {name}.float()."
        )
    layout, dense = ("nested", "to_padded_tensor(0.0)") if tensor.is_nested else (tensor.layout, "to_dense()")
    raise TypeError(f"{name} has layout {layout}, expected a dense tensor. Use {name}.{dense}.")


def _refuse_device(name: str, tensor: Tensor, device: torch.device) -> NoReturn:
    raise ValueError(
        f"{name} is on {tensor.device}, expected {device}: the prediction's device. Use {name}.to({str(device)!r})."
    )


def _refuse_gradient(name: str) -> NoReturn:
    raise ValueError(f"{name} requires grad, but only prediction and base_weight get a gradient. Use {name}.detach().")
