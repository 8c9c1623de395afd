"""Tensors in a pickle: storages decoded by hand, and placeholders that become tensors after the pickle has ended.

A tensor that is pickled without `torch.save` refers to its numbers as bytes that `torch.save` made in its legacy
format: five pickles (magic number, version, facts about the machine, the storage's type and size, the list of storages)
and then the numbers. `torch.load` would read them too, but it was found to run code from such bytes in torch up to 2.5,
and it allocates what the file says before it looks for the numbers.
"""

from __future__ import annotations

import io
import math
import pickle
import reprlib
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.pickle_scan import UnsafePickleError, check

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # of torch's legacy format
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_HEADERS = 5  # pickles before the numbers
_COUNT = 8  # bytes of the number of elements before the numbers


class Storage(NamedTuple):
    """The numbers of tensors."""

    flat: Tensor  # [n]

    def __setstate__(self, state: Any) -> None:
        raise UnsafePickleError("it changes the numbers of a tensor")


def storage(content: Any) -> Storage:
    """The storage in bytes of torch's legacy format.

    Raises:
        UnsafePickleError: anything else is in them.
    """
    if type(content) is not bytes:
        raise UnsafePickleError(f"it fills a tensor from {type(content).__name__}, expected bytes")
    stream = io.BytesIO(content)
    header = [_checked(stream).load() for _ in range(_HEADERS)]
    magic, version, _, described, keys = header
    if (magic, version) != (_MAGIC, _VERSION) or type(described) is not _Described or keys != [described.key]:
        raise UnsafePickleError("it fills a tensor from bytes that are not one storage in torch's legacy format")
    start = stream.tell() + _COUNT
    number = int.from_bytes(content[stream.tell() : start], "little")
    expected = described.number * described.dtype.itemsize
    if number != described.number or len(content) - start != expected:
        raise UnsafePickleError(f"it fills a tensor of {expected} bytes with {max(0, len(content) - start)}")
    if not described.number:
        return Storage(torch.empty(0, dtype=described.dtype))
    with warnings.catch_warnings():  # not a copy: a file may have many tensors refer to the same bytes
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return Storage(torch.frombuffer(content, dtype=described.dtype, offset=start))


class _Described(NamedTuple):
    dtype: torch.dtype
    key: str
    number: int  # of elements


class _StorageUnpickler(pickle.Unpickler):
    """Reads the pickles before the numbers: of text, numbers and mappings, and the description of a storage."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return name
        raise UnsafePickleError(f"it asks for {module}.{name} in place of a tensor's numbers")

    def persistent_load(self, pid: Any) -> Any:
        # "storage", its type, its name, its device, its size, and a view of it, which torch no longer writes.
        if type(pid) is not tuple or len(pid) != 6 or pid[0] != "storage" or pid[5] is not None:
            raise UnsafePickleError("it refers to objects outside of itself")
        kind, key, number = pid[1], pid[2], pid[4]
        if type(kind) is not str or kind not in _DTYPES or type(key) is not str or type(number) is not int:
            raise UnsafePickleError(f"it asks for a storage of {reprlib.repr(kind)}, expected numbers")
        return _Described(_DTYPES[kind], key, number)


def _checked(stream: io.BytesIO) -> _StorageUnpickler:
    check(stream)
    return _StorageUnpickler(stream)


class PickledTensor:
    """Placeholder of a tensor."""

    __slots__ = ("_offset", "_shape", "_storage", "_stride")

    def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any, *unused: Any) -> None:
        whole = (offset, *shape, *stride) if type(shape) is tuple and type(stride) is tuple else (None,)
        if type(storage) is not Storage or not all(type(size) is int and size >= 0 for size in whole):
            raise UnsafePickleError("it asks for a tensor of something other than numbers, shape and strides")
        number = len(storage.flat)
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if math.prod(shape) > number or (math.prod(shape) and last >= number):
            raise UnsafePickleError(f"it asks for a tensor of shape {shape} in {number} numbers")
        self._storage, self._offset, self._shape, self._stride = storage, offset, shape, stride

    def __setstate__(self, state: Any) -> None:
        raise UnsafePickleError("it changes a tensor")

    def real(self) -> Tensor:
        """The tensor, a view of its storage."""
        return self._storage.flat.as_strided(self._shape, self._stride, self._offset)
