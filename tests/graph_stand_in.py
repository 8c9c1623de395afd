"""What a CUDA graph does, on a CPU: record the operators of a function once, then run them again on the same memory.

As in a capture, the host must not read a number, and Python runs once: a value that Python made is the same in every
replay. As with CUDA's registered generators, random numbers follow the generators' seeds at the time of the replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What waits for the device, makes a shape from data, or copies from the host.
REFUSED = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "lift_fresh",
    "unique2",
    "bincount",
}


class Tape(TorchDispatchMode):
    """Records every operator that reaches the device; raises for those that no graph can hold."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.generators = generators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in REFUSED:
            raise RuntimeError(f"{name} cannot be captured")
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Generator) and not self._knows(value):
                raise RuntimeError(f"{name} draws from a generator that the graph does not know")
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def _knows(self, generator: torch.Generator) -> bool:
        """By their seeds, as torch hands over another object for the same generator."""
        return generator.initial_seed() in {known.initial_seed() for known in self.generators}

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            aliases = [value.alias_info for value in func._schema.returns if value.alias_info is not None]
            if any(not alias.is_write for alias in aliases):
                continue  # a view: of memory that the operators before have renewed
            made = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(made), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


class Captures:
    """Stands in for `vadiff.trainer.training.captured`'s work with CUDA; counts what it was asked to do."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def capture(self, work: Callable[[], None], _: object, generators: Sequence[torch.Generator]) -> Callable[[], None]:
        tape = Tape(generators)
        with tape:
            work()  # unlike a capture, this runs it: the first replay has nothing left to do
        self.captured += 1
        fresh = True

        def replay() -> None:
            nonlocal fresh
            self.replayed += 1
            if not fresh:
                tape.replay()
            fresh = False

        return replay


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    """Training on a CPU captures its steps, with `Tape` in place of a CUDA graph."""
    from vadiff import log_snr
    from vadiff.trainer.training import captured

    made, why_not = Captures(), captured.why_not_captured
    monkeypatch.setattr(log_snr, "_may_read", lambda values: False)  # as on a GPU
    monkeypatch.setattr(captured, "capture", made.capture)
    monkeypatch.setattr(captured, "on_stream_of", lambda device: lambda work: work())
    cuda = torch.device("cuda")
    monkeypatch.setattr(captured, "why_not_captured", lambda config, _, ranks: why_not(config, cuda, ranks))
    return made
