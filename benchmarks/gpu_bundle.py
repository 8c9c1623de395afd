"""A folder of wheels for `benchmarks/gpu.sh --bundle`, for a GPU machine without a network or without time to compile.

    python benchmarks/gpu_bundle.py [--python-version 3.12] [--architectures "90"] [--without NAME ...] [--out DIR]

vadiff's wheel has its native kernels for the CPU and for these GPU architectures; it is built by the interpreter of
that version on the PATH, whose build tools come from the package index. The rest are the packages that the stages of
gpu.sh need beside torch and Triton, which the GPU machine has to have, at the versions of constraints.txt; --without
leaves out what that machine has already. commit.txt says of which commit the wheel is: gpu.sh refuses a bundle of
another one than its tree's. A tree outside of git is told its commit by VADIFF_COMMIT.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import revision

ROOT = Path(__file__).resolve().parent.parent
# With what these need, except what comes with torch; importlib_metadata to certifi are for diffusers, tensorboard for
# the training loop, matplotlib for the roofline.
PACKAGES = (
    "click", "cloup",
    "pytest", "pytest-benchmark", "pytest-xdist", "execnet", "iniconfig", "packaging", "pluggy", "pygments",
    "py-cpuinfo2", "tqdm", "diffusers", "importlib_metadata", "zipp", "regex", "requests", "huggingface_hub",
    "safetensors", "pyyaml", "pillow", "httpx2", "httpcore2", "truststore", "h11", "anyio", "idna", "certifi",
    "urllib3", "charset-normalizer",
    "tensorboard", "tensorboard-data-server", "absl-py", "grpcio", "markdown", "protobuf", "werkzeug",
    "matplotlib", "contourpy", "cycler", "fonttools", "kiwisolver", "pyparsing", "python-dateutil", "six",
)  # fmt: skip
WARN_ABOVE = 64 * 2**20
COMMIT_FILE = "commit.txt"


class InterpreterNotFoundError(RuntimeError):
    """No Python of the wanted version is on the PATH."""


def interpreter(version: str) -> str:
    """The path of a Python of this version.

    Raises:
        InterpreterNotFoundError: none is on the PATH, or what is there is no such Python.
    """
    name = f"python{version}"
    asked = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
    found = shutil.which(name)
    if found is not None:
        run = subprocess.run([found, "-c", asked], capture_output=True, text=True, check=False)
        said, _, path = run.stdout.strip().partition(" ")
        if run.returncode == 0 and said == version:
            return path
    what = f"{found} does not run as that version" if found else f"there is no {name} on the PATH"
    raise InterpreterNotFoundError(f"PYTHON_VERSION is {version}, but {what}: install it, or give another version")


def highest_glibc(library: bytes) -> str | None:
    """The highest version of glibc's symbols that a native module names, as "2.34"."""
    versions = {tuple(map(int, v.decode().split("."))) for v in re.findall(rb"GLIBC_(\d+\.\d+(?:\.\d+)?)\0", library)}
    return ".".join(map(str, max(versions))) if versions else None


def glibc_of(wheel: Path) -> str | None:
    """That of the native module in vadiff's wheel; None if it has none."""
    with zipfile.ZipFile(wheel) as content:
        names = [name for name in content.namelist() if re.fullmatch(r"vadiff/_native\..*\.so", name)]
        return highest_glibc(content.read(names[0])) if names else None


def table(folder: Path) -> list[str]:
    """Each wheel's size, the total, and a warning where that is more than some machines can be handed at once."""
    wheels = sorted(folder.glob("*.whl"))
    total = sum(wheel.stat().st_size for wheel in wheels)
    lines = [f"{wheel.stat().st_size / 2**20:8.2f} MiB  {wheel.name}" for wheel in wheels]
    lines.append(f"{total / 2**20:8.2f} MiB  in total")
    if total > WARN_ABOVE:
        lines.append(f"WARNING: more than {WARN_ABOVE >> 20} MiB in total")
    return lines


def why_stale(bundle: Path) -> str | None:
    """Why a bundle's results would get the name of a commit that it was not built from; None if they would not."""
    path, here = bundle / COMMIT_FILE, revision.described()
    if not path.exists():
        return f"which has no {COMMIT_FILE} to say what it was built from: build it anew with `make gpu-bundle`"
    built = path.read_text().strip()
    if here == revision.UNKNOWN:
        return f"built from commit {built}, but the commit of this tree is unknown: give --commit"
    if not revision.same(built, here):
        return f"built from commit {built}, but this tree is {here}: build it anew with `make gpu-bundle`"
    return None


def build(version: str, architectures: str, folder: Path, packages: Sequence[str] = PACKAGES) -> None:
    """Fill the folder with the wheels of vadiff and these packages, and the commit.

    Raises:
        InterpreterNotFoundError: no Python of that version.
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    python = interpreter(version)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.whl"), folder / COMMIT_FILE):
        old.unlink(missing_ok=True)
    commit = revision.described()
    cuda = {**os.environ, "VADIFF_NATIVE": "1", "VADIFF_CUDA": "1", "VADIFF_CUDA_ARCHITECTURES": architectures}
    with tempfile.TemporaryDirectory() as scratch:  # outside of the tree: pip keeps no build folder in it
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", scratch, str(ROOT)], check=True, env=cuda)
        for wheel in Path(scratch).glob("*.whl"):
            shutil.copy(wheel, folder)
    binary = ["--only-binary=:all:", "--python-version", version, "--no-deps", "--dest", str(folder)]
    if packages:
        tested = ["--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([*pip, "download", "--quiet", *binary, *tested, *packages], check=True)
    (folder / COMMIT_FILE).write_text(f"{commit}\n")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python-version", default="3.12", help="that of the GPU machine (default 3.12)")
    parser.add_argument("--architectures", default="90", help='GPU architectures, as "80 90" (default 90)')
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-bundle", help="default: build/gpu-bundle")
    parser.add_argument(
        "--without", nargs="*", default=[], choices=PACKAGES, metavar="NAME", help=f"of {', '.join(PACKAGES)}"
    )
    options = parser.parse_args(words)
    if re.fullmatch(r"3\.\d+", options.python_version) is None:
        parser.error(f"--python-version is {options.python_version!r}, expected major and minor, as 3.12")
    if revision.described() == revision.UNKNOWN:
        parser.error(
            f"this tree is not in git: set VADIFF_COMMIT to what this prints in its origin: {revision.DESCRIBE}"
        )
    try:
        packages = [name for name in PACKAGES if name not in options.without]
        build(options.python_version, options.architectures, options.out, packages)
    except InterpreterNotFoundError as error:
        parser.error(str(error))
    except subprocess.CalledProcessError as error:
        print(f"{' '.join(error.cmd[1:4])} failed with exit status {error.returncode}", file=sys.stderr)
        return 1
    print("\n".join(table(options.out)))
    glibc = next(map(glibc_of, options.out.glob("vadiff-*.whl")), None)
    print(
        f"the native kernels need glibc {glibc} or later" if glibc else "WARNING: vadiff's wheel has no native kernels"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
