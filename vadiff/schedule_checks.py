"""Whether a table of a schedule is ᾱ, the cumulative product of 1 - beta, and what it probably is if not.

A table that cannot be ᾱ is refused, as are the alphas and the square root of ᾱ of schedules in use. Other tables that
hardly fall may be alphas or the low-noise part of a schedule: these give a warning where they look like the former.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Hashable

import torch
from torch import Tensor

from . import betas
from .errors import DiffusionLossWarning

_FEWEST_STEPS = 10  # of a table that is compared with schedules
_USUAL_STEPS = 1000
_CLOSE = 0.1  # distance in log-SNR at which a table is that of a schedule; √ᾱ of one is half a unit from any ᾱ
_ROUNDING = 1e-6
_MOST_TABLES = 64  # that are remembered as checked
_MOST_WAITS = 16  # tables on other devices than the CPU that are checked: each check waits

_checked: dict[tuple[Hashable, ...], None] = {}  # in the order of their first use
_latest: tuple[weakref.ref[Tensor], int] | None = None  # the table of the last call, and its version
_waits = 0

_USE_PRODUCT = "Use the cumulative product, alphas_cumprod = (1 - betas).cumprod(0)."


def check_schedule(table: Tensor) -> None:
    """Check a table of ᾱ at its first use.

    The table of the last call is known again at once, another on the CPU by some of its values, and one on a GPU by its
    place in memory, without reading it.
    Nothing is checked in compiled code, nor on a device while a CUDA graph is captured.

    Raises:
        ValueError: not [T], or not ᾱ.
    """
    global _latest, _waits
    compiling = torch.compiler.is_compiling()
    version = 0 if compiling or table.is_inference() else table._version
    if not compiling and _latest is not None and _latest[0]() is table and _latest[1] == version:
        return
    if table.dim() != 1 or len(table) == 0:
        raise ValueError(
            f"alphas_cumprod has shape {tuple(table.shape)}, expected (T,): the schedule's whole "
            "table, not the values of a batch."
        )
    if compiling or table.device.type == "meta":
        return
    key: tuple[Hashable, ...]
    if table.device.type == "cpu":
        key = (len(table), table.dtype, *table[:: max(1, (len(table) - 1) // 8)].tolist())
    else:
        key = (table.data_ptr(), version, len(table), table.dtype, table.device)
    if key in _checked:
        _latest = weakref.ref(table), version
        return
    if table.device.type != "cpu":
        if _waits >= _MOST_WAITS or (table.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return
        _waits += 1
    _require_schedule(table.detach().cpu().double())
    _checked[key] = None
    _latest = weakref.ref(table), version
    if len(_checked) > _MOST_TABLES:
        del _checked[next(iter(_checked))]


def _require_schedule(table: Tensor) -> None:
    """Raise ValueError if a table [T] float64 cannot be ᾱ, or is something else of a schedule in use."""
    first, middle, last = table[0].item(), table[len(table) // 2].item(), table[-1].item()
    described = f"alphas_cumprod has values from {first:.4g} (timestep 0) to {last:.4g} (timestep {len(table) - 1})"
    if not bool(((table >= 0.0) & (table <= 1.0)).all()):
        raise ValueError(
            f"{described}, expected ᾱ in [0, 1]: alpha², the share of the data in the variance. {_USE_PRODUCT}"
        )
    if last > first or bool((table.diff() > _ROUNDING).any()):
        raise ValueError(
            f"{described}, expected values that fall from near 1: these rise, like betas or 1 - ᾱ, or like a table in "
            f"reversed order. {_USE_PRODUCT}"
        )
    if len(table) < _FEWEST_STEPS:
        return
    if first == last < 1.0:  # bfloat16 rounds the first steps to 1
        raise ValueError(
            f"{described}, expected ᾱ, which falls: these are all the same, like alphas or betas of a schedule with "
            f"constant betas. {_USE_PRODUCT}"
        )
    alphas = f"{described} and {middle:.4g} in the middle, expected ᾱ that falls to near 0 over the schedule: these"
    if _is_one_of(1.0 - table, _betas(len(table))):
        raise ValueError(f"{alphas} look like alphas, 1 - beta of each step. {_USE_PRODUCT}")
    if _is_one_of(table.square(), _alphas_cumprod(len(table))):
        raise ValueError(
            f"{described} and {middle:.4g} in the middle, the square root of a common schedule's ᾱ: expected ᾱ itself, "
            "alpha². Use sqrt_alphas_cumprod.square(), or the scheduler's alphas_cumprod."
        )
    if last > 0.95 and 1.0 - first > 2.0 * (first - table[1].item()):
        warnings.warn(
            f"{alphas} may be alphas, 1 - beta of each step. {_USE_PRODUCT} A part of a schedule with little noise is "
            "right as it is.",
            DiffusionLossWarning,
            stacklevel=4,
        )


def _is_one_of(values: Tensor, known: Tensor) -> bool:
    """Whether values [T] in [0, 1] are those of a known schedule, whose logits at `_places` are a row of [N, 9]."""
    return bool(((values[_places(len(values))].logit() - known).abs() < _CLOSE).all(1).any())


def _places(size: int) -> Tensor:
    """Nine indices into a table, without its ends, where conventions and zero terminal SNR make a difference."""
    return (torch.linspace(0.1, 0.9, 9, dtype=torch.float64, device="cpu") * (size - 1)).round().long()


def _common_betas(steps: int) -> list[Tensor]:
    """Betas [T] of DDPM, Stable Diffusion, Kandinsky and the cosine schedule."""
    return [betas.linear(steps), betas.scaled_linear(steps), betas.linear(steps, 0.00085, 0.012), betas.cosine(steps)]


def _spaced(table: Tensor, size: int) -> list[Tensor]:
    """The entries that samplers of `size` steps take from a table: leading, leading + 1, trailing, linspace."""
    steps = torch.arange(size, dtype=torch.float64, device="cpu")
    ratio = len(table) / size
    places = (steps * (len(table) // size), steps * (len(table) // size) + 1, (steps + 1) * ratio - 1)
    return [table[place.round().long()] for place in (*places, steps * ((len(table) - 1) / (size - 1)))]


@functools.lru_cache(maxsize=8)
def _betas(size: int) -> Tensor:
    """Logits of the betas of common schedules of this size, or of those with 1,000 steps spaced so, [N, 9]."""
    tables = _common_betas(size)
    if size < _USUAL_STEPS:
        tables += [spaced for table in _common_betas(_USUAL_STEPS) for spaced in _spaced(table, size)]
    return torch.stack([table[_places(size)].logit() for table in tables])


@functools.lru_cache(maxsize=8)
def _alphas_cumprod(size: int) -> Tensor:
    """Logits of the ᾱ of common schedules of this size, spaced, rescaled to zero SNR or with 1 before them, [N, 9]."""

    def whole(steps: int) -> list[Tensor]:
        tables = [(1.0 - table).cumprod(0) for table in _common_betas(steps)]
        return tables + [betas.with_zero_terminal_snr(table) for table in tables]

    one = torch.ones(1, dtype=torch.float64, device="cpu")
    tables = whole(size) + [torch.cat([one, table]) for table in whole(size - 1)]
    if size < _USUAL_STEPS:
        tables += [spaced for table in whole(_USUAL_STEPS) for spaced in _spaced(table, size)]
    return torch.stack([table[_places(size)].logit() for table in tables])
