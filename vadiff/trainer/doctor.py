"""`vadiff doctor`: what this machine has, what is missing and how to get it, for pasting into a bug report."""

import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata

import torch

from .._version import __version__
from ..extras import MissingExtraError, import_extra, install_command, requirements_of_extras
from ..ops import backends

_ENVIRONMENT = {
    backends.ENVIRONMENT_VARIABLE: 'backend used for backend="auto"',
    "TRITON_INTERPRET": "1: Triton kernels run on the CPU, slowly, for tests",
    "CUDA_VISIBLE_DEVICES": "which GPUs torch sees",
    "OMP_NUM_THREADS": "threads on the CPU",
}


def report() -> str:
    """Versions, devices, backends, environment and extras, as text without a newline at the end."""
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        "backends": _backends(),
        "environment": _environment(),
        "extras": _extras(),
    }
    return "\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in sections.items())


def _versions() -> Iterator[str]:
    yield f"vadiff    {__version__}"
    yield f"python    {platform.python_version()} on {platform.platform()}"
    yield f"torch     {torch.__version__} (CUDA {torch.version.cuda or 'none: a build for CPUs'})"
    for name in ("triton", "numpy"):
        yield f"{name:<9} {_version(name) or 'not installed'}"


def _devices() -> Iterator[str]:
    yield f"cpu       {platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        yield "cuda      none"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        yield f"cuda:{index}    {device.name}, compute capability {device.major}.{device.minor}, {memory:.0f} GiB"


def _backends() -> Iterator[str]:
    for name, (usable, remark) in backends.backend_report().items():
        yield f"{name:<9} {'yes' if usable else 'no '}  {remark}"
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    yield f"auto      takes {', '.join(f'{backends.automatic(device)} on {device}' for device in devices)}"


def _environment() -> Iterator[str]:
    for name, meaning in _ENVIRONMENT.items():
        value = os.environ.get(name)
        yield f"{name:<20} {'not set' if value is None else repr(value):<10}  ({meaning})"
    chosen = os.environ.get(backends.ENVIRONMENT_VARIABLE)
    if chosen and chosen not in backends.BACKENDS:
        yield f"{backends.ENVIRONMENT_VARIABLE} must be one of {', '.join(backends.BACKENDS)}: every call will fail"


def _extras() -> Iterator[str]:
    """Installed and missing packages of each extra, from the package metadata: only pyproject.toml lists them."""
    try:
        extras = requirements_of_extras()
    except metadata.PackageNotFoundError:
        yield f"vadiff is not installed, only importable: {install_command('train,report')}"
        return
    for extra, requirements in extras.items():
        versions = {name: _version(name) for name in (re.split(r"[^\w.-]", text)[0] for text in requirements)}
        missing = [name for name, version in versions.items() if version is None]
        have = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
        yield f"{extra:<9} {have or 'nothing installed'}"
        if missing:
            yield f"          missing {', '.join(missing)}: {install_command(extra)}"
    if _version("torchvision") is not None:
        yield from _torchvision_trouble()


def _torchvision_trouble() -> Iterator[str]:
    """Report a torchvision built for another torch: its import fails, and with it diffusers' and torch-fidelity's."""
    try:
        import_extra("torchvision", "eval")
    except MissingExtraError as error:
        yield f"torchvision is installed but {error.__cause__}: breaks diffusers and torch-fidelity"
        yield "          on CPU-only torch: pip install --no-deps torchvision==0.15.2"
        yield "          with CUDA: the torchvision published with this torch, see pytorch.org"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
