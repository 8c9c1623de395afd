"""An unpickler that builds nothing but NumPy arrays of numbers and plain containers.

A pickle is a program; reading one with `pickle.load` runs whatever its author put in. CIFAR's python layout is pickled.
The pickle never gets NumPy's objects, as their constructors trust buffers and formats and write where those say. It
gets placeholders, which check their arguments; arrays are made of them after the pickle has ended.
"""

import io
import math
import pickle
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from .pickle_scan import UnsafePickleError, check

_NUMBERS = re.compile("b1|[iu][1248]|f[248]")
_SHARED = 64  # bytes that several arrays may be filled from: Python has short ones once
_BYTE_ORDERS = ("|", "=", "<", ">")
_PLAIN = (bytes, str, int, float, complex, bool, type(None))


def load_arrays(content: bytes) -> Any:
    """The object in a pickle that holds arrays of numbers, lists, tuples, mappings, text, bytes and numbers only.

    Pickles of Python 2 are read with their text as bytes, as `encoding="bytes"` does.

    Raises:
        UnsafePickleError: the pickle asks for anything else, which was not run.
        Exception: the pickle is broken; `pickle` raises almost any kind.
    """
    file = io.BytesIO(content)
    check(file)
    return with_arrays(ArrayUnpickler(file, encoding="bytes").load(), {})


class ArrayUnpickler(pickle.Unpickler):
    """Makes placeholders of arrays, which `with_arrays` replaces, and of what a subclass allows besides.

    Attributes:
        further: (module, name) → what a pickle gets in place of it, for subclasses.
    """

    further: ClassVar[Mapping[tuple[str, str], Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        for allowed in (_ALLOWED, self.further):
            if (module, name) in allowed:
                return allowed[module, name]
        raise UnsafePickleError(f"it asks for {module}.{name}, which a data file has no use for")

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError("it refers to objects outside of itself")


class _NDArray:
    """Placeholder of the class numpy.ndarray: can be referenced, not called or changed."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise UnsafePickleError("it changes a class or a function")


class Function(_NDArray):
    """A function that a pickle can call but not change: on a plain one a pickle could set attributes."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class EasyDict(dict[Any, Any]):
    """Placeholder of NVlabs' mapping with attributes: a mapping, whose class and attributes a pickle cannot change."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise UnsafePickleError("it sets attributes of a mapping")


class DType:
    """Placeholder of a dtype."""

    __slots__ = ("_order", "name")

    def __init__(self, name: Any, *flags: Any) -> None:  # copyreg's flags
        name = name.decode("latin1") if type(name) is bytes else name
        if type(name) is not str or not _NUMBERS.fullmatch(name):
            raise UnsafePickleError(f"it asks for an array of {_short(name)}, expected numbers")
        self.name: str = name
        self._order = "="

    def __setstate__(self, state: Any) -> None:
        # Version, byte order, subarray, names, fields, and three values that only structures and text use.
        if type(state) is not tuple or len(state) != 8 or state[0] != 3 or state[2:5] != (None, None, None):
            raise UnsafePickleError(f"it asks for a dtype of state {_short(state)}, expected one of numbers")
        order = state[1].decode("latin1") if type(state[1]) is bytes else state[1]
        if order not in _BYTE_ORDERS:
            raise UnsafePickleError(
                f"it asks for the byte order {_short(order)}, expected one of {' '.join(_BYTE_ORDERS)}"
            )
        self._order = order

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return int(self.name[1:])

    def real(self) -> np.dtype[Any]:
        return np.dtype(self._order + self.name)


class _Array:
    """Placeholder of an array."""

    __slots__ = ("_data", "_dtype", "_order", "_shape")

    def __init__(self) -> None:
        self._dtype: DType | None = None

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise UnsafePickleError("it gives an array something other than version, shape, dtype, order and data")
        _, shape, dtype, by_columns, data = state
        if type(shape) is not tuple or not all(type(size) is int and size >= 0 for size in shape):
            raise UnsafePickleError(f"it asks for an array of shape {_short(shape)}, expected whole numbers")
        if type(dtype) is not DType:
            raise UnsafePickleError(f"it asks for an array of {type(dtype).__name__}, expected numbers")
        if type(data) is not bytes:
            raise UnsafePickleError(f"it fills an array from {type(data).__name__}, expected bytes")
        expected = math.prod(shape) * dtype.itemsize
        if len(data) != expected:
            raise UnsafePickleError(f"it fills an array of {expected} bytes with {len(data)}")
        self._shape, self._dtype, self._order, self._data = shape, dtype, "F" if by_columns else "C", data

    @property
    def data(self) -> bytes:
        """Bytes of its numbers."""
        return b"" if self._dtype is None else self._data

    def real(self) -> np.ndarray:
        if self._dtype is None:
            raise UnsafePickleError("it asks for an array without saying what is in it")
        flat = np.frombuffer(self._data, self._dtype.real())
        return flat.reshape(self._shape, order="F" if self._order == "F" else "C").copy()


def with_arrays(value: Any, done: dict[int, Any]) -> Any:
    """`value` with arrays for placeholders; `done` maps the id of each object already converted to its result."""
    if id(value) in done:
        return done[id(value)]
    if type(value) is _Array:
        data = value.data
        if id(data) in done and len(data) > _SHARED:
            raise UnsafePickleError("it fills several arrays from the same bytes")
        done[id(data)] = data
        done[id(value)] = value.real()
    elif type(value) is list:
        items = done[id(value)] = []
        items.extend(with_arrays(item, done) for item in value)
    elif type(value) in (dict, EasyDict):
        entries = done[id(value)] = {}
        entries.update((with_arrays(key, done), with_arrays(item, done)) for key, item in value.items())
    elif type(value) is tuple:
        done[id(value)] = tuple(with_arrays(item, done) for item in value)
    elif type(value) in _PLAIN:
        return value
    else:
        raise UnsafePickleError(f"it holds {type(value).__name__.lstrip('_')}, expected arrays and plain containers")
    return done[id(value)]


def _encode(text: Any, encoding: Any) -> bytes:
    """Encode text as protocol 2 does for bytes under Python 3; other codecs could decompress or import."""
    if type(text) is not str or encoding != "latin1":
        raise UnsafePickleError(f"it asks for the codec {_short(encoding)}")
    return text.encode("latin1")


def _reconstruct(kind: Any, *unused: Any) -> _Array:
    """An empty array, as NumPy's own `_reconstruct` returns: shape, dtype and data follow in its state."""
    if kind is not _NDARRAY:
        raise UnsafePickleError("it asks for a kind of array that is not numpy.ndarray")
    return _Array()


_NDARRAY = _NDArray()
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): Function(DType),
    ("dnnlib.util", "EasyDict"): EasyDict,
    ("_codecs", "encode"): Function(_encode),
    ("numpy.core.multiarray", "_reconstruct"): Function(_reconstruct),
    ("numpy._core.multiarray", "_reconstruct"): Function(_reconstruct),
}


def _short(value: Any) -> str:
    """A value for an error, cut short."""
    return reprlib.repr(value)
