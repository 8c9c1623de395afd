"""Which implementation runs a call: "auto", "reference" or "triton".

An argument other than "auto" wins over the environment variable VADIFF_BACKEND, which wins over "auto". It is
decided at call time, inside the operators; a captured CUDA graph keeps what it was captured with. "auto" takes the
fused kernels where they can run and the reference elsewhere; a backend asked for by name that cannot run raises,
with the command that mends it.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from . import reference

BACKENDS = ("auto", "reference", "triton")
ENVIRONMENT_VARIABLE = "VADIFF_BACKEND"

logger = logging.getLogger(__name__)


def check_name(backend: str, argument: str = "backend") -> None:
    """Raise ValueError unless `backend` is one of BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"{argument} is {backend!r}, expected one of {', '.join(BACKENDS)}")


def select(backend: str, tensor: Tensor) -> ModuleType:
    """The module whose functions run a call on `tensor` (the network's output, or the per-sample loss)."""
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        check_name(backend, f"the environment variable {ENVIRONMENT_VARIABLE}")
    if backend == "reference" or (backend == "auto" and tensor.device.type != "cuda"):
        return reference
    obstacle = _triton_obstacle(tensor)
    if obstacle is None:
        kernels = _load_triton()
        assert isinstance(kernels, ModuleType)
        return kernels
    if backend == "triton":
        raise RuntimeError(f"backend 'triton' cannot run this call: {obstacle}")
    _say_once(f"vadiff runs on the reference backend: {obstacle}")
    return reference


def backend_report() -> dict[str, tuple[bool, str]]:
    """For each backend, whether it can run on this machine, and why not (or where it does)."""
    kernels = _load_triton()
    if isinstance(kernels, str):
        usable, remark = False, kernels
    elif kernels.INTERPRETED:
        usable, remark = True, "interpreted (TRITON_INTERPRET=1): for tests, slow"
    elif torch.cuda.is_available():
        usable, remark = True, "CUDA tensors in float32, bfloat16 and float16"
    elif torch.version.cuda is None and torch.version.hip is None:
        usable, remark = (
            False,
            "this torch is a build for CPUs; with an NVIDIA GPU, get the CUDA build from pytorch.org",
        )
    else:
        usable, remark = False, "no CUDA device is visible to torch (torch.cuda.is_available() is False)"
    return {"reference": (True, "any device, plain PyTorch"), "triton": (usable, remark)}


def _triton_obstacle(tensor: Tensor) -> str | None:
    if tensor.dtype == torch.float64:
        return (
            "float64 is computed by the reference backend only. Use backend='auto', or cast the prediction to float32"
        )
    kernels = _load_triton()
    if isinstance(kernels, str):
        return kernels
    if tensor.device.type != "cuda" and not kernels.INTERPRETED:
        return (
            f"its tensors are on {tensor.device}, and Triton kernels run on CUDA devices. Move them there, or set "
            "TRITON_INTERPRET=1 before triton is imported (slow, for tests)"
        )
    return None


@functools.cache
def _load_triton() -> ModuleType | str:
    """The kernels, or why they cannot be loaded; tried once."""
    try:
        return importlib.import_module("vadiff.triton_kernels")
    except ImportError as error:
        missing = getattr(error, "name", None) == "triton"
        mend = (
            "Install it with: pip install triton"
            if missing
            else "Reinstall vadiff: pip install --force-reinstall vadiff"
        )
        return f"the Triton kernels did not load ({error}). {mend}"


@functools.cache
def _say_once(message: str) -> None:
    logger.debug(message)
