"""Triton's interpreter as the tests use it: it rounds like a GPU, and does once what it would do at each call."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import torch


@functools.cache
def round_like_a_gpu() -> None:
    """Triton's interpreter truncates float32 to bfloat16; hardware rounds to nearest, ties to even."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(np.array(data)).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, mode)

    interpreter._convert_float = rounding


@functools.cache
def read_arrays_of_one_element() -> None:
    """Triton before 3.7 calls int() on arrays of shape (1,): numpy before 2.5 warns, numpy 2.5 raises a TypeError."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, *scope: object) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patched


@functools.cache
def remember() -> None:
    """What would take half of a kernel's time: at each call of a @triton.jit function Triton looks through all of
    triton.language for its functions, which have the same names each time, and replaces them, also if the function's
    caller did that."""
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def names(package: object) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch(package: object, builder: object, *scope: object) -> None:
        found = names(package)
        if found and tl.core.is_builtin(getattr(package, found[0])):  # all or none of them are patched
            for name in found:
                interpreter._patch_attr(package, name, getattr(package, name), builder, *scope)

    interpreter._patch_builtin = patch
    patch_lang = interpreter._patch_lang

    @functools.cache
    def languages(function: Any) -> list:
        return [value for value in function.__globals__.values() if value is tl or value is tl.core]

    def patch_once(function: Any) -> object:
        found = languages(function)
        if found and all(language.static_print is print for language in found):
            return None  # of no use to the callee: the caller takes back what it patched
        return patch_lang(function)

    interpreter._patch_lang = patch_once
