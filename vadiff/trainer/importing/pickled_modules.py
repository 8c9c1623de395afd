"""An unpickler for networks in NVlabs' files that builds tensors and descriptions of modules, and nothing else.

A network there is a "persistent object": the pickle calls one function with a mapping of the class's name, its source
and the object's state. The source would be run by the original; here it is not even kept. What the pickle gets in its
hands are placeholders, as in `trainer.data.pickled_arrays`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..data.pickle_scan import UnsafePickleError, check
from ..data.pickled_arrays import ArrayUnpickler, DType, EasyDict, Function
from .storages import PickledTensor, storage

_TORCH_MODULES = "torch.nn.modules."  # classes of torch: containers of modules
_VADIFF = "vadiff."  # of the loss, in snapshots of a training with `vadiff.integrations.edm`


@dataclass(frozen=True)
class PickledModule:
    """A module of a network in a file.

    Attributes:
        kind: name of its class.
        attributes: its plain attributes: numbers, text, lists, ...; what else there is, is None.
        tensors: its own parameters and buffers by name; those that are None are left out.
        children: modules in it by name, in their order.
    """

    kind: str
    attributes: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    children: Mapping[str, PickledModule]

    def flat(self, prefix: str = "") -> dict[str, Tensor]:
        """All tensors in it, by their names in a state dict."""
        found = {prefix + name: tensor for name, tensor in self.tensors.items()}
        for name, child in self.children.items():
            found |= child.flat(f"{prefix}{name}.")
        return found


def read_module(path: Path, key: str) -> PickledModule:
    """The module under `key` of the mapping in a pickle; nothing of the file is run.

    Raises:
        DataError: the file is missing, truncated or corrupt, asks for other objects, or has no such module; the message
            says which.
    """
    try:
        with path.open("rb") as file:
            check(file)
            content = _ModuleUnpickler(file).load()
        if type(content) not in (dict, EasyDict):
            raise UnsafePickleError(f"it holds {type(content).__name__.lstrip('_')}, expected a mapping")
        if key not in content:
            found = ", ".join(sorted(str(name) for name in content)) or "nothing"
            raise UnsafePickleError(f"it has no {key!r}, only {found}")
        module = _module(content[key], key, set())
        size = sum(tensor.numel() * tensor.element_size() for tensor in module.flat().values())
        if size > path.stat().st_size:
            raise UnsafePickleError(f"its tensors have {size:,} bytes in all, more than the file: they share numbers")
        return module
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnsafePickleError as error:
        raise DataError(
            f"{path} is not a file of a network that can be imported: {error}. Nothing of it was run"
        ) from error
    except Exception as error:  # a broken pickle raises almost any kind
        raise DataError(f"{path} cannot be read as a pickle: {type(error).__name__}: {error}") from error


class _Object:
    """Placeholder of a persistent object, or of a module of torch: its class's name and its state."""

    __slots__ = ("kind", "state")

    kind: str
    state: dict[Any, Any] | None

    def __new__(cls) -> _Object:
        made = super().__new__(cls)
        made.kind, made.state = "torch.nn.Module", None
        return made

    def __setstate__(self, state: Any) -> None:
        if self.state is not None or type(state) is not dict:
            raise UnsafePickleError(f"it gives a module the state {type(state).__name__}, expected a mapping, once")
        self.state = state


class _Ignored:
    """In place of every object of vadiff itself: takes what it is given, and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *unused: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *unused: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _ModuleUnpickler(ArrayUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(_TORCH_MODULES) and "." not in name:
            return _Object
        if module.startswith(_VADIFF) and "." not in name:
            return _Ignored
        return super().find_class(module, name)


def _persistent(description: Any) -> _Object:
    """The object that a pickle describes by type, version, module_src, class_name and state."""
    if type(description) not in (dict, EasyDict) or description.get("type") != "class":
        raise UnsafePickleError("it describes a persistent object by something other than a class")
    kind, state = description.get("class_name"), description.get("state")
    if type(kind) is not str or type(state) not in (dict, EasyDict):
        raise UnsafePickleError("it describes a persistent object without class_name and state")
    found = _Object()
    found.kind, found.state = kind, dict(state)
    return found


def _parameter(data: Any, *unused: Any) -> PickledTensor:
    if type(data) is not PickledTensor:
        raise UnsafePickleError(f"it makes a parameter of {type(data).__name__}, expected a tensor")
    return data


def _scalar(dtype: Any, content: Any) -> Any:
    """A NumPy scalar as a number."""
    if type(dtype) is not DType or type(content) is not bytes or len(content) != dtype.itemsize:
        raise UnsafePickleError("it makes a scalar of something other than a number")
    return np.frombuffer(content, dtype.real())[0].item()


def _ordered(*items: Any) -> dict[Any, Any]:
    if items:
        raise UnsafePickleError("it fills a mapping in an unusual way")
    return {}


def _nothing(*unused: Any) -> None:
    """In place of what no network needs, such as a device."""


_ModuleUnpickler.further = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Function(_persistent),
    ("torch._utils", "_rebuild_tensor_v2"): Function(PickledTensor),
    ("torch._utils", "_rebuild_parameter"): Function(_parameter),
    ("torch.storage", "_load_from_bytes"): Function(storage),
    ("torch", "device"): Function(_nothing),
    ("collections", "OrderedDict"): Function(_ordered),
    ("builtins", "set"): Function(_nothing),  # of protocols before 4
    ("__builtin__", "set"): Function(_nothing),
    ("numpy.core.multiarray", "scalar"): Function(_scalar),
    ("numpy._core.multiarray", "scalar"): Function(_scalar),
    **{("torch", str(dtype).removeprefix("torch.")): None for dtype in (torch.float16, torch.float32, torch.float64)},
}


def _module(value: Any, name: str, seen: set[int]) -> PickledModule:
    """What a placeholder stands for, given the ids of those that were met before.

    Raises:
        UnsafePickleError: it is no module, lacks what a module has, or is in several places.
    """
    if type(value) is not _Object or value.state is None:
        raise UnsafePickleError(f"{name} is {type(value).__name__.lstrip('_')}, expected a module")
    if id(value) in seen:  # modules in themselves never end
        raise UnsafePickleError(f"{name} is a module that is elsewhere in the network too")
    seen.add(id(value))
    parts = {}
    for part in ("_parameters", "_buffers", "_modules"):
        found = value.state.get(part)
        if type(found) is not dict:
            raise UnsafePickleError(f"{name}, of class {value.kind}, has no {part}: it is no module")
        parts[part] = {str(key): item for key, item in found.items() if item is not None}
    tensors = parts["_parameters"] | parts["_buffers"]
    if strange := [key for key, item in tensors.items() if type(item) is not PickledTensor]:
        raise UnsafePickleError(f"{name}.{strange[0]} is no tensor")
    return PickledModule(
        value.kind,
        {key: _plain(item) for key, item in value.state.items() if type(key) is str and not key.startswith("_")},
        {key: item.real() for key, item in tensors.items()},
        {key: _module(item, f"{name}.{key}", seen) for key, item in parts["_modules"].items()},
    )


def _plain(value: Any) -> Any:
    return value if type(value) in (bool, int, float, str) else None
