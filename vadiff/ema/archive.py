"""Files of tensors and plain values that appear whole or not at all, are checked when read, and run no code."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import replacing


def write_archive(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file: under another name, flushed to the disk, then renamed.

    Raises:
        CheckpointError: it cannot be written, as on a full disk; what stood there stays.
    """
    try:
        with replacing(path, durable=True) as partial, partial.open("wb") as file:
            torch.save(dict(content), file)
    except (OSError, RuntimeError) as error:  # torch reports a failing write as RuntimeError
        raise CheckpointError(f"{path} could not be written: {error}. What was there before stays") from error


def read_archive(path: Path) -> dict[str, Any]:
    """What `write_archive` was given; tensors are on the CPU, and stay on the disk until they are used.

    Raises:
        CheckpointError: it is missing, truncated or corrupt.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise ValueError(f"{damaged} in it does not have its checksum")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return content
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is corrupt: {error}") from error
