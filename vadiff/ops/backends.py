"""Which implementation runs a call: "auto", "reference", "native" (csrc/) or "triton".

An argument other than "auto" wins over the environment variable VADIFF_BACKEND, which wins over "auto". The choice is
made at call time, and kept for calls that look alike (`vadiff.ops.plan`) and in a captured CUDA graph. "auto" takes
native where it is built for the device, else, on CUDA devices, Triton, else the reference; a backend requested by name
that cannot run raises, with the command that fixes it.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._validation import require_known
from . import reference

BACKENDS = ("auto", "reference", "native", "triton")
ENVIRONMENT_VARIABLE = "VADIFF_BACKEND"

# What "auto" takes, by type of device, best first; then the reference. CUDA's order is an estimate, not measured yet:
# forward, native has one launch, Triton two after more Python. The benchmarks print what a measured choice would be.
_PREFERRED = {"cpu": ("native",), "cuda": ("native", "triton")}
_BUILD = (
    "Build them, with a C++ compiler and in the folder of vadiff's source: pip install --force-reinstall --no-deps ."
)

# The dictionary under os.environ: for a missing variable os.environ itself raises and catches two exceptions, which
# takes 2 µs, and 6 µs in a training step, where its code is not in the cache.
variables: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
KEY = ENVIRONMENT_VARIABLE if variables is os.environ else os.environ.encodekey(ENVIRONMENT_VARIABLE)

logger = logging.getLogger(__name__)


def select(backend: str, tensor: Tensor) -> ModuleType:
    """The module whose functions run a call on `tensor` (the prediction, the per-sample losses, or a gradient).

    Raises:
        ValueError: the environment variable names no backend.
        RuntimeError: a backend requested by name cannot run the call; the message says why and how to fix it.
    """
    if backend == "auto" and KEY in variables:
        backend = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        require_known(f"the environment variable {ENVIRONMENT_VARIABLE}", backend, BACKENDS)
    found = _chosen(backend, tensor.device, tensor.dtype)
    if isinstance(found, Obstacle):
        raise RuntimeError(f"backend {backend!r} cannot run this call: {found}") from found.__cause__
    return found


def backend_report() -> dict[str, tuple[bool, str]]:
    """For each backend, whether it can run on this machine, and for which tensors or why not."""
    return {
        "reference": (True, "any device, plain PyTorch"),
        "native": _native_report(),
        "triton": _triton_report(),
    }


def automatic(device: torch.device) -> str:
    """The backend that "auto" takes for float32 tensors of a device."""
    for name in _PREFERRED.get(device.type, ()):
        if not isinstance(_usable(name, device, torch.float32), Obstacle):
            return name
    return "reference"


@functools.lru_cache(maxsize=64)
def _chosen(backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType | Obstacle:
    """The module of a backend, or why it cannot run there; for "auto" the first preferred one that can run."""
    if backend == "reference":
        return reference
    if backend != "auto":
        return _usable(backend, device, dtype)
    for name in _PREFERRED.get(device.type, ()):
        kernels = _usable(name, device, dtype)
        if not isinstance(kernels, Obstacle):
            return kernels
        logger.debug("vadiff does not use the backend %r: %s", name, kernels)
    return reference


class Obstacle(Exception):
    """Why a backend cannot run, and how to fix it; `__cause__` is the error, if there was one."""

    def __init__(self, why: str, cause: Exception | None = None) -> None:
        super().__init__(why)
        self.__cause__ = cause


def _usable(backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType | Obstacle:
    """The backend's module if it can run a call on tensors of that device and dtype."""
    kernels = load_native() if backend == "native" else _load_triton()
    if isinstance(kernels, Obstacle):
        return kernels
    why_not = native_obstacle(kernels, device) if backend == "native" else _triton_obstacle(kernels, device, dtype)
    return kernels if why_not is None else Obstacle(why_not)


def native_obstacle(kernels: ModuleType, device: torch.device) -> str | None:
    """Why the native kernels do not run on tensors of a device; None where they do."""
    if device.type == "cpu":
        return None
    if device.type == "cuda" and kernels.CUDA_ARCHITECTURES:
        return _architecture_obstacle(kernels.CUDA_ARCHITECTURES, torch.cuda.get_device_capability(device))
    if device.type == "cuda":
        return f"the tensors are on {device}, and the native kernels were built for CPUs only. {native_build()}"
    return f"the tensors are on {device}, and the native kernels run on CPUs and CUDA devices"


def _architecture_obstacle(built: str, capability: tuple[int, int]) -> str | None:
    """Why kernels compiled for `built`, as "sm_80+sm_90", the last one as PTX too, do not run on a GPU."""
    major, minor = capability
    compiled = [divmod(int(name.removeprefix("sm_")), 10) for name in built.split("+")]
    if capability >= compiled[-1] or any(major == m and minor >= n for m, n in compiled):
        return None
    return (
        f"the GPU has compute capability {major}.{minor}, and the native kernels were built for {built}. Build them "
        f"again with VADIFF_CUDA_ARCHITECTURES={major}{minor}"
    )


def _native_report() -> tuple[bool, str]:
    kernels = load_native()
    if isinstance(kernels, Obstacle):
        return False, str(kernels)
    instructions = kernels.instruction_set()
    if kernels.CUDA_ARCHITECTURES:
        runs = f"CPU tensors ({instructions}) and CUDA tensors ({kernels.CUDA_ARCHITECTURES}), all float dtypes"
        return True, f"{runs}. {_build_note()}" if _build_note() else runs
    return True, f"CPU tensors ({instructions}), all float dtypes. {native_build()}"


def _triton_obstacle(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "it computes in float32, and the tensors are float64. Use backend='auto', or cast the prediction"
    if device.type != "cuda" and not kernels.INTERPRETED:
        return (
            f"its tensors are on {device}, and Triton kernels run on CUDA devices. Move them there, or set "
            "TRITON_INTERPRET=1 before triton is imported (slow, for tests)"
        )
    return None


def _triton_report() -> tuple[bool, str]:
    kernels = _load_triton()
    if isinstance(kernels, Obstacle):
        return False, str(kernels)
    if kernels.INTERPRETED:
        return True, "interpreted (TRITON_INTERPRET=1): for tests, slow"
    if torch.cuda.is_available():
        return True, "CUDA tensors in float32, bfloat16 and float16"
    if torch.version.cuda is None and torch.version.hip is None:
        return False, "this torch is a build for CPUs; with an NVIDIA GPU, get the CUDA build from pytorch.org"
    return False, "no CUDA device is visible to torch (torch.cuda.is_available() is False)"


def native_build() -> str:
    """How to build the missing native kernels: the note of setup.py, or the general command."""
    return _build_note() or _BUILD


def _build_note() -> str:
    """The note of setup.py on kernels that it did not build; "" if there is none."""
    note = Path(__file__).parent.with_name("_native_build.txt")
    return note.read_text().strip() if note.exists() else ""


@functools.cache
def load_native() -> ModuleType | Obstacle:
    """The native kernels, or why they cannot be loaded; cached."""
    try:
        importlib.import_module("vadiff._native")  # first: only this error says that it is missing
        return importlib.import_module("vadiff.ops.native")
    except ModuleNotFoundError as error:
        return Obstacle(f"the native kernels are not built. {native_build()}", error)
    except ImportError as error:
        return Obstacle(f"the native kernels did not load ({error}). {_BUILD}", error)


@functools.cache
def _load_triton() -> ModuleType | Obstacle:
    """The Triton kernels, or why they cannot be loaded; cached."""
    try:
        return importlib.import_module("vadiff.triton_kernels")
    except ImportError as error:
        missing = getattr(error, "name", None) == "triton"
        package = "triton" if missing else "--force-reinstall vadiff"
        return Obstacle(f"the Triton kernels did not load ({error}). Install: pip install {package}", error)
