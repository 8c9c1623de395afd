"""The machine and code of a measurement: device, cache and memory sizes, versions."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from revision import output_lines

import vadiff

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
_UNKNOWN_CACHE = 64 * 2**20  # if the system does not say: larger than most


def last_level_cache(device: torch.device) -> int:
    """Bytes of the outermost cache: L2 of a GPU, the highest level that the system lists for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_bytes(path.read_text()) for path in _CACHES.glob("index*/size")]
    return max(sizes, default=_UNKNOWN_CACHE)


def _bytes(text: str) -> int:
    """Bytes of a size as the kernel prints it: "491520K"."""
    found = re.fullmatch(r"(\d+)([KMG]?)", text.strip())
    return int(found[1]) * _UNITS.get(found[2], 1) if found else _UNKNOWN_CACHE


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated now; on a CPU also within the limit of the control group (containers)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        free = int(available[1]) * 1024 if available else free
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def rotated_bytes(device: torch.device) -> int:
    """Total size of the buffers in rotation: twice the last-level cache, at most a quarter of the free memory."""
    return min(2 * last_level_cache(device), free_memory(device) // 4)


def name_of(device: torch.device) -> str:
    """The processor's name; for CPUs with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    threads = torch.get_num_threads()
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def file_name(device_name: str, date: str) -> str:
    """<device>-<date>.json, in lower-case letters, digits and hyphens."""
    plain = re.sub(r"\((r|tm)\)", "", device_name.lower())
    return f"{re.sub(r'[^a-z0-9]+', '-', plain).strip('-')}-{date}.json"


def describe(device: torch.device) -> dict[str, Any]:
    """Versions and sizes, for the result file."""
    description = {
        "device": name_of(device),
        "last_level_cache": last_level_cache(device),
        "rotated_bytes": rotated_bytes(device),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "vadiff": vadiff.__version__,
        "compiler": _first_line("c++", "--version"),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        description |= {
            "compute_capability": f"{major}.{minor}",
            "cuda": torch.version.cuda,
            "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "nvcc": _last_line("nvcc", "--version"),
        }
    return description


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    return next(iter(output_lines(*command)), None)


def _last_line(*command: str) -> str | None:
    return next(reversed(output_lines(*command)), None)
