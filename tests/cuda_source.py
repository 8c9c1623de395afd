"""csrc/cuda.cu compiled for the CPU, with tests/cuda_emulation in place of CUDA: its logic, tested without a GPU."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "-std=c++17 -O2 -fPIC -fvisibility=hidden -Wno-psabi -Wno-unknown-pragmas -U_FORTIFY_SOURCE -DVADIFF_CUDA=emulated "
    "-DVADIFF_ISA=generic"
)


@functools.cache
def emulated_module(folder: Path) -> ModuleType:
    """`vadiff._native` whose CUDA kernels run on the CPU; compiled in `folder` by the first process that asks."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not (ROOT / "csrc").is_dir():
        pytest.skip("no C++ compiler, or no csrc/ beside the tests")
    pybind11 = pytest.importorskip("pybind11")
    includes = [ROOT / "tests/cuda_emulation", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    target = folder / "_native.so"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            flags = [*FLAGS.split(), *(f"-I{path}" for path in includes)]
            sources = ["cpu_rows.cpp", "cpu.cpp", "-O0 module.cpp", "-xc++ cuda.cu"]  # the module computes nothing
            compiling = [
                subprocess.Popen(
                    [compiler, *flags, "-c", *source.split(), "-o", str(folder / f"{i}.o")], cwd=ROOT / "csrc"
                )
                for i, source in enumerate(sources)
            ]
            assert not any([process.wait(timeout=300) for process in compiling]), "csrc/ did not compile"
            objects = [str(folder / f"{i}.o") for i in range(len(sources))]
            subprocess.run([compiler, "-shared", *objects, "-o", str(target)], check=True, timeout=300)
    spec = importlib.util.spec_from_loader(
        "_native", importlib.machinery.ExtensionFileLoader("_native", str(target)), origin=str(target)
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _OnDevice:
    """The module, called for a CUDA device only: a call for the CPU would test the CPU kernels."""

    def __init__(self, module: Any, call: type[ctypes.Structure]) -> None:
        self._module, self._call = module, call

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name not in ("step", "backward", "scale", "reweight", "fold"):
            return found

        def checked(address: int) -> None:
            device = self._call.from_address(address).device
            assert device >= 0, f"{name} was called for device {device}, expected a CUDA device"
            found(address)

        return checked


def emulate(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From here on the native backend runs the CUDA kernels, on CPU tensors."""
    from vadiff.ops import native

    module = emulated_module(folder)

    def place(call: native.Call, tensor: Tensor) -> Tensor:
        call.device = 0
        size = module.cuda_workspace_size(ctypes.addressof(call))
        workspace = torch.full((size,), torch.nan, dtype=torch.float64)  # scratch means nothing before a call
        call.workspace = workspace.data_ptr()
        return workspace

    monkeypatch.setattr(native, "_native", _OnDevice(module, native.Call))
    monkeypatch.setattr(native, "_place", place)
