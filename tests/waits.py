"""Waiting for the GPU as an error, for the tests of what must not wait."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def waits_are_errors() -> Iterator[None]:
    """In here, what makes the host wait for the GPU raises; the mode of before is back afterwards, come what may.

    torch remarks once that the mode is a prototype, after it has switched it on: that alone is overheard."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature", UserWarning)
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
