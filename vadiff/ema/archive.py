"""Files of tensors and plain values: written atomically, checked when read, loaded without running code."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import reason, replacing


def write_archive(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file atomically: under another name, flushed to disk, then renamed.

    Raises:
        CheckpointError: the file cannot be written, as on a full disk; an existing file is unchanged.
    """
    try:
        with replacing(path, durable=True) as partial, partial.open("wb") as file:
            torch.save(dict(content), file)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {reason(error)}. An existing file is unchanged") from error


def read_archive(path: Path) -> dict[str, Any]:
    """Read the content that `write_archive` wrote; tensors are on the CPU, memory-mapped.

    Raises:
        CheckpointError: the file is missing, truncated or corrupt.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not check the checksums
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} in it is wrong")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return content
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is corrupt: {error}") from error
