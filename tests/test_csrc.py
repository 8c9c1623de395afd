"""csrc/ as compilers see it: the shared header's unit tests, and what nvcc makes of the CUDA kernels."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

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
    of_elements = {name: text for name, text in kernels.items() if re.search("(forward|backward)_kernelI", name)}
    assert len(of_elements) == 4
    for name, text in of_elements.items():
        wide_loads = len(re.findall(r"ld\.global\.nc\.v4\.[bu]32", text))
        wide_stores = len(re.findall(r"st\.global\.v4\.[bfu]32|st\.global\.v2\.[bf]64", text))
        tensors, vectors = 3, 4 if "kernelId" in name else 2  # output, target, noise; 128-bit words of eight elements
        assert wide_loads == tensors * vectors, (name, wide_loads)
        assert wide_stores >= vectors, (name, wide_stores)


def test_the_only_atomic_is_the_ticket(compiled: dict[str, tuple[str, str]]) -> None:
    atomics = set(re.findall(r"\b(?:atom|red)\.\S+", compiled["90"][1]))
    assert atomics == {"atom.global.inc.u32"}  # the ticket
