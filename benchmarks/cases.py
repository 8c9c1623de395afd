"""Benchmark cases: shapes, dtypes, modes, the bytes that each must move, and the combinations that run by default.

A combination of case, dtype and mode is a contest: all its providers get the same buffers and run in turns.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SHAPES = {
    "tiny": (1, 3, 32, 32),
    "small": (16, 4, 8, 8),
    "cifar-64": (64, 3, 32, 32),
    "cifar-128": (128, 3, 32, 32),
    "cifar-512": (512, 3, 32, 32),
    "latents-64": (64, 4, 64, 64),
    "latents-128": (64, 4, 128, 128),
    "video": (8, 16, 16, 60, 90),
}
HUGE_BYTES = {"cpu": 2**28, "cuda": 2**31}  # of one tensor, in any dtype
CASES = (*SHAPES, "huge")


class Mode(NamedTuple):
    """How the loss is called."""

    title: str
    backward: bool = True
    noise: bool = False  # the residual has a term in eps: flow matching, prediction + x0 - eps
    deferred: bool = False  # the gradient is computed in the backward pass
    graph: bool = False  # replay of a captured CUDA graph


MODES = {
    "forward": Mode("forward only", backward=False),
    "fused": Mode("forward + backward"),
    "deferred": Mode("forward + backward, gradient in the backward", deferred=True),
    "noise": Mode("forward + backward, target and eps", noise=True),
    "graph": Mode("forward + backward, CUDA graph replay", graph=True),
}


class Contest(NamedTuple):
    """One case in one dtype and mode."""

    case: str
    dtype: str
    mode: str

    def __str__(self) -> str:
        return "-".join(self)


def shape_of(case: str, dtype: str, device_type: str) -> tuple[int, ...]:
    """Shape of the prediction; "huge" has as many samples as fill HUGE_BYTES."""
    if case != "huge":
        return SHAPES[case]
    sample = (4, 512, 512) if device_type == "cpu" else (4, 1024, 1024)
    return (HUGE_BYTES[device_type] // (math.prod(sample) * DTYPES[dtype].itemsize), *sample)


def moves_of(contest: Contest) -> int:
    """How often a tensor of the prediction's size must be read or written.

    Forward reads the prediction, the target and any noise; the fused gradient adds one write. A deferred gradient
    reads everything again before it is written; float16 always defers."""
    mode = MODES[contest.mode]
    reads = 3 if mode.noise else 2
    if not mode.backward:
        return reads
    return 2 * reads + 1 if mode.deferred or contest.dtype == "fp16" else reads + 1


def bytes_of(contest: Contest, device_type: str) -> int:
    """Bytes that must move in one call, [B]-shaped tensors and statistics not counted."""
    elements = math.prod(shape_of(contest.case, contest.dtype, device_type))
    return moves_of(contest) * elements * DTYPES[contest.dtype].itemsize


def input_bytes_of(contest: Contest, device_type: str) -> int:
    """Bytes of the prediction, the target and any noise."""
    elements = math.prod(shape_of(contest.case, contest.dtype, device_type))
    return (3 if MODES[contest.mode].noise else 2) * elements * DTYPES[contest.dtype].itemsize


def contests(device_type: str) -> list[Contest]:
    """All contests on a device. There is no fused float16, and no CUDA graph on a CPU."""
    return [
        contest
        for contest in itertools.starmap(Contest, itertools.product(CASES, DTYPES, MODES))
        if (contest.mode, contest.dtype) != ("fused", "fp16") and (device_type == "cuda" or contest.mode != "graph")
    ]


# (case, dtypes, modes), separated by blanks. The rest of `contests` runs with --all.
_DEFAULT = {
    "cpu": [
        ("tiny small cifar-64 cifar-128 cifar-512 latents-64 huge", "fp32", "fused"),
        ("cifar-128", "fp32", "forward deferred noise"),
        ("cifar-128", "fp16", "deferred"),
        ("cifar-128 latents-128 video", "bf16", "fused"),
    ],
    # About 25 contests of two or three seconds: gpu.sh has ten minutes in total.
    "cuda": [
        ("tiny small cifar-64 cifar-128 cifar-512 latents-64 latents-128 video huge", "fp32", "fused"),
        ("cifar-512 latents-128 video huge", "bf16", "fused"),
        ("cifar-512 huge", "fp32", "forward deferred noise"),
        ("cifar-512 huge", "fp16", "deferred"),
        ("huge", "bf16", "deferred"),
        ("tiny cifar-128 cifar-512", "fp32", "graph"),
        ("cifar-512", "bf16", "graph"),
    ],
}
# Compiling takes longer than measuring, once per shape: by default only contests for which the design has a figure.
_COMPILED = {
    "cpu": {Contest("cifar-128", "fp32", "fused"), Contest("latents-64", "fp32", "fused")},
    "cuda": {Contest("cifar-512", "fp32", "fused"), Contest("huge", "fp32", "fused")},
}


def runs_by_default(contest: Contest, compiled: bool, device_type: str) -> bool:
    """Whether a provider (compiled, or not) takes part in a contest without --all."""
    if compiled:
        return contest in _COMPILED[device_type]
    return any(
        all(part in names.split() for part, names in zip(contest, row, strict=True)) for row in _DEFAULT[device_type]
    )
