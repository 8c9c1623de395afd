"""Check that `vadiff.triton_kernels.launch` launches the kernel that Triton itself would choose, without a GPU.

Run as a script, without TRITON_INTERPRET. Nothing is compiled: a stand-in of a compiled kernel notes its launches.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
import triton
from compile_kernels import CompileOnly, call_everything
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from vadiff import triton_kernels
from vadiff.triton_kernels.launch import Launcher


class NotCompiled(CompiledKernel):
    """Stands in for a compiled kernel."""

    launched: list[tuple[Any, ...]] = []  # noqa: RUF012 (of all of them, in order)

    def __init__(self, source: Any, *args: Any, **kwargs: Any) -> None:
        self.source = source
        self.function = self.packed_metadata = None

    def _init_handles(self) -> None:
        pass

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        self.launched.append((self, *args))


class Triton:
    """Triton's own way of a launch, counted; what it compiles is a `NotCompiled`."""

    launches = 0


def run(kernel: triton.JITFunction, *args: Any, **kwargs: Any) -> Any:
    Triton.launches += 1
    kernel.device_caches[driver.active.get_current_device()]  # sets `compile`
    kernel.compile = NotCompiled
    return JIT_RUN(kernel, *args, **kwargs)


JIT_RUN = triton.JITFunction.run
LAUNCH = Launcher.__call__


def launch_and_compare(launcher: Launcher, programs: int, arguments: dict[str, Any]) -> NotCompiled:
    """Launch, and check kernel, grid, stream, hooks and arguments against a launch by Triton."""
    LAUNCH(launcher, programs, **arguments)
    found = NotCompiled.launched.pop()
    launcher._kernel[(programs,)](**arguments, **launcher._options)
    Triton.launches -= 1
    expected = NotCompiled.launched.pop()
    assert found[0] is expected[0], (launcher._kernel, arguments)
    assert len(found) == len(expected)
    assert all(a is b or a == b for a, b in zip(found[1:], expected[1:], strict=True)), (found, expected)
    return found[0]


@triton.jit(do_not_specialize=["free"])
def kernel_of_everything(pointer, other, number, free, real, flag, SIZE: triton.language.constexpr):
    pass


def kinds_of_arguments() -> Iterator[dict[str, Any]]:
    memory = torch.zeros(64)
    pointers = (None, memory, memory[1:], memory[4:], memory.bfloat16(), memory.bfloat16()[1:], memory.double())
    values = {
        "pointer": pointers,
        "other": (None, memory, memory[1:]),
        "number": (0, 1, 2, 16, 17, -16, 2**31 - 1, 2**31, 2**40, 2**63),
        "free": (1, 16, 17, 2**31),
        "real": (1.0, 0.5),
        "flag": (True, False, 1, 1.0),
        "SIZE": (1, 16, True, "std"),
    }
    for chosen in itertools.product(*values.values()):
        yield dict(zip(values, chosen, strict=True))


def check_every_kind() -> None:
    generator = random.Random(0)
    launcher = Launcher(kernel_of_everything, num_warps=2)
    kinds = generator.sample(list(kinds_of_arguments()), 1500)
    chosen = {launch_and_compare(launcher, 3, kind) for kind in kinds}
    generator.shuffle(kinds)
    Triton.launches = 0
    assert {launch_and_compare(launcher, 5, kind) for kind in kinds} == chosen
    assert Triton.launches == 0, "launches of a known kind went through Triton"
    assert len(chosen) > 500
    driver.set_active(CompileOnly(100))  # another device
    assert launch_and_compare(launcher, 5, kinds[0]) not in chosen
    driver.set_active(CompileOnly(90))


def check_hooks() -> None:
    launcher, kind = Launcher(kernel_of_everything), next(kinds_of_arguments())
    launch_and_compare(launcher, 1, kind)
    if hasattr(triton, "knobs"):
        triton.knobs.runtime.launch_enter_hook = print
        assert launch_and_compare(launcher, 1, kind)  # which compares the hooks
        triton.knobs.runtime.launch_enter_hook = None
    ran: list[Any] = []
    kernel_of_everything.add_pre_run_hook(lambda *args, **kwargs: ran.append(args))
    LAUNCH(launcher, 1, **kind)
    assert len(ran) == 1
    kernel_of_everything.pre_run_hooks.clear()


def check_the_kernels() -> None:
    """All launches of the backend: a second call of the same kind leaves Triton alone."""

    def compare(self: Launcher, programs: int, **arguments: Any) -> None:
        launch_and_compare(self, programs, arguments)

    Launcher.__call__ = compare  # type: ignore[method-assign]
    for shape, every_input in itertools.product([(512, 3, 32, 32), (5, 3, 7, 7), (4096, 64)], [False, True]):
        for dtype, again in itertools.product([torch.float32, torch.bfloat16], [False, True]):
            Triton.launches = 0
            call_everything(dtype, shape, 64, "std", every_input)
            assert (Triton.launches == 0) == again, (shape, every_input, dtype, again, Triton.launches)


if __name__ == "__main__":
    assert not triton_kernels.INTERPRETED
    driver.set_active(CompileOnly(90))
    triton.JITFunction.run = run
    check_every_kind()
    check_hooks()
    check_the_kernels()
