"""Installing with and without compilers: from an sdist, as a wheel and editable; a missing one never fails an install.

Each environment borrows torch from the one that runs the tests; what it may find of compilers is what PATH says.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import vadiff_native

ROOT = Path(__file__).resolve().parent.parent
FAST = {"CXXFLAGS": "-O0"}  # what is compiled here is loaded and run once

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists() or sys.platform == "win32", reason="needs vadiff's source tree"
)

PROGRAM = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]  # of the tests' vadiff
import torch, vadiff
from vadiff.doctor import report
print(report())
batch = torch.randn(4, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 8, 8), torch.randn(4)
loss = vadiff.DiffusionLoss()(*batch)
loss.backward()
print("loss", loss.item(), "from", vadiff.__file__)
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    for package in ("build", "pybind11", "ninja"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"  # a copy: building leaves things behind
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "*.so", "_native_build.txt", "*.egg-info")
    )
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, source)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir() and path != source)


def run(*command: str | Path, ok: bool = True, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH", "CXX")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**kept, **environment}, cwd=Path(sys.prefix)
    )
    said = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, said
    return said


@pytest.fixture
def no_nvcc(tmp_path: Path) -> dict[str, str]:
    """An environment with everything a build needs but nvcc."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("c++", "g++", "gcc", "cc", "as", "ld", "sh", "env"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    if not (tools / "c++").exists():
        pytest.skip("no C++ compiler")
    return {"PATH": str(tools), "CUDA_HOME": str(tmp_path), **FAST}


def install(source: Path, folder: Path, **environment: str) -> str:
    """Install a wheel of `source` into `folder` and run PROGRAM there; what both said."""
    pip = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-v")
    built = run(*pip, "--target", folder, source, **environment)
    return built + run(sys.executable, "-c", PROGRAM, PYTHONPATH=str(folder))


def test_the_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    names = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    needed = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert needed | {"setup.py", "pyproject.toml", "LICENSE", "triton_kernels/rows.py", "vadiff/py.typed"} <= names
    assert not {name for name in names if name.endswith((".so", "_native_build.txt"))}


def test_without_any_compiler_it_installs_and_works(sdist: Path, tmp_path: Path) -> None:
    said = install(sdist, tmp_path / "env", PATH=str(tmp_path), CUDA_HOME=str(tmp_path))
    assert f"from {tmp_path}" in said
    assert "native    no" in said
    assert "no C++ compiler was found. Install one (Debian, Ubuntu: apt install g++), then run" in said


def test_with_a_compiler_and_no_nvcc_there_are_cpu_kernels(
    sdist: Path, tmp_path: Path, no_nvcc: dict[str, str]
) -> None:
    said = install(sdist, tmp_path / "env", **no_nvcc)
    assert f"from {tmp_path}" in said
    assert "native    yes  CPU tensors" in said
    assert "no nvcc was found when vadiff was installed" in said
    assert "Install the CUDA toolkit, or set CUDA_HOME, then run" in said


def test_with_both_there_are_cuda_kernels() -> None:
    """The environment that runs the tests: `make install` built it, in a fresh clone."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    assert "sm_" in (vadiff_native().CUDA_ARCHITECTURES or "")


def test_editable_without_nvcc(sdist: Path, tmp_path: Path, no_nvcc: dict[str, str]) -> None:
    source = tmp_path / "source"
    shutil.copytree(sdist, source)
    run(
        sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target",
        tmp_path / "env", "--editable", source, **no_nvcc,
    )  # fmt: skip
    assert list((source / "vadiff").glob("_native*.so"))
    assert "no nvcc was found" in (source / "vadiff/_native_build.txt").read_text()
    said = run(sys.executable, "-c", PROGRAM, PYTHONPATH=str(source))
    assert "native    yes  CPU tensors" in said


def test_a_compiler_that_fails_does_not_fail_the_install(sdist: Path, tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: the disk of the compiler is full' >&2\nexit 1\n")
    broken.chmod(0o755)
    said = install(sdist, tmp_path / "env", PATH=f"{tmp_path}:/bin", CXX=str(broken), VADIFF_CUDA="0")
    assert "native    no" in said
    assert "failed: fatal error: the disk of the compiler is full" in said


@pytest.mark.parametrize(
    ("wish", "expected"),
    [("1", "VADIFF_CUDA=1, but no nvcc was found"), ("yes", "VADIFF_CUDA is 'yes', expected auto, 0 or 1")],
)
def test_cuda_that_was_asked_for_and_cannot_be_fails_loudly(
    sdist: Path, tmp_path: Path, no_nvcc: dict[str, str], wish: str, expected: str
) -> None:
    command = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target")
    said = run(*command, tmp_path / "env", sdist, ok=False, VADIFF_CUDA=wish, **no_nvcc)
    assert expected in said
    assert not (tmp_path / "env" / "vadiff").exists()
