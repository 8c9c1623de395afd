"""Build of vadiff's packages and, if this machine can compile them, its native kernels. The rest: pyproject.toml.

`vadiff/`, and the top-level `triton_kernels/` as `vadiff.triton_kernels`: a top-level package of that name would clash
with another project's.

The kernels of csrc/ become `vadiff._native`. A C++ compiler ($CXX, c++, g++, clang++) builds those for CPUs, and nvcc
($CUDA_HOME, or else PATH, pip's packages, /usr/local/cuda) those for NVIDIA GPUs. If a compiler is missing or fails,
vadiff installs without these kernels and uses PyTorch and Triton; the reason goes into `vadiff/_native_build.txt`, for
`vadiff doctor`.

    VADIFF_NATIVE=auto   native kernels if a C++ compiler is found (default)
    VADIFF_NATIVE=0      no native kernels: nothing is compiled
    VADIFF_NATIVE=1      native kernels for CPUs are required: the installation fails without
    VADIFF_CUDA=auto|0|1 the same for the native CUDA kernels and nvcc
    VADIFF_CUDA_ARCHITECTURES="80 90"   GPU architectures; default: those of 80 90 100 that nvcc knows
    CXX                  the C++ compiler, with optional flags or launcher: "g++ -m64", "ccache g++"
    CXXFLAGS, LDFLAGS    extra flags of the C++ compiler and of the linker
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
REINSTALL = "then run, in the folder of vadiff's source: pip install --force-reinstall --no-deps ."
ARCHITECTURES = ("80", "90", "100")  # those that nvcc knows; the highest also as PTX, for later GPUs
# How to get what is missing. Drivers before 580 run no program of CUDA 13, and before that pip had no nvcc.
GET_COMPILER = "Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install"
GET_HEADERS = (
    f"Debian, Ubuntu: apt install python{sysconfig.get_python_version()}-dev; Fedora: dnf install python3-devel"
)
GET_NVCC = "pip install 'cuda-toolkit[nvcc,cudart,cccl]==13.*'"
OLDER_NVCC = "with an NVIDIA driver older than 580: a toolkit of developer.nvidia.com/cuda-toolkit-archive"
INSTRUCTION_SETS = {
    "generic": "",
    "avx2": "-mavx2 -mfma -mf16c",
}


class LeftOut(Exception):
    """Kernels cannot be built: the reason, and the remedy."""

    def __init__(self, why: str, remedy: str = "Mend that") -> None:
        self.why, self.remedy = why, remedy


class BuildNative(build_ext):
    """Writes a build.ninja and runs it; falls back to fewer kernels if something is missing or fails."""

    def run(self) -> None:
        """Run without setuptools' compiler, which is not used here and fails if it cannot parse $CC or $CXX."""
        inplace, self.inplace = self.inplace, False  # for the path of what is built; copied in place afterwards
        for extension in self.extensions:
            self.build_extension(extension)
        self.inplace = inplace
        if inplace:
            self.copy_extensions_to_source()

    def build_extension(self, extension: Extension) -> None:
        _wanted_architectures()  # like _switch: a malformed value is always an error
        target = Path(self.get_ext_fullpath(extension.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        notes = self._build(target)
        self.note = target.with_name("_native_build.txt")
        # readable in any locale, whatever the compiler's output
        self.note.write_text(" ".join(notes), encoding="ascii", errors="backslashreplace")
        for note in notes:
            print(f"vadiff: {note}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        shutil.copy(self.note, HERE / "vadiff")
        for extension in self.extensions:
            name = self.get_ext_filename(extension.name)
            if not Path(self.build_lib, name).exists():  # an earlier build's copy is outdated
                (HERE / name).unlink(missing_ok=True)

    def _build(self, target: Path) -> list[str]:
        """Build as many kernels as possible; returns notes on the others, with remedies."""
        native, cuda = _switch("VADIFF_NATIVE"), _switch("VADIFF_CUDA")
        try:
            compiler = _compiler(native)
            openmp = ["-fopenmp"] if _accepts(compiler, "-fopenmp") else []
        except LeftOut as reason:
            return [_note("all native kernels", reason, VADIFF_NATIVE=native, VADIFF_CUDA=cuda)]
        notes = []
        if not openmp:
            why = f"{shlex.join(compiler)} did not accept -fopenmp"
            reason = LeftOut(why, "Set CXX to a compiler that does, as g++ (Debian, Ubuntu: apt install g++)")
            notes.append(_note("threads of the native CPU kernels", reason))
        try:
            self._compile(target, compiler, openmp, _nvcc(cuda))
        except LeftOut as reason:
            notes.append(_note("CUDA kernels", reason, VADIFF_CUDA=cuda))
            try:
                self._compile(target, compiler, openmp, None)
            except LeftOut as reason:
                return [_note("all native kernels", reason, VADIFF_NATIVE=native)]
        return notes

    def _compile(self, target: Path, compiler: list[str], openmp: list[str], nvcc: str | None) -> None:
        folder = Path(self.build_temp).absolute() / ("cuda" if nvcc else "cpu")
        ninja, build_file = _ninja(), _build_file(target, compiler, openmp, nvcc)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if nvcc:  # accepts no host compiler with arguments, no flags with commas: use a script
                host = folder / Path(compiler[0]).name
                command = shlex.join([*compiler, *openmp, *_flags("LDFLAGS")])
                host.write_bytes(os.fsencode(f'#!/bin/sh\nexec {command} "$@"\n'))
                host.chmod(0o755)
            (folder / "build.ninja").write_bytes(os.fsencode(build_file))  # paths need not be text
        except OSError as error:
            why = f"the build folder was not writable ({error.filename or folder}: {error.strerror})"
            raise LeftOut(why, f"Make it writable, or remove {self.build_temp}") from None
        run = _run(*ninja, "-C", str(folder))
        if run.returncode:
            print(run.stdout, file=sys.stderr)
            why = f"{nvcc or shlex.join(compiler)} failed: {_error_line(run.stdout)}"
            if "Python.h" in run.stdout and not Path(sysconfig.get_path("include"), "Python.h").exists():
                raise LeftOut(why, f"Install Python's headers ({GET_HEADERS})")
            raise LeftOut(why)


def _ninja() -> list[str]:
    """The command of ninja: the package's, which build isolation installs, or the system's."""
    package = [sys.executable, "-m", "ninja"]
    if _run(*package, "--version").returncode == 0:
        return package
    if found := shutil.which("ninja"):
        return [found]
    raise LeftOut("ninja was not found", _build_requirement("ninja"))


def _build_requirement(package: str) -> str:
    return f"Leave out --no-build-isolation, or install it (pip install {package})"


def _build_file(target: Path, compiler: list[str], openmp: list[str], nvcc: str | None) -> str:
    """The text of build.ninja."""
    try:
        import pybind11
    except ImportError as error:
        raise LeftOut(f"pybind11 was not found ({error})", _build_requirement("pybind11")) from None
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    # GCC's own headers of intrinsics warn; vectors wider than a register never leave a function here
    warnings = "-Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized"
    # nobody reads errno, nobody traps: loops with roots and divisions become vector code
    optimise = "-O3 -fno-math-errno -fno-trapping-math"
    options = f"-std=c++17 {optimise} -fPIC -fvisibility=hidden {warnings}"
    cxx = [*compiler, *options.split(), *openmp, *_flags("CXXFLAGS")]
    to_object = " $defines -MMD -MF $out.d -c $in -o $out"
    rules = {
        "cxx": _literal(*cxx, *include) + to_object,
        "link": _literal(*compiler, *shared.split(), *openmp, *_flags("LDFLAGS")) + " $in -o $out",
    }
    defines = ["-DVADIFF_X86"] if x86 else []
    objects = [
        ("cxx", f"cpu_rows_{name}.o", "cpu_rows.cpp", f"-DVADIFF_ISA={name} {flags}")
        for name, flags in INSTRUCTION_SETS.items()
        if x86 or name == "generic"
    ]
    objects += [("cxx", "cpu.o", "cpu.cpp", ""), ("cxx", "module.o", "module.cpp", "")]
    if nvcc:
        architectures = _architectures(nvcc)
        defines.append(f"-DVADIFF_CUDA=sm_{'+sm_'.join(architectures)}")
        code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
        code.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
        with_host = [nvcc, "-ccbin", f"./{Path(compiler[0]).name}", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        rules["nvcc"] = _literal(*with_host, "-std=c++17", "-O3", *code) + to_object
        rules["link"] = _literal(*with_host, "-shared", "-cudart", "static") + " $in -o $out"
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


def _literal(*words: str) -> str:
    """Words of a command, quoted for the shell and for ninja."""
    return shlex.join(words).replace("$", "$$")


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _switch(name: str) -> str:
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} is {value!r}, expected auto, 0 or 1")
    return value


def _flags(name: str) -> list[str]:
    value = os.environ.get(name, "")
    try:
        return shlex.split(value)
    except ValueError as error:
        raise LeftOut(f"${name} was {value!r}, which no shell would read ({error})", "Correct or unset it") from None


def _note(what: str, reason: LeftOut, **switches: str) -> str:
    """The note on kernels that are not built; if a switch requires them, the installation fails."""
    for name, value in switches.items():
        if value == "1":
            raise SystemExit(f"{name}=1, but {reason.why}. {reason.remedy}, or set {name}=auto to do without")
    return f"When vadiff was built, {reason.why}: {what} were left out. {reason.remedy}, {REINSTALL}"


def _compiler(switch: str) -> list[str]:
    """The command of the C++ compiler, its path absolute."""
    if switch == "0":
        raise LeftOut("VADIFF_NATIVE was 0", "Unset it")
    if sys.platform == "win32":
        raise LeftOut("csrc/ did not build on Windows", "Use WSL")
    wanted = _flags("CXX")
    found = next(filter(None, map(shutil.which, wanted[:1] or ["c++", "g++", "clang++"])), None)
    if found is None:
        why = f"$CXX was {wanted[0]!r}, which was not found" if wanted else "no C++ compiler was found"
        raise LeftOut(why, f"Install one ({GET_COMPILER})" if not wanted else "Correct or unset it")
    return [str(Path(found).absolute()), *wanted[1:]]


def _nvcc(switch: str) -> str:
    if switch == "0":
        raise LeftOut("VADIFF_CUDA was 0 (NVIDIA GPUs use Triton)", "Unset it")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    packages = Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin/nvcc")  # also in build isolation
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", *map(str, packages), "/usr/local/cuda/bin/nvcc"]
    found = next(filter(None, map(shutil.which, places)), None)
    if found is None:
        remedy = f"Install the CUDA toolkit ({GET_NVCC}; {OLDER_NVCC}), or set CUDA_HOME to the one there is"
        raise LeftOut("no nvcc was found (Triton does without)", remedy)
    return str(Path(found).absolute())


def _wanted_architectures() -> list[str]:
    wanted = os.environ.get("VADIFF_CUDA_ARCHITECTURES", "").split() or list(ARCHITECTURES)
    if not all(re.fullmatch("[0-9]+", architecture) for architecture in wanted):
        raise SystemExit(f"VADIFF_CUDA_ARCHITECTURES is {' '.join(wanted)!r}, expected numbers as 80 90")
    return sorted(set(wanted), key=int)


def _architectures(nvcc: str) -> list[str]:
    """The architectures that this nvcc knows, lowest first."""
    run = _run(nvcc, "--list-gpu-code")
    if run.returncode:
        raise LeftOut(f"{nvcc} --list-gpu-code failed: {_error_line(run.stdout)}")
    wanted, known = _wanted_architectures(), run.stdout.split()
    if not any(f"sm_{architecture}" in known for architecture in wanted):
        why = f"{nvcc} knew none of the architectures {' '.join(wanted)}"
        raise LeftOut(why, f"Set VADIFF_CUDA_ARCHITECTURES to some of {' '.join(known).replace('sm_', '')}")
    return [architecture for architecture in wanted if f"sm_{architecture}" in known]


def _accepts(compiler: list[str], flag: str) -> bool:
    return _run(*compiler, flag, "-x", "c++", "-", "-o", os.devnull, given="int main() { return 0; }").returncode == 0


def _run(*command: str, given: str = "") -> "subprocess.CompletedProcess[str]":
    """Run a command; stdout and stderr together, in English, ASCII quotes, and undecodable bytes as \\xff."""
    try:
        return subprocess.run(
            command, input=given, encoding="utf-8", errors="backslashreplace", env={**os.environ, "LC_ALL": "C"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except OSError as error:
        raise LeftOut(f"{command[0]} did not run ({error.strerror})") from None


def _error_line(output: str) -> str:
    """The line that says what failed: the first error or the last line, except commands that ninja repeats."""
    output = re.sub(
        r"^FAILED: .*\n.*\n|^(\[\d+/\d+\]|ninja: (Entering|build stopped)).*\n?", "", output, flags=re.MULTILINE
    )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"\berror:", line)), lines[-1] if lines else "it said nothing")


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
