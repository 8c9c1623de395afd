"""An unpickler that builds nothing but NumPy arrays of numbers and plain containers.

A pickle is a program; reading one with `pickle.load` runs whatever its author put in. CIFAR's python layout is pickled.
"""

import io
import pickle
from typing import Any

import numpy as np

_reconstruct = np.empty(0).__reduce__()[0]  # its module has another name in NumPy 2 than in NumPy 1


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle asks for something other than arrays and plain containers."""


def load_arrays(content: bytes) -> Any:
    """The object in a pickle that holds arrays of numbers, lists, mappings, text, bytes and numbers only.

    Pickles of Python 2 are read with their text as bytes, as `encoding="bytes"` does.

    Raises:
        UnsafePickleError: the pickle asks for anything else; nothing of it was run.
        Exception: the pickle is broken, in whatever way pickle puts it.
    """
    return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise UnsafePickleError(f"it asks for {module}.{name}, which a data file has no use for")

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError("it refers to objects outside of itself")


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes under Python 3; other codecs could decompress or import."""
    if encoding != "latin1":
        raise UnsafePickleError(f"it asks for the codec {encoding!r}")
    return text.encode("latin1")


def _dtype(*arguments: Any) -> np.dtype[Any]:
    dtype = np.dtype(*arguments)
    if dtype.hasobject or dtype.fields is not None:
        raise UnsafePickleError(f"it asks for an array of {dtype}, expected numbers")
    return dtype


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
}
