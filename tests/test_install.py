"""Installing with and without compilers: from an sdist, as a wheel and editable; a missing one never fails an install.

Each is a new virtual environment that borrows torch from the one that runs the tests; what it may find of compilers is
what PATH says.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import vadiff

# Not imported, nor looked for: whoever does takes setuptools' distutils away, and then torch.compile cannot import it.
PIP = next((found.locate_file("pip") for found in importlib.metadata.distributions(name="pip")), None)
if PIP is None:
    pytest.skip("pip is not installed", allow_module_level=True)
ROOT = Path(__file__).resolve().parent.parent
FAST = {"CXXFLAGS": "-O0"}  # what is compiled here is loaded and run once,
FAST_CUDA = {"NVCC_APPEND_FLAGS": "-Xcicc -O1 -Xptxas -O0"}  # and on no GPU

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists() or sys.platform == "win32", reason="needs vadiff's source tree"
)

NINJA = Path(sysconfig.get_path("scripts"), "ninja")  # the program of its package
PROGRAM = """
import torch, vadiff
from vadiff.trainer.doctor import report
print(report())
batch = torch.randn(4, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 8, 8), torch.randn(4)
loss = vadiff.DiffusionLoss()(*batch)
loss.backward()
print("loss", loss.item(), "from", vadiff.__file__)
"""
# Writes what it is asked for, empty: for what is decided without looking into it.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  case $1 in -o) out=$2 ;; -MF) echo "$2:" >"$2" ;; --list-gpu-code) echo sm_75; echo sm_90 ;; esac
  shift
done
[ -z "$out" ] || : >"$out"
"""
# Runs the command that it is given; what differs in its paths alone is compiled once. Of the headers elsewhere than in
# csrc/, only pybind11's may differ: build isolation has its own.
COMPILE_ONCE = """
import hashlib, os, pathlib, shutil, subprocess, sys
kept, *command = sys.argv[1:]
if "-c" not in command or "-MF" not in command:
    os.execv(command[0], command)
digest = hashlib.sha256()
for word in command:
    if not word.startswith("-I"):
        digest.update(os.path.basename(word).encode() + b" ")
    elif (header := pathlib.Path(word[2:], "pybind11/detail/common.h")).exists():
        digest.update(header.read_bytes())
kept = pathlib.Path(kept, digest.hexdigest())
out, depfile = (command[command.index(flag) + 1] for flag in ("-o", "-MF"))
if kept.exists():
    shutil.copy(kept, out)
    pathlib.Path(depfile).write_text(f"{out}:\\n")
elif code := subprocess.call(command):
    sys.exit(code)
else:
    part = f"{kept}.{os.getpid()}"
    shutil.copy(out, part)
    os.replace(part, kept)
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    for package in ("build", "pybind11", "ninja"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"  # a copy: building leaves things behind
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "*.so", "*.egg-info"))
    (source / "vadiff" / "_native_build.txt").write_text("of the machine that made the sdist")
    (source / "vadiff" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, source)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir() and path != source)


def run(*command: str | Path, ok: bool | None = True, cwd: Path | None = None, **environment: str) -> str:
    """What a command said; whether it must end well (True), must not (False), or may do either (None)."""
    ours = ("VADIFF_", "CUDA_HOME", "CUDA_PATH", "CXX", "LDFLAGS", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="backslashreplace", timeout=300, env={**kept, **environment},
        cwd=cwd or Path(sys.prefix),
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert ok is None or (done.returncode == 0) == ok, said
    return said


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A launcher for compilers: see COMPILE_ONCE."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    kept = folder / "compiled once"
    kept.mkdir(exist_ok=True)
    program = script(tmp_path_factory.mktemp("on ce") / "once.py", COMPILE_ONCE)
    command = f"'{sys.executable}' -S '{program}' '{kept}'"
    return script(program.with_name("launcher"), f'#!/bin/sh\nexec {command} "$@"\n')


def tools(folder: Path) -> dict[str, str]:
    """An environment with everything a build needs but nvcc; `folder` is made."""
    folder.mkdir()
    for name in ("c++", "g++", "gcc", "cc", "as", "ld", "sh", "env"):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    if not (folder / "c++").exists():
        pytest.skip("no C++ compiler")
    return {"PATH": str(folder), "CUDA_HOME": str(folder), **FAST}


def with_once(once: Path, environment: dict[str, str]) -> dict[str, str]:
    return {**environment, "CXX": f"'{once}' {environment['PATH']}/c++"}


def tools_and_nvcc(folder: Path, once: Path) -> dict[str, str]:
    """One with both, in folders with spaces, behind a launcher; and flags with commas, which nvcc would split."""
    nvcc, compiler = shutil.which("nvcc"), shutil.which("c++")
    if nvcc is None or compiler is None:
        pytest.skip("nvcc or c++ is not installed")
    script(folder / "cu da/bin/nvcc", f"#!/bin/sh\nexec '{once}' {nvcc} \"$@\"\n")
    return {
        "CXX": f"'{once}' {compiler} -DGIVEN", "CUDA_HOME": str(folder / "cu da"), "VADIFF_CUDA": "1",
        "VADIFF_CUDA_ARCHITECTURES": "90", "LDFLAGS": "-Wl,-z,now -Wl,-rpath,'$ORIGIN'", **FAST, **FAST_CUDA,
    }  # fmt: skip


def new_environment(folder: Path) -> Path:
    """An empty virtual environment; its Python."""
    venv.EnvBuilder(symlinks=True).create(folder)
    return folder / "bin" / "python"


def packages_of(folder: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(folder), "platbase": str(folder)}))


def borrow(folder: Path) -> None:
    """From here on an environment has the packages of the tests' own; not its editable ones, whose .pth is not read."""
    ours = {str(Path(torch.__file__).parents[1]), sysconfig.get_path("purelib")}
    (packages_of(folder) / "borrowed.pth").write_text("\n".join(ours))
    (folder / "bin" / "ninja").symlink_to(NINJA)


def pip_install(python: Path, *arguments: str | Path, ok: bool | None = True, **environment: str) -> str:
    """By the pip that the tests' own environment has."""
    return run(python, Path(str(PIP)), "install", "--no-deps", "-v", *arguments, ok=ok, **environment)


LOCAL = ("--no-build-isolation", "--no-index")


def install(folder: Path, *source: str | Path, **environment: str) -> str:
    """Install `source` into a new environment and run PROGRAM there; what that said."""
    python = new_environment(folder)
    borrow(folder)
    pip_install(python, *LOCAL, *source, **environment)
    return run(python, "-c", PROGRAM)


def compile_only(
    source: Path, folder: Path, ok: bool = True, python: str | Path = sys.executable, **environment: str
) -> tuple[str, bool]:
    """Run setup.py alone; what it said, and whether there is a module."""
    environment = {"PATH": "/usr/bin:/bin", "CUDA_HOME": str(folder), **environment}
    command = (python, "setup.py", "build", "--build-base", folder / "build", "--build-lib", folder / "lib")
    said = run(*command, ok=ok, cwd=source, **environment)
    module = bool(list(folder.glob("lib/vadiff/_native*.so")))
    if ok:
        assert (folder / "lib/vadiff/_native_build.txt").read_text() in said
    return said, module


def test_the_sdist_holds_what_a_build_needs_and_nothing_that_one_made(sdist: Path) -> None:
    names = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    needed = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert needed | {"setup.py", "pyproject.toml", "LICENSE", "triton_kernels/rows.py", "vadiff/py.typed"} <= names
    assert not {name for name in names if name.endswith((".so", "_native_build.txt")) or name.startswith("tests/")}


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made of the source distribution, without native kernels."""
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, sdist, VADIFF_NATIVE="0"
    )  # fmt: skip
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_has_every_module_and_data_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        found = {name for name in file.namelist() if ".dist-info/" not in name}
    wanted = {str(path.relative_to(ROOT)) for path in ROOT.glob("vadiff/**/*.py")}
    wanted |= {f"vadiff/{path.relative_to(ROOT)}" for path in ROOT.glob("triton_kernels/**/*.py")}
    data = {"vadiff/py.typed", "vadiff/_native.pyi", "vadiff/trainer/report/page.html", "vadiff/_native_build.txt"}
    assert found == wanted | data


def test_the_version_of_a_wheel_is_the_packages_and_stands_in_one_place(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = file.read(name).decode()
    assert f"\nVersion: {vadiff.__version__}\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata
    code = [ROOT / "setup.py", ROOT / "pyproject.toml", *ROOT.glob("vadiff/**/*.py")]
    assert [path.name for path in code if f'"{vadiff.__version__}"' in path.read_text()] == ["_version.py"]
    assert f"\n## [{vadiff.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_an_index_would_take_sdist_and_wheel(sdist: Path, wheel: Path) -> None:
    pytest.importorskip("twine")
    (archive,) = sdist.parent.glob("*.tar.gz")
    said = run(sys.executable, "-m", "twine", "check", "--strict", wheel, archive)
    assert said.count("PASSED") == 2


def test_wheels_without_a_python_that_can_use_them_are_refused(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; sys.version_info = (3, 9); $2"\n')
    old.chmod(0o755)
    for pythons, said in (([], "no Python to build a wheel for"), ([old], "is older than Python 3.10")):
        refused = subprocess.run(
            [ROOT / ".ci" / "wheels", tmp_path / "dist", *pythons], capture_output=True, text=True, check=False
        )
        assert refused.returncode != 0
        assert said in refused.stderr


def copied(sdist: Path, folder: Path) -> Path:
    """A copy that an editable install may write into, in a folder that shells and ninja would misread."""
    return Path(shutil.copytree(sdist, folder / "sour ce: of $HOME", ignore=shutil.ignore_patterns("build")))


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_without_any_compiler_it_installs_and_works(sdist: Path, tmp_path: Path, editable: bool) -> None:
    source: tuple[str | Path, ...] = ("--editable", copied(sdist, tmp_path)) if editable else (sdist,)
    said = install(tmp_path / "env", *source, PATH=str(tmp_path), CUDA_HOME=str(tmp_path))
    assert f"from {source[-1] if editable else tmp_path / 'env'}/" in said
    why = "the native kernels are not built. When vadiff was built, no C++ compiler was found"
    assert f"native    no   {why}" in said
    assert "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select" in said
    assert "), then run, in the folder of vadiff's source: pip install --force-reinstall --no-deps ." in said


def test_with_a_compiler_and_no_nvcc_there_are_cpu_kernels(sdist: Path, tmp_path: Path, once: Path) -> None:
    environment = with_once(once, tools(tmp_path / "tools"))
    said = install(tmp_path / "env", sdist, VADIFF_NATIVE="1", **environment)
    assert f"from {tmp_path / 'env'}/" in said
    assert "native    yes  CPU tensors" in said
    assert "When vadiff was built, no nvcc was found (Triton does without): CUDA kernels were left out." in said
    assert "Install the CUDA toolkit (pip install 'cuda-toolkit[nvcc,cudart,cccl]==13.*'; with an NVIDIA driver" in said
    assert "), or set CUDA_HOME to the one there is, then run" in said


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_with_both_there_are_cuda_kernels(sdist: Path, tmp_path: Path, once: Path, editable: bool) -> None:
    source: tuple[str | Path, ...] = ("--editable", copied(sdist, tmp_path)) if editable else (sdist,)
    said = install(tmp_path / "env", *source, **tools_and_nvcc(tmp_path, once))
    assert f"from {source[-1] if editable else tmp_path / 'env'}/" in said
    assert "CUDA tensors (sm_90)" in said
    assert "left out" not in said


def test_build_isolation_brings_what_a_build_needs_and_no_torch(sdist: Path, tmp_path: Path, once: Path) -> None:
    """Five seconds where another test compiled, and an index; the environment is empty until vadiff is installed."""
    python = new_environment(tmp_path / "env")
    environment = with_once(once, tools(tmp_path / "tools"))
    said = pip_install(python, "--retries", "0", sdist, ok=None, VADIFF_NATIVE="1", **environment)
    if re.search(r"the requirement (setuptools|pybind11|ninja)\S* \(from versions: none\)", said):
        pytest.skip("no package index is within reach, and build isolation needs one")
    assert "Successfully installed vadiff" in said, said
    run(python, "-c", "import torch", ok=False)
    borrow(tmp_path / "env")
    said = run(python, "-c", PROGRAM)
    assert "native    yes  CPU tensors" in said
    assert f"from {tmp_path / 'env'}/" in said


@pytest.fixture(scope="module")
def editable(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An editable install by a compiler without OpenMP: the environment's Python, and the source."""
    folder = tmp_path_factory.mktemp("editable")
    environment = tools(folder / "tools")
    compiler = f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1 ;; esac\nexec {folder}/tools/c++ "$@"\n'
    environment["CXX"] = f"'{script(folder / 'com piler/c++', compiler)}' -DGIVEN"
    source = copied(sdist, folder)
    python = new_environment(folder / "env")
    borrow(folder / "env")
    pip_install(python, *LOCAL, "--editable", source, VADIFF_NATIVE="1", **environment)
    return python, source


def test_an_editable_install_compiles_into_the_source_and_says_what_it_lacks(editable: tuple[Path, Path]) -> None:
    python, source = editable
    assert not (packages_of(python.parents[1]) / "vadiff").exists()
    said = run(python, "-c", PROGRAM)
    assert "native    yes  CPU tensors" in said
    assert f"from {source}" in said
    assert "did not accept -fopenmp: threads of the native CPU kernels were left out. Set CXX to a compiler" in said


def test_after_a_rebuild_that_failed_nothing_stale_is_left(editable: tuple[Path, Path], tmp_path: Path) -> None:
    python, source = editable
    earlier = list((source / "vadiff").glob("_native*.so"))
    broken = script(tmp_path / "c++", "#!/bin/sh\necho 'loss_math.h:1: error: no such number' >&2\nexit 1\n")
    rebuild = (sys.executable, "setup.py", "build_ext", "--inplace")
    run(*rebuild, cwd=source, CXX=str(broken), VADIFF_CUDA="0", VADIFF_NATIVE="1", ok=False)
    assert list((source / "vadiff").glob("_native*.so")) == earlier != []  # that failed loudly
    run(*rebuild, cwd=source, CXX=str(broken), VADIFF_CUDA="0")
    assert list((source / "vadiff").glob("_native*.so")) == []
    assert "native    no   the native kernels are not built. When vadiff was built, " in (
        said := run(python, "-c", PROGRAM)
    )
    assert "c++ failed: loss_math.h:1: error: no such number: all native kernels were left out" in said


def test_a_compiler_that_fails_does_not_fail_the_install(sdist: Path, tmp_path: Path) -> None:
    broken = script(tmp_path / "c++", "#!/bin/sh\necho 'fatal error: the disk of the compiler is full' >&2\nexit 1\n")
    said = install(tmp_path / "env", sdist, PATH=f"{tmp_path}:/bin", CXX=str(broken), VADIFF_CUDA="0")
    assert "native    no" in said
    assert "failed: fatal error: the disk of the compiler is full: all native kernels were left out" in said


def test_the_note_quotes_the_error_and_not_the_command(sdist: Path, tmp_path: Path) -> None:
    broken = script(tmp_path / "c++", "#!/bin/sh\necho In file: >&2\necho 'a.h:1: error: real' >&2\nexit 1\n")
    said, module = compile_only(sdist, tmp_path, CXX=str(broken), CXXFLAGS="-Werror -D'NOTE=an error: no'")
    assert not module
    assert f"{broken} failed: a.h:1: error: real: all native kernels were left out" in said


def test_compiler_output_may_be_undecodable(sdist: Path, tmp_path: Path) -> None:
    broken = script(tmp_path / "c++", "#!/bin/sh\nprintf 'a.h:1: error: caf\\351 \\377\\n'\nexit 1\n")
    said, module = compile_only(sdist, tmp_path, CXX=str(broken))
    assert not module
    assert f"{broken} failed: a.h:1: error: caf\\xe9 \\xff: all native kernels were left out" in said
    said, _ = compile_only(sdist, tmp_path, ok=False, CXX=str(broken), VADIFF_NATIVE="1")
    assert "VADIFF_NATIVE=1, but" in said


@pytest.mark.parametrize(
    ("name", "value", "module"),
    [("CXX", "c++ 'oops", False), ("CXXFLAGS", "-DX='oops", False), ("LDFLAGS", "'", False), ("CC", "'oops", True)],
)
def test_flags_that_no_shell_would_read_fail_no_install(
    sdist: Path, tmp_path: Path, name: str, value: str, module: bool
) -> None:
    environment = {
        "CXX": str(script(tmp_path / "c++", COMPILER)),
        name: value,
    }  # CC is not used here, but by setuptools
    said, found = compile_only(sdist, tmp_path, **environment)
    assert found == module
    if not module:
        assert f"${name} was " in said
        assert "which no shell would read (No closing quotation): all native kernels were left out. Correct or" in said
        said, _ = compile_only(sdist, tmp_path, ok=False, VADIFF_CUDA="1", **environment)
        assert "VADIFF_CUDA=1, but " in said


def test_a_build_folder_that_cannot_be_written_fails_no_install(sdist: Path, tmp_path: Path) -> None:
    (tmp_path / "build").write_text("where a folder should be")
    environment = {"CXX": str(script(tmp_path / "c++", COMPILER))}
    said, module = compile_only(sdist, tmp_path, **environment)
    assert not module
    assert f"the build folder was not writable ({tmp_path}/build" in said
    assert "Make it writable, or remove" in said
    said, _ = compile_only(sdist, tmp_path, ok=False, VADIFF_NATIVE="1", **environment)
    assert "VADIFF_NATIVE=1, but the build folder was not writable" in said


def test_without_the_headers_of_python_the_note_names_their_package(sdist: Path, tmp_path: Path) -> None:
    """A compiler that does not find them, and a Python that says they are elsewhere than they are."""
    error = "a.h:1:10: fatal error: Python.h: No such file or directory"
    compiler = script(tmp_path / "c++", f"#!/bin/sh\necho '{error}' >&2\nexit 1\n")
    script(
        tmp_path / "site/sitecustomize.py",
        "import sysconfig\nfind = sysconfig.get_path\n"
        "sysconfig.get_path = lambda name, *more: '/nowhere' if name == 'include' else find(name, *more)\n",
    )
    environment = {"CXX": str(compiler), "VADIFF_CUDA": "0"}
    said, _ = compile_only(sdist, tmp_path, PYTHONPATH=str(tmp_path / "site"), **environment)
    assert f"failed: {error}: all native kernels were left out. Install Python's headers (Debian, Ubuntu: apt" in said
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    assert f"apt install {package}; Fedora: dnf install python3-devel), then run, in the folder" in said
    said, _ = compile_only(sdist, tmp_path, **environment)
    assert "Install Python's headers" not in said  # which are there: something else is amiss


@pytest.mark.parametrize("package", ["ninja", "pybind11"])
def test_without_build_isolation_what_a_build_needs_is_named(sdist: Path, tmp_path: Path, package: str) -> None:
    script(tmp_path / f"site/{package}.py", f"raise ImportError('there is no {package} here')\n")
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(tmp_path / "site"), "VADIFF_CUDA": "0"}
    environment["CXX"] = str(script(tmp_path / "c++", COMPILER))
    said, module = compile_only(sdist, tmp_path, **environment)
    assert not module
    assert f"When vadiff was built, {package} was not found" in said
    assert f"Leave out --no-build-isolation, or install it (pip install {package}), then run, in the folder" in said
    if package == "ninja":  # the system's will do
        (tmp_path / "ninja").symlink_to(NINJA)
        assert compile_only(sdist, tmp_path, **environment)[1]


def test_the_nvcc_that_pip_installed_is_found(sdist: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "env")
    borrow(tmp_path / "env")
    nvcc = script(packages_of(tmp_path / "env") / "nvidia/cu13/bin/nvcc", COMPILER)
    environment = {"CXX": str(script(tmp_path / "c++", COMPILER)), "PATH": str(tmp_path), "CUDA_HOME": ""}
    _, module = compile_only(sdist, tmp_path, python=python, VADIFF_CUDA="1", **environment)
    assert module
    (build_file,) = tmp_path.glob("build/temp*/cuda/build.ninja")
    assert f"command = {nvcc} " in build_file.read_text()


@pytest.mark.parametrize(
    ("nvcc", "expected"),
    [
        ("#!/bin/sh\necho 'nvcc fatal: no profile'; exit 1\n", "--list-gpu-code failed: nvcc fatal: no profile"),
        ("#!/bin/sh\necho sm_75\n", "nvcc knew none of the architectures 80 90 100"),
        ("\x7fELF", "nvcc did not run (Exec format error)"),
    ],
    ids=["fails", "old", "unrunnable"],
)
def test_unusable_nvcc_is_noted_and_fails_only_a_requested_cuda_build(
    sdist: Path, tmp_path: Path, nvcc: str, expected: str
) -> None:
    script(tmp_path / "bin/nvcc", nvcc)
    environment = {"CXX": str(script(tmp_path / "c++", COMPILER))}
    said, module = compile_only(sdist, tmp_path, **environment)
    assert module
    assert expected in said
    assert "CUDA kernels were left out" in said
    said, _ = compile_only(sdist, tmp_path, ok=False, VADIFF_CUDA="1", **environment)
    assert f"VADIFF_CUDA=1, but {tmp_path}/bin/" in said
    assert expected in said


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"CXX": "no-such-c++ -m64"}, "$CXX was 'no-such-c++', which was not found"),
        ({"CXX": "{broken}"}, "c++ did not run (Exec format error)"),
        ({"VADIFF_NATIVE": "0"}, "VADIFF_NATIVE was 0: all native kernels were left out. Unset it, then run"),
    ],
    ids=["missing", "unrunnable", "not wanted"],
)
def test_without_a_compiler_that_runs_nothing_is_compiled(
    sdist: Path, tmp_path: Path, environment: dict[str, str], expected: str
) -> None:
    broken = script(tmp_path / "c++", "\x7fELF")
    environment = {name: value.format(broken=broken) for name, value in environment.items()}
    said, module = compile_only(sdist, tmp_path, **environment)
    assert not module
    assert expected in said


def test_cpu_kernels_only_where_cuda_was_not_wanted_say_how_to_get_it(sdist: Path, tmp_path: Path) -> None:
    said, module = compile_only(sdist, tmp_path, CXX=str(script(tmp_path / "c++", COMPILER)), VADIFF_CUDA="0")
    assert module
    assert "VADIFF_CUDA was 0 (NVIDIA GPUs use Triton): CUDA kernels were left out. Unset it, then run" in said


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"VADIFF_CUDA": "1"}, "VADIFF_CUDA=1, but no nvcc was found"),
        ({"VADIFF_CUDA": "1", "VADIFF_NATIVE": "0"}, "VADIFF_CUDA=1, but VADIFF_NATIVE was 0"),
        ({"VADIFF_CUDA": "yes"}, "VADIFF_CUDA is 'yes', expected auto, 0 or 1"),
        ({"VADIFF_NATIVE": "yes"}, "VADIFF_NATIVE is 'yes', expected auto, 0 or 1"),
        ({"VADIFF_NATIVE": "1", "CXX": "no-such-c++"}, "VADIFF_NATIVE=1, but $CXX was 'no-such-c++'"),
        ({"VADIFF_NATIVE": "1", "CXX": "false"}, "false failed: it said nothing"),
        ({"VADIFF_CUDA_ARCHITECTURES": "9.0"}, "VADIFF_CUDA_ARCHITECTURES is '9.0', expected numbers as 80 90"),
        ({"VADIFF_CUDA_ARCHITECTURES": "80 90a"}, "VADIFF_CUDA_ARCHITECTURES is '80 90a', expected numbers as 80 90"),
    ],
    ids=str,
)
def test_requested_kernels_that_cannot_be_built_fail_the_installation(
    sdist: Path, tmp_path: Path, environment: dict[str, str], expected: str
) -> None:
    environment = {"CXX": str(script(tmp_path / "c++", COMPILER)), **environment}
    said, module = compile_only(sdist, tmp_path, ok=False, **environment)
    assert expected in said
    assert not module


def test_an_install_that_fails_loudly_leaves_nothing(sdist: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "env")
    borrow(tmp_path / "env")
    said = pip_install(python, *LOCAL, sdist, ok=False, VADIFF_CUDA="yes")
    assert "VADIFF_CUDA is 'yes', expected auto, 0 or 1" in said
    assert not (packages_of(tmp_path / "env") / "vadiff").exists()
