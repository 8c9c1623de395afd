"""Bandwidth of a plain copy on this machine, to which every "share of the copy bandwidth" refers.

Two copies on a CPU, both on torch's number of threads, both counted as bytes read + bytes written:

- `copy_`: torch's. Its stores first read the destination into the cache, a third move, which is not counted.
- streaming: non-temporal stores (streaming_copy.c, built here with the C compiler), without that read.

The faster of the two counts. On a GPU there is torch's `copy_` only. As the speed of a machine's memory varies, the
copies are measured again before each contest.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import machine
import measure
import torch
from torch import Tensor

_BYTES = {"cpu": 2**28, "cuda": 2**31}  # one buffer, at least
_QUICK_BYTES = 2**25


_StreamingCopy = Callable[[int, int, int], None]  # addresses of destination and source, bytes


class CopyBandwidth(NamedTuple):
    """Bytes per second, read and written together."""

    by_kind: dict[str, float]
    without: dict[str, str]  # kinds that could not be measured, and why

    @property
    def kind(self) -> str:
        return max(self.by_kind, key=lambda kind: self.by_kind[kind])

    @property
    def best(self) -> float:
        return self.by_kind[self.kind]


def copies(source: Tensor, destination: Tensor) -> tuple[dict[str, measure.Run], dict[str, str]]:
    """The kinds of copy from one buffer to another of the same size, and the reasons why others are missing."""
    found: dict[str, measure.Run] = {"copy_": lambda: destination.copy_(source)}
    if source.device.type == "cuda":
        return found, {}
    function = _streaming_function()
    if isinstance(function, str):
        return found, {"streaming": function}
    found["streaming"] = functools.partial(_stream, function, source, destination)
    return found, {}


class Yardstick:
    """Measures copies of a buffer of at least the size of the last-level cache."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.bytes = _QUICK_BYTES if quick else max(_BYTES[device.type], machine.last_level_cache(device))
        source = torch.ones(self.bytes // 4, device=device)
        self.runs, self.without = copies(source, torch.zeros_like(source))
        for run in self.runs.values():
            run()

    def measure(self) -> CopyBandwidth:
        """Current bandwidth of the copies, medians."""
        seconds = 0.2 if self.device.type == "cuda" else 0.5
        effort = measure.Effort.of(self.device, self.quick)._replace(seconds=seconds, min_rounds=5)
        times = measure.race(self.runs, self.device, effort)
        medians = {kind: measure.Spread.of(found.device or found.wall).median for kind, found in times.items()}
        return CopyBandwidth({kind: 2 * self.bytes / median for kind, median in medians.items()}, self.without)


@functools.cache
def _streaming_function() -> _StreamingCopy | str:
    """Build streaming_copy of streaming_copy.c; returns it, or the reason why that failed."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "no C compiler (cc)"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "streaming_copy.so"
        source = Path(__file__).with_name("streaming_copy.c")
        command = [compiler, "-O3", "-shared", "-fPIC", str(source), "-o", str(library)]
        built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if built.returncode != 0:
            return f"{compiler} failed: {next(iter(built.stderr.splitlines()), 'no message')}"
        function = ctypes.CDLL(str(library)).streaming_copy
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    function.restype = None
    return function


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count)


def _stream(function: _StreamingCopy, source: Tensor, destination: Tensor) -> None:
    """Copy in parallel: each thread copies its part, as ctypes releases the interpreter lock."""
    count = torch.get_num_threads()
    part = -(-source.nbytes // (64 * count)) * 64
    starts = range(0, source.nbytes, part)
    to, origin = destination.data_ptr(), source.data_ptr()
    jobs = [
        _threads(count).submit(function, to + start, origin + start, min(part, source.nbytes - start))
        for start in starts
    ]
    for job in jobs:
        job.result()
