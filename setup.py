"""Packages of vadiff, and its compiled kernels where this machine can compile them. The rest: pyproject.toml.

`vadiff/`, and the top-level `triton_kernels/` as `vadiff.triton_kernels`: a top-level package of that name would clash
with another project's.

The kernels of csrc/ become `vadiff._native`. A C++ compiler ($CXX, c++, g++, clang++) gives those for CPUs, and nvcc
($CUDA_HOME, PATH, /usr/local/cuda) those for NVIDIA GPUs. Without them, or when they fail, vadiff installs and works on
PyTorch and Triton; what was left out and why goes into `vadiff/_native_build.txt`, for `vadiff doctor`.

    VADIFF_CUDA=auto   CUDA kernels where nvcc is found (default)
    VADIFF_CUDA=0      none
    VADIFF_CUDA=1      CUDA kernels, or the installation fails
    VADIFF_CUDA_ARCHITECTURES="80 90"   instead of all that are known and nvcc can do (80 90 100)
    CXXFLAGS, LDFLAGS  added to what compiles and links, as usual
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
REINSTALL = "then run, in the folder of vadiff's source: pip install --force-reinstall --no-deps ."
ARCHITECTURES = ("80", "90", "100")  # what nvcc does not know is left out; the highest is added as PTX for later ones
INSTRUCTION_SETS = {
    "generic": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512",
}


class BuildNative(build_ext):
    """Writes a build.ninja and runs it; falls back to fewer kernels where something is missing or fails."""

    def build_extension(self, extension: Extension) -> None:
        wish = os.environ.get("VADIFF_CUDA") or "auto"
        if wish not in ("auto", "0", "1"):
            raise SystemExit(f"VADIFF_CUDA is {wish!r}, expected auto, 0 or 1")
        target = Path(self.get_ext_fullpath(extension.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        notes = self._build(target, wish)
        self.note = target.with_name("_native_build.txt")
        self.note.write_text(" ".join(notes))
        for note in notes:
            print(f"vadiff: {note}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        shutil.copy(self.note, HERE / "vadiff")

    def _build(self, target: Path, wish: str) -> list[str]:
        """Build as much as can be built; what could not, and what to do about it."""
        compiler = _compiler()
        if compiler is None or sys.platform == "win32":
            why = "no C++ compiler was found" if compiler is None else "csrc/ does not build on Windows"
            if wish == "1":
                raise SystemExit(f"VADIFF_CUDA=1, but {why}")
            return [f"When vadiff was installed, {why}. Install one (Debian, Ubuntu: apt install g++), {REINSTALL}"]
        notes = []
        nvcc = None if wish == "0" else _nvcc()
        if wish == "1" and nvcc is None:
            raise SystemExit("VADIFF_CUDA=1, but no nvcc was found: install the CUDA toolkit, or set CUDA_HOME to it")
        if nvcc is not None:
            trouble = self._ninja(target, compiler, nvcc)
            if trouble is None:
                return notes
            if wish == "1":
                raise SystemExit(f"VADIFF_CUDA=1, but the CUDA kernels did not compile:\n{trouble}")
            notes.append(f"CUDA kernels were left out, nvcc failed: {_last_line(trouble)}.")
        elif wish == "auto":
            notes.append(
                "CUDA kernels were left out, no nvcc was found when vadiff was installed (Triton does without). "
                f"Install the CUDA toolkit, or set CUDA_HOME, {REINSTALL}"
            )
        trouble = self._ninja(target, compiler, None)
        if trouble is not None:
            print(trouble, file=sys.stderr)
            notes.append(f"When vadiff was installed, {compiler} failed: {_last_line(trouble)}. Mend it, {REINSTALL}")
        return notes

    def _ninja(self, target: Path, compiler: str, nvcc: str | None) -> str | None:
        """Compile and link `target`; the output if that failed."""
        folder = Path(self.build_temp).absolute() / ("cuda" if nvcc else "cpu")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / "build.ninja").write_text(_build_file(target, compiler, nvcc))
        except ImportError as error:
            return f"{error}; without build isolation, install what pyproject.toml lists under build-system"
        ninja = [sys.executable, "-m", "ninja", "-C", str(folder)]
        run = subprocess.run(ninja, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return run.stdout if run.returncode else None


def _build_file(target: Path, compiler: str, nvcc: str | None) -> str:
    """The text of build.ninja. Folders with spaces in their names come out quoted for ninja and for the shell."""
    import pybind11

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    openmp = "-fopenmp" if _accepts(compiler, "-fopenmp") else ""
    shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    architectures = _architectures(nvcc) if nvcc else []
    include = f"-I'{pybind11.get_include()}' -I'{sysconfig.get_path('include')}'"
    # GCC's own headers of intrinsics warn; vectors wider than a register never leave a function here
    warnings = "-Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized"
    added, linked = os.environ.get("CXXFLAGS", ""), os.environ.get("LDFLAGS", "")
    rules = {
        "cxx": f"{compiler} -std=c++17 -O3 -fPIC -fvisibility=hidden {warnings} {openmp} {added} $defines "
        f"-MMD -MF $out.d {include} -c $in -o $out",
        "link": f"{compiler} {shared} {openmp} {linked} $in -o $out",
    }
    defines = ["-DVADIFF_X86"] if x86 else []
    objects = [
        ("cxx", f"cpu_rows_{name}.o", "cpu_rows.cpp", f"-DVADIFF_ISA={name} {flags}")
        for name, flags in INSTRUCTION_SETS.items()
        if x86 or name == "generic"
    ]
    objects += [("cxx", "cpu.o", "cpu.cpp", ""), ("cxx", "module.o", "module.cpp", "")]
    if nvcc:
        defines.append(f"-DVADIFF_CUDA=sm_{'+sm_'.join(architectures)}")
        code = [f"-gencode arch=compute_{a},code=sm_{a}" for a in architectures]
        code.append(f"-gencode arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
        rules["nvcc"] = (
            f"{nvcc} -ccbin {compiler} -std=c++17 -O3 {' '.join(code)} -Xcompiler -fPIC,-fvisibility=hidden "
            "-MMD -MF $out.d -c $in -o $out"
        )
        host = "".join(f" -Xcompiler {flag}" for flag in ["-fPIC", *openmp.split(), *linked.split()])
        rules["link"] = f"{nvcc} -ccbin {compiler} -shared -cudart static{host} $in -o $out"
        objects.append(("nvcc", "cuda.o", "cuda.cu", ""))
    lines = []
    for name, command in rules.items():
        lines += [f"rule {name}", f"  command = {command}"]
        if name != "link":
            lines += ["  depfile = $out.d", "  deps = gcc"]
    for rule, out, source, flags in objects:
        lines += [f"build {out}: {rule} {_path(HERE / 'csrc' / source)}", f"  defines = {' '.join([*defines, flags])}"]
    lines += [f"build {_path(target)}: link {' '.join(out for _, out, _, _ in objects)}"]
    return "\n".join(lines) + "\n"


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _compiler() -> str | None:
    wanted = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [wanted] if wanted else ["c++", "g++", "clang++"])), None)


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, places)), None)


def _architectures(nvcc: str) -> list[str]:
    """Those that this nvcc knows, lowest first."""
    known = subprocess.run([nvcc, "--list-gpu-code"], text=True, capture_output=True, check=True).stdout.split()
    wanted = (os.environ.get("VADIFF_CUDA_ARCHITECTURES") or " ".join(ARCHITECTURES)).split()
    return sorted((a for a in wanted if f"sm_{a}" in known), key=int)


def _accepts(compiler: str, flag: str) -> bool:
    command = [compiler, flag, "-x", "c++", "-", "-o", os.devnull]
    run = subprocess.run(command, input="int main() { return 0; }", text=True, capture_output=True)
    return run.returncode == 0


def _last_line(output: str) -> str:
    """The line that says what failed: the first error, or the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "no output")


setup(
    packages=[
        *find_packages(include=["vadiff", "vadiff.*"]),
        *(f"vadiff.{name}" for name in find_packages(include=["triton_kernels", "triton_kernels.*"])),
    ],
    package_dir={"vadiff.triton_kernels": "triton_kernels"},
    # optional: setuptools then does not ask for a file that could not be built
    ext_modules=[Extension("vadiff._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
