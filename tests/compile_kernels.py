"""Compile the kernels as they are launched, for GPUs that are not there; print a JSON line per kernel.

Run as a script, without TRITON_INTERPRET: the launchers of `vadiff.triton_kernels` are called on CPU tensors with a
driver that names a target and launches nothing, so what is compiled is what a user's call compiles.

    python tests/compile_kernels.py 80 90 100
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from vadiff import triton_kernels
from vadiff.ops.problem import Bins, Inputs, Problem, State, TableRule


class CompileOnly:
    """A Triton driver for one compute capability that has no device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compile_instead_of_launch(case: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """From here on a launch compiles, and appends what became of it."""

    def run(self: triton.JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        found.append({**case, "kernel": self.__name__, **describe(kernel)})

    original = JIT_RUN
    triton.JITFunction.run = run


JIT_RUN = triton.JITFunction.run
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def describe(kernel: Any) -> dict[str, Any]:
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "spilled_bytes": int(stack) + int(local),  # what is spilled lies there; these kernels have nothing else for it
        "loads": count(r"ld\.global\S*", ptx),
        "stores": count(r"st\.global\S*", ptx),
        "float_atomics": len(re.findall(r"\b(?:atom|red)\.[\w.]*\.(?:f|bf)\d+", ptx)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.global", ptx)),
    }


def count(pattern: str, text: str) -> dict[str, int]:
    hits: dict[str, int] = {}
    for hit in re.findall(pattern, text):
        hits[hit] = hits.get(hit, 0) + 1
    return hits


def call_everything(dtype: torch.dtype, shape: tuple[int, ...], k: int, statistic: str, every_input: bool) -> None:
    samples = shape[0]
    prediction, target = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    each = torch.ones(samples) if every_input else None
    noise = torch.zeros(shape, dtype=dtype) if every_input else None
    a, b, c = (torch.ones(samples),) * 3 if every_input else (1.0, -1.0, 0.0)
    state = State(torch.zeros(6 * k + 14, dtype=torch.int64), torch.zeros(k, dtype=torch.int32))
    problem = Problem(Bins(k, -16.0, 16.0), half_life=256.0, rule=TableRule(statistic))
    log_snr = torch.zeros(samples)
    inputs = Inputs(prediction, target, noise, a, b, c, log_snr, each, each, weight=None, mean=True)
    made = triton_kernels.step(problem, inputs, state, gradient=True, update=True, gather=None)
    triton_kernels.backward(problem, inputs, made.per_sample, made.loss)
    triton_kernels.scale(made.gradient, made.loss)
    losses = Inputs(log_snr, None, None, 1.0, 0.0, 0.0, log_snr, None, each, weight=None, mean=False)
    triton_kernels.reweight(problem, losses, state, update=True, gather=None)


def main(capabilities: list[int]) -> None:
    cases: list[dict[str, Any]] = [
        {"dtype": "float32", "shape": (512, 3, 32, 32), "k": 128, "statistic": "std", "every_input": False},
        {"dtype": "bfloat16", "shape": (64, 4, 64, 64), "k": 256, "statistic": "std", "every_input": True},
        {"dtype": "bfloat16", "shape": (4096, 2048), "k": 256, "statistic": "mean", "every_input": False},
        {"dtype": "float32", "shape": (64, 4, 64, 64), "k": 128, "statistic": "std", "every_input": True},
        {"dtype": "float32", "shape": (5, 3, 7, 7), "k": 64, "statistic": "rms", "every_input": True},
    ]
    for capability in capabilities:
        driver.set_active(CompileOnly(capability))
        for case in cases:
            found: list[dict[str, Any]] = []
            compile_instead_of_launch({**case, "sm": capability}, found)
            call_everything(**{**case, "dtype": getattr(torch, case["dtype"])})
            for kernel in found:
                print(json.dumps(kernel), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
