"""csrc/ as compilers see it: the shared header's unit tests, and what nvcc makes of the CUDA kernels."""

from __future__ import annotations

import ast
import ctypes
import re
import shutil
import subprocess
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


@pytest.fixture(scope="module")
def compiled(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """For each architecture what ptxas says and the PTX."""
    folder = tmp_path_factory.mktemp("cuda")
    found = {}
    for architecture in ARCHITECTURES:
        keep = folder / architecture
        keep.mkdir()
        said = run(
            nvcc, "-std=c++17", "-O3", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas=-v",
            "-Xcompiler=-fPIC", "--keep", "--keep-dir", keep, "-c", ROOT / "csrc/cuda.cu", "-o", keep / "cuda.o",
        )  # fmt: skip
        found[architecture] = said, next(keep.glob("*.ptx")).read_text()
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cuda_kernels_compile_without_spilling(compiled: dict[str, tuple[str, str]], architecture: str) -> None:
    said, _ = compiled[architecture]
    assert "warning" not in said
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) == 9  # forward, finish, backward, scale in float and double; fold
    assert set(spills) == {("0", "0")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_large_tensors_are_read_and_written_in_128_bit_accesses(
    compiled: dict[str, tuple[str, str]], architecture: str
) -> None:
    _, ptx = compiled[architecture]
    kernels = {match[1]: match[0] for match in re.finditer(r"\.entry (\w+)\(.*?\n}", ptx, re.DOTALL)}
    of_elements = {name: text for name, text in kernels.items() if re.search("(forward|backward|scale)_kernelI", name)}
    assert len(of_elements) == 6
    for name, text in of_elements.items():
        read_only = len(re.findall(r"ld\.global\.nc\.v4\.[bu]32", text))
        wide_loads = len(re.findall(r"ld\.global\.v4\.[bfu]32|ld\.global\.v2\.[bfu]64", text))
        wide_stores = len(re.findall(r"st\.global\.v4\.[bfu]32|st\.global\.v2\.[bf]64", text))
        tensors, vectors = 3, 4 if "kernelId" in name else 2  # tensors read; 128-bit words of eight elements
        if "scale_kernel" in name:  # may write where it reads; its loop stands once or once per dtype, as nvcc chooses
            assert wide_loads >= vectors, (name, wide_loads)
            assert read_only == 0, (name, read_only)
        else:
            assert read_only == tensors * vectors, (name, read_only)
        assert wide_stores >= vectors, (name, wide_stores)


def test_the_only_atomic_is_the_ticket(compiled: dict[str, tuple[str, str]]) -> None:
    atomics = set(re.findall(r"\b(?:atom|red)\.\S+", compiled["90"][1]))
    assert atomics == {"atom.global.inc.u32"}  # the ticket
