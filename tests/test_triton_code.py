"""What the Triton kernels compile to, without a GPU: wide accesses, no spills, no atomics, 64-bit offsets; and which
of them a launch takes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

item_offsets = pytest.importorskip("vadiff.triton_kernels.rows").item_offsets
ELEMENT_KERNELS = ("rows_kernel", "backward_kernel", "scale_kernel")
WIDE = "v4.b32"


ARCHITECTURES = (80, 90, 100)


def compiled() -> list[dict[str, Any]]:
    """Every launch of a forward, a backward and a reweight, compiled for each architecture; in a process of its own,
    because this one may be interpreting."""
    return [json.loads(line) for line in run("compile_kernels.py", *map(str, ARCHITECTURES)).splitlines()]


def run(script: str, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr
    return output.stdout


def test_kernels_compile_with_wide_accesses_no_spills_and_no_atomics(capsys: pytest.CaptureFixture[str]) -> None:
    kernels = compiled()
    with capsys.disabled():
        print()
        for kernel in kernels:
            print(
                f"sm_{kernel['sm']} {kernel['dtype']:8} {kernel['shape']!s:18} K={kernel['k']:<4} {kernel['kernel']:18}"
                f" {kernel['registers']:3} registers, {kernel['spilled_bytes']} bytes spilled,"
                f" loads {kernel['loads']}, stores {kernel['stores']}"
            )
    for architecture in ARCHITECTURES:
        names = {kernel["kernel"] for kernel in kernels if kernel["sm"] == architecture}
        assert names == {*ELEMENT_KERNELS, "statistics_kernel", "fold_kernel"}
    for kernel in kernels:
        assert kernel["spilled_bytes"] == 0, kernel
        assert kernel["atomics"] == kernel["float_atomics"] == 0, kernel
        even = math.prod(kernel["shape"][1:]) % 16 == 0  # else a row does not start at a multiple of a vector
        if kernel["kernel"] in ELEMENT_KERNELS and even:
            # what is not 128 bits wide is one value per sample: a coefficient, a weight, a partial sum
            narrow = [name for name in {**kernel["loads"], **kernel["stores"]} if not name.endswith(WIDE)]
            assert set(narrow) <= {"ld.global.b32", "st.global.b64"}, kernel
            per_element = sum(hits for name, hits in kernel["loads"].items() if name.endswith(WIDE))
            assert per_element >= 4, kernel
            assert sum(hits for name, hits in kernel["stores"].items() if name.endswith(WIDE)) >= 4, kernel
            assert kernel["loads"].get("ld.global.b32", 0) <= 8, kernel


def test_a_remembered_launch_is_of_the_kernel_that_triton_would_choose() -> None:
    run("launch_kinds.py")


@triton.jit
def offsets_kernel(out_ptr, item, elements, splits, chunk, EVEN: tl.constexpr):
    sample, start, end, row = item_offsets(tl.program_id(0) + item, elements, splits, chunk, EVEN)
    tl.store(out_ptr, sample)
    tl.store(out_ptr + 1, start)
    tl.store(out_ptr + 2, end)
    tl.store(out_ptr + 3, row)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU tests/gpu runs tensors of that size")
def test_offsets_beyond_two_to_the_31_do_not_wrap() -> None:
    out = torch.zeros(4, dtype=torch.int64)
    elements, splits = 3 * 2**30, 1024
    chunk = elements // splits
    item = 5 * splits + splits - 1  # the last run of sample 5
    offsets_kernel[(1,)](out, item, elements, splits, chunk, True)
    assert out.tolist() == [5, elements - chunk, elements, 5 * elements]
