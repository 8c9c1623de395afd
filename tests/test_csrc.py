"""csrc/ as compilers see it: the shared header's unit tests, and what nvcc makes of the CUDA kernels."""

from __future__ import annotations

import ast
import ctypes
import fcntl
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import vadiff

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90", "100")

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="csrc/ is not beside the tests")


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        pytest.skip("nvcc is not installed")
    return found


def test_the_shared_header_passes_its_unit_tests_on_the_host(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "loss_math_test"
    source = ROOT / "tests/loss_math_test.cpp"
    run(compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", source, "-o", program)
    run(program)


def test_the_shared_header_passes_its_unit_tests_through_nvcc(nvcc: str, tmp_path: Path) -> None:
    program = tmp_path / "loss_math_test"
    run(
        nvcc,
        "-std=c++17",
        "-x",
        "cu",
        "-arch=sm_90",
        f"-I{ROOT / 'csrc'}",
        ROOT / "tests/loss_math_test.cpp",
        "-o",
        program,
    )
    run(program)


def test_the_stub_declares_what_the_module_has() -> None:
    """Names, and how many arguments: pybind11 does not know what they are called."""
    native = pytest.importorskip("vadiff._native")
    declared = ast.parse((Path(vadiff.__file__).parent / "_native.pyi").read_text()).body
    functions = {node.name: node for node in declared if isinstance(node, ast.FunctionDef)}
    variables = {node.target.id for node in declared if isinstance(node, ast.AnnAssign)}
    without_cuda = {"cuda_workspace_size"} if native.cuda_architectures is None else set()
    assert {*functions, *variables} - without_cuda == {name for name in dir(native) if not name.startswith("__")}
    for name in functions.keys() - without_cuda:
        signature = re.search(r"\((.*?)\) -> ", getattr(native, name).__doc__)
        assert len(functions[name].args.posonlyargs) == len(re.findall(r"(?:^|, )\w+: ", signature[1])), name


@pytest.mark.parametrize("struct", ["ProblemFields", "Call"])
def test_python_lays_out_a_call_as_the_header_does(struct: str) -> None:
    """The module checks the size; a field at another's place would go unnoticed."""
    native = pytest.importorskip("vadiff.ops.native")
    (body,) = re.findall(rf"struct {struct} {{\n(.*?)\n}};", (ROOT / "csrc/call.h").read_text(), re.DOTALL)
    fields = re.findall(r"^  (.+?)(\w+);", body, re.MULTILINE)
    types = {name: ctypes.c_double if kind == "double " else ctypes.c_int64 for kind, name in fields}
    if struct == "Call":
        types["problem"] = native.ProblemFields
    assert list(types.items()) == getattr(native, struct)._fields_


@dataclass
class Compiled:
    said: str  # by ptxas
    kernels: dict[str, str]  # PTX
    machine_code: Path


@pytest.fixture(scope="module")
def compiled(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compiled]:
    """csrc/cuda.cu for an architecture, compiled by the first process that asks; its part for the host for one only."""
    folder = tmp_path_factory.getbasetemp() / "cuda_object"
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent.parent / "cuda_object"  # one for all workers
    folder.mkdir(exist_ok=True)

    @functools.cache
    def compile_for(architecture: str) -> Compiled:
        keep = folder / architecture
        log = keep / "log"
        kind = "object" if architecture == "90" else "cubin"
        with (folder / f"{architecture}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not log.exists():
                keep.mkdir(exist_ok=True)
                said = run(
                    nvcc, "-std=c++17", "-O3", f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
                    "-Xptxas=-v", "-Xcompiler=-fPIC", "--keep", "--keep-dir", keep,
                    "-c" if kind == "object" else "-cubin", ROOT / "csrc/cuda.cu", "-o", keep / kind,
                )  # fmt: skip
                log.write_text(said)
        ptx = next(keep.glob("*.ptx")).read_text()
        kernels = {match[1]: match[0] for match in re.finditer(r"\.entry (\w+)\(.*?\n}", ptx, re.DOTALL)}
        return Compiled(log.read_text(), kernels, keep / kind)

    return compile_for


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cuda_kernels_compile_without_spilling(compiled: Callable[[str], Compiled], architecture: str) -> None:
    said = compiled(architecture).said
    assert "warning" not in said
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    # Forward and backward for four dtypes of the prediction, beside tensors of the same and of any; finish and scale in
    # float and double; fold.
    assert len(spills) == 2 * 4 * 2 + 2 * 2 + 1
    assert set(spills) == {("0", "0")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_three_blocks_fit_on_a_multiprocessor(compiled: Callable[[str], Compiled], architecture: str) -> None:
    """Of 256 threads, of 65,536 registers; in double two."""
    used = re.findall(r"entry function '(\w+)'(?:.*\n)+?.*Used (\d+) registers", compiled(architecture).said)
    assert len(used) == 21
    for name, registers in used:
        in_double = re.search(r"_kernelI(Li3ELb.E)?d", name)
        assert int(registers) <= (128 if in_double else 80), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_large_tensors_are_read_and_written_in_128_bit_accesses(
    compiled: Callable[[str], Compiled], architecture: str
) -> None:
    kernels = compiled(architecture).kernels
    of_elements = {name: text for name, text in kernels.items() if re.search("(forward|backward|scale)_kernelI", name)}
    assert len(of_elements) == 18
    for name, text in of_elements.items():
        read_only = len(re.findall(r"ld\.global\.nc\.v4\.[bu]32", text))
        wide_loads = len(re.findall(r"ld\.global\.v4\.[bfu]32|ld\.global\.v2\.[bfu]64", text))
        wide_stores = len(re.findall(r"st\.global\.v4\.[bfu]32|st\.global\.v2\.[bf]64", text))
        if "scale_kernel" in name:  # may write where it reads; its loop stands once or once per dtype, as nvcc chooses
            vectors = 4 if "kernelId" in name else 2  # 128-bit words of eight elements
            assert wide_loads >= vectors, (name, wide_loads)
            assert read_only == 0, (name, read_only)
        else:
            dtype, same = map(int, re.findall(r"kernelILi(\d)ELb(\d)", name)[0])
            vectors = [2, 2 if same else 1, 2 if same else 1, 4][dtype]  # words of a thread and step, of the prediction
            others = 4 if dtype == 3 else 2  # and of the target and the noise
            places = 3  # before the factors, and in the loops for the squared error and for Huber's
            assert read_only == places * (vectors + 2 * others), (name, read_only)
        assert wide_stores >= vectors, (name, wide_stores)


def test_the_only_atomic_is_the_ticket(compiled: Callable[[str], Compiled]) -> None:
    atomics = set(re.findall(r"\b(?:atom|red)\.\S+", "".join(compiled("90").kernels.values())))
    assert atomics == {"atom.global.inc.u32"}  # the ticket


def cuobjdump() -> str:
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    if found is None and (triton := importlib.util.find_spec("triton")) and triton.origin:
        found = shutil.which(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    if found is None:
        pytest.skip("cuobjdump is not installed, alone or with triton")
    return found


def loops(instructions: list[tuple[int, str]]) -> Iterator[list[str]]:
    """What stands between each backward branch and its target."""
    for address, text in instructions:
        if (branch := re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)) and int(branch[1], 16) < address:
            yield [text for at, text in instructions if int(branch[1], 16) <= at <= address]


# Instructions of sm_90 per eight elements: a squared error, Huber's. Keys as in the kernels' names: dtype of the
# prediction, and whether target and noise have it too.
INSTRUCTIONS = {
    "forward": {
        "0b1": (81, 161), "1b1": (108, 188), "2b1": (108, 188), "3b1": (88, 216),
        "0b0": (236, 316), "1b0": (247, 327), "2b0": (247, 327), "3b0": (234, 362),
    },
    "backward": {
        "0b1": (70, 94), "1b1": (97, 123), "2b1": (97, 123), "3b1": (78, 118),
        "0b0": (227, 251), "1b0": (236, 261), "2b0": (235, 260), "3b0": (224, 264),
    },
}  # fmt: skip


def test_the_loops_over_elements_are_short(compiled: Callable[[str], Compiled]) -> None:
    """A loop over elements has 128-bit loads. Counted is all of it, so also what a call without noise jumps over."""
    expected = {
        (f"{pass_}{key}", huber) for pass_, counts in INSTRUCTIONS.items() for key in counts for huber in (0, 1)
    }
    sass = run(cuobjdump(), "--dump-sass", compiled("90").machine_code)
    for function in sass.split("Function : ")[1:]:
        found = re.search(r"(forward|backward)_kernelILi(\d)EL(b\d)E", function)
        if not found:
            continue
        key = found[2] + found[3]
        vectors = 2 if key in ("1b1", "2b1") else 1  # of eight elements, in a step
        instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/ +(.*?);", function)]
        of_elements = [loop for loop in loops(instructions) if any("LDG.E.128" in text for text in loop)]
        for huber in (0, 1):  # which clamps each element: at least two comparisons
            suits = [loop for loop in of_elements if (comparisons(loop) >= 16) == bool(huber)]
            shortest = min(suits, key=len)
            most = 1.05 * INSTRUCTIONS[found[1]][key][huber]
            assert len(shortest) / vectors <= most, (found[1], key, huber, len(shortest))
            expected.remove((found[1] + key, huber))
            if key in ("0b1", "1b1", "2b1"):
                # All loads of a step stand together, with no arithmetic on elements between them.
                loads = [i for i, text in enumerate(shortest) if "LDG.E.128" in text]
                assert not any(re.match(r"F(MUL|FMA|ADD)\b", text) for text in shortest[loads[0] : loads[-1]]), key
    assert not expected


def comparisons(loop: list[str]) -> int:
    return sum(re.search(r"FMNMX|[FD]SETP", text) is not None for text in loop)
