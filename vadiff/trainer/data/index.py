"""What a data set of pictures consists of, before any is decoded."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .members import Container


@dataclass(frozen=True, eq=False)
class Index:
    """The pictures of a data set.

    Attributes:
        container: reads them.
        labels: int64 [N], -1 without one.
        wanted: what gives classes to such a data set, for the error if there are none.
        fingerprint: see `fingerprint_of`.
        groups: int64 [N], the shard of each picture; None where they are not in shards.
        left_out: number of damaged files that are not among the pictures.
    """

    container: Container
    labels: np.ndarray
    wanted: str
    fingerprint: str
    groups: np.ndarray | None = None
    left_out: int = 0


def fingerprint_of(names: Iterable[str], sizes: np.ndarray, labels: np.ndarray) -> str:
    """Of pictures' names (relative to the data set), sizes in bytes, and labels: equal on every machine."""
    digest = hashlib.blake2b(labels.tobytes(), digest_size=8)
    for name, size in zip(names, sizes.tolist(), strict=True):
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
