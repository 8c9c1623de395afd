"""What a CUDA graph does, on a CPU: record the operators of a function once, then run them again on the same memory.

As in a capture, the host must not read a number, and Python runs once: a value that Python made is the same in every
replay. As with CUDA's registered generators, random numbers follow the generators' seeds at the time of the replay. As
in a graph's memory, nothing is left of the last replay but what somebody still holds.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Operators that wait for the device, make a shape from data, or copy from the host.
WAITING = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "lift_fresh",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}
METHODS = ("cpu", "numpy", "tolist")  # that read numbers without an operator, as the stand-in's device is the CPU


def waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a GPU's operator would make the host wait."""
    name = func.overloadpacket.__name__
    if name in {"index", "index_put", "index_put_", "_index_put_impl_"}:  # by a mask: of as many elements as it has
        return any(isinstance(index, Tensor) and index.dtype in {torch.bool, torch.uint8} for index in args[1])
    return name in WAITING or (name == "repeat_interleave" and func._overloadname == "Tensor")


class Watch(TorchDispatchMode):
    """Calls `on_wait` with the name of each operator and method that would make the host wait."""

    def __init__(self, on_wait: Callable[[str], object]) -> None:
        super().__init__()
        self.on_wait = on_wait
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> Any:
        for name in METHODS:
            self._patches.enter_context(mock.patch.object(torch.Tensor, name, self._watched(getattr(Tensor, name))))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if waits(func, args):
            self.on_wait(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def _watched(self, method: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.on_wait(method.__name__)
            return method(*args, **kwargs)

        return watched


class Tape(Watch):
    """Records every operator that reaches the device; raises for those that no graph can hold."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__(refuse)
        # Of tensors the tape keeps views, so that it can tell its own hold on their memory from that of others.
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.generators = generators
        self.made: dict[int, StorageWeakRef] = {}  # memory that the graph allocated, by address of its storage
        self.given: dict[int, StorageWeakRef] = {}  # memory that was there

    def __enter__(self) -> Any:
        self._seeds = self._current_seeds()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if error[0] is None and self._current_seeds() != self._seeds:
            refuse("a new seed")
        self._own = Counter(storage_of(tensor).cdata for tensor in tensors(self.calls))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = {address_of(generator) for generator in self.generators}
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Generator) and address_of(value) not in known:
                raise RuntimeError(f"{func} draws from a generator that the graph does not know")
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tensors((args, kwargs)):
            storage = storage_of(tensor)
            if storage.cdata not in self.made:
                self.given[storage.cdata] = storage
        for tensor in new_tensors(func, out):
            storage = storage_of(tensor)
            if storage.cdata not in self.given:  # some views are not declared as such
                self.made[storage.cdata] = storage
        self.calls.append((func, *tree_map_only(Tensor, Tensor.detach, (args, kwargs, out))))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        if any(self._is_own(storage) for storage in self.given.values()):
            raise RuntimeError("the graph reads or writes memory that was there before it and has been freed since")
        for func, _, _, out in self.calls:
            for tensor in new_tensors(func, out):
                if self._is_own(storage_of(tensor)):
                    spoil(tensor)
        for func, args, kwargs, out in self.calls:
            if not new_tensors(func, out) and func._schema.returns and not func._schema.is_mutable:
                continue  # a view: of memory that the operators before have renewed
            if "empty" in func.overloadpacket.__name__:
                continue  # memory alone
            made = func(*args, **kwargs)
            for old, new in zip(new_tensors(func, out), new_tensors(func, made), strict=True):
                old.copy_(new)

    def _is_own(self, storage: StorageWeakRef) -> bool:
        """Whether the tape alone keeps the memory."""
        own = self._own[storage.cdata] + 1  # the weak reference has made a Python object, which counts
        return bool(torch._C._storage_Use_Count(storage.cdata) == own)

    def _current_seeds(self) -> list[int]:
        return [generator.initial_seed() for generator in (*self.generators, torch.default_generator)]


def refuse(what: str) -> None:
    raise RuntimeError(f"{what} cannot be captured")


def tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def address_of(generator: Any) -> int:
    """The same for all Python objects that stand for one generator."""
    return int(generator._cdata)


def storage_of(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def new_tensors(func: Any, out: Any) -> list[Tensor]:
    """The results of an operator that are neither views of its arguments nor the arguments."""
    returns = func._schema.returns
    results = out if len(returns) > 1 else [out] * len(returns)
    pairs = zip(returns, results, strict=True)
    return [tensor for declared, result in pairs if declared.alias_info is None for tensor in tensors(result)]


def spoil(tensor: Tensor) -> None:
    """As if something else had used the memory."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    elif tensor.dtype is not torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


class Captures:
    """Stands in for `vadiff.trainer.training.captured`'s work with CUDA; counts what it was asked to do."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0
        self._memory: list[StorageWeakRef] = []

    def capture(self, work: Callable[[], None], _: object, generators: Sequence[torch.Generator]) -> Callable[[], None]:
        tape = Tape(generators)
        with tape:
            work()  # unlike a capture, this runs it: the first replay has nothing left to do
        self.captured += 1
        self._memory += tape.made.values()
        fresh = True

        def replay() -> None:
            nonlocal fresh
            self.replayed += 1
            if not fresh:
                tape.replay()
            fresh = False

        return replay

    def first_wait(self, work: Callable[[], None]) -> str | None:
        found: list[str] = []
        with Watch(found.append):
            work()
        return found[0] if found else None

    def allocated(self) -> int:
        """How many blocks of the graphs' memory somebody still holds."""
        return sum(not storage.expired() for storage in self._memory)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    """Training on a CPU captures its steps, with `Tape` in place of a CUDA graph."""
    from vadiff import log_snr
    from vadiff.trainer.training import captured

    made, why_not = Captures(), captured.why_not_captured
    monkeypatch.setattr(log_snr, "may_read", lambda values: False)  # as on a GPU
    monkeypatch.setattr(captured, "capture", made.capture)
    monkeypatch.setattr(captured, "first_wait", made.first_wait)
    monkeypatch.setattr(captured, "on_stream_of", lambda device: lambda work: work())
    cuda = torch.device("cuda")
    monkeypatch.setattr(captured, "why_not_captured", lambda config, _, ranks: why_not(config, cuda, ranks))
    return made
