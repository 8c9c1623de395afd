"""Launching a kernel without Triton's work for each launch, which takes longer than a small kernel runs.

Triton binds the arguments, finds out what each one is compiled for (the dtype and alignment of a pointer, None, an int
that is 1 or a multiple of 16), and makes a text of all that to look the compiled kernel up. Here the first launch of
its kind goes that way, and the compiled kernel that Triton returns is launched by itself from then on.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

# From 3.3 on a compiled kernel takes all arguments, constexprs too. For AMD it is made for the size of storages, too.
_REUSABLE = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3) and torch.version.hip is None
_KINDS = 4096  # of launches remembered per kernel; a kind has the sizes of the tensors in it


class Launcher:
    """Launches one kernel on the current device and stream.

    A kernel's options are given here, once. Triton's knobs count at the first launch of a kind, its hooks at every one.
    """

    def __init__(self, kernel: Any, **options: int) -> None:
        self._kernel = kernel
        self._options = options
        self._reusable = _REUSABLE and isinstance(kernel, triton.JITFunction)  # not interpreted
        self._names = tuple(inspect.signature(kernel.fn).parameters)
        self._compiled: dict[tuple[Any, ...], CompiledKernel] = {}

    def __call__(self, programs: int, **arguments: Any) -> None:
        """Launch `programs` programs. The arguments are all of the kernel's, by name."""
        if not self._reusable or self._kernel.pre_run_hooks:
            self._kernel[(programs,)](**arguments, **self._options)
            return
        values = [arguments[name] for name in self._names]
        device = driver.active.get_current_device()
        kind = (device, *map(_kind, values))
        compiled = self._compiled.get(kind)
        if compiled is not None:
            compiled[(programs, 1, 1)](*values, stream=driver.active.get_current_stream(device))
            return
        compiled = self._kernel[(programs,)](**arguments, **self._options)
        if isinstance(compiled, CompiledKernel):  # None where a hook of Triton's has taken over
            if len(self._compiled) >= _KINDS:
                self._compiled.clear()
            self._compiled[kind] = compiled


def _kind(value: Any) -> Any:
    """All of an argument that Triton may compile a kernel for; more of an int, which is all of it."""
    if value is None:
        return None
    of = type(value)
    if of is float:
        return float  # its value is never compiled in
    if of is int or of is str:
        return value
    if of is bool:
        return (bool, value)  # True equals 1
    return value.dtype if value.data_ptr() % 16 == 0 else (value.dtype, "unaligned")
