"""Checks of what a loop gives to `LevelValidation`: levels, indices, and the losses of a pass."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._validation import is_number

_LARGEST = 2**63 - 1
_SAME_LOSS = 0.05  # relative; the same sample in another batch differs by rounding only
_NO_LOSS = 1e-6  # absolute; two losses that differ by less are both zero but for rounding


def seed_of(seed: Any) -> int:
    """An integer from 0 to 2**63 - 1, of Python or NumPy."""
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= int(seed) <= _LARGEST:
        raise ValueError(f"seed is {seed!r}, expected an integer from 0 to 2**63 - 1")
    return int(seed)


def levels_of(levels: int | Sequence[float] | Tensor, log_snr_range: tuple[float, float] | None) -> Tensor:
    """The levels' log-SNR, [L] float64: given, or evenly spaced over a range."""
    if isinstance(levels, numbers.Integral) and not isinstance(levels, bool):
        if levels < 1:
            raise ValueError(f"levels is {levels}, expected at least 1")
        return torch.linspace(*_range(log_snr_range), int(levels), dtype=torch.float64)
    try:
        found = torch.as_tensor(levels, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.dim() != 1 or len(found) == 0 or not bool(found.isfinite().all()):
        raise ValueError(f"levels is {levels!r}, expected a number of levels, or finite log-SNRs [L]")
    if len(found.unique()) < len(found):
        raise ValueError(f"levels is {levels!r}, expected each log-SNR once")
    return found


def _range(log_snr_range: Any) -> tuple[float, float]:
    if log_snr_range is None:
        raise ValueError(
            "log_snr_range is None, expected (low, high): the log-SNRs between which levels are spaced. "
            "LevelValidation.for_process(scheduler) takes them from a scheduler or process."
        )
    ends = tuple(log_snr_range) if isinstance(log_snr_range, (tuple, list)) else ()
    if len(ends) == 2 and all(is_number(end) for end in ends):
        low, high = (float(end) for end in ends)
        if low < high and abs(low) + abs(high) < float("inf"):
            return low, high
    raise ValueError(f"log_snr_range is {log_snr_range!r}, expected a lower and a higher finite number")


def indices_from(indices: Tensor | Sequence[int]) -> Tensor:
    """[B] int64 on the CPU; B may be 0, a rank's share of a small set."""
    try:
        given = torch.as_tensor(indices).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"indices cannot be read ({error}), expected integers [B] from 0 to 2**63 - 1") from error
    if given.dim() != 1:
        raise ValueError(f"indices have shape {tuple(given.shape)}, expected (B,): one per sample")
    if len(given) == 0:
        return torch.empty(0, dtype=torch.int64)
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"indices have dtype {given.dtype}, expected integers: places in the held-out set")
    given = given.long()
    if int(given.min()) < 0:
        raise ValueError(f"indices have {int(given.min())}, expected 0 or more: places in the held-out set")
    return given


def once_each(index: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted by index, each index once; [R] each.

    Raises:
        ValueError: nothing, or an index with two different losses.
    """
    if len(index) == 0:
        raise ValueError("no losses were added since the last result: call add for each batch of the held-out set")
    index, order = index.sort(stable=True)
    loss = loss[order]
    again = index[1:] == index[:-1]
    before, after = loss[:-1][again], loss[1:][again]
    differ = ~torch.isclose(before, after, rtol=_SAME_LOSS, atol=_NO_LOSS, equal_nan=True)
    if bool(differ.any()):
        which = int(differ.nonzero()[0])
        raise ValueError(
            f"index {int(index[1:][again][which])} was added twice, with the losses {before[which]:.6g} and "
            f"{after[which]:.6g}. Indices have to be those of the whole held-out set, not places in a batch (use "
            "validation.indexed(dataset)), and each pass has to end with result()."
        )
    first = torch.cat([torch.ones(1, dtype=torch.bool), ~again])
    return index[first], loss[first]
