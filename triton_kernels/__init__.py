"""The fused loss in Triton: the four functions of `vadiff.reference`, with the same arguments in the same order.

One rank and up to 2,048 samples: two launches forward (rows, statistics), one backward. Above, or with several ranks, a
third one merges. No autotuning (it would change the order of sums from run to run), no atomics, no host sync.
Runs on CUDA tensors, and on CPU tensors under TRITON_INTERPRET=1. Inputs are validated, [B]-shaped ones float32 and
contiguous, and output, target and noise share one dense layout with the batch outermost (`vadiff.ops` sees to it).
"""

from __future__ import annotations

import contextlib
import functools
import math
from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor

from ..reference import Bins, Coefficient, Gather, TableRule
from . import rows as _rows
from . import statistics as _statistics
from .rows import BLOCK, backward_kernel, rows_kernel, scale_kernel
from .statistics import TILE, fold_kernel, statistics_kernel

INTERPRETED = not isinstance(rows_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 when this module was imported
PROGRAMS_PER_SM = 8
MIN_BLOCKS_PER_ITEM = 2  # a sample is not split finer than this


@functools.cache
def _programs(device_index: int | None) -> int:
    """Size of the fixed grids; the interpreter (no device) gets a small one, so that its programs stride too."""
    if device_index is None:
        return PROGRAMS_PER_SM
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device_index).multi_processor_count


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@functools.lru_cache(maxsize=256)
def split_samples(samples: int, elements: int, programs: int) -> tuple[int, int]:
    """(splits, chunk): into how many runs of `chunk` elements each sample is cut so that `programs` stay busy.

    Items are dealt out in rounds; one item over a round would leave nearly all programs idle for another, so the
    fewest rounds that are 95 % full are taken, or else the fullest of eight."""
    finest = max(elements // (MIN_BLOCKS_PER_ITEM * BLOCK), 1)
    best_busy, best = 0.0, 1
    fewest = -(-samples // programs)
    for rounds in range(fewest, fewest + 8):
        splits = min(rounds * programs // samples, finest)
        items = samples * splits
        busy = items / (-(-items // programs) * programs)
        if busy > best_busy:
            best_busy, best = busy, splits
        if busy >= 0.95 or splits == finest:
            break
    chunk = -(-elements // (best * BLOCK)) * BLOCK
    return -(-elements // chunk), chunk


def _pointer_and_number(coefficient: Coefficient) -> tuple[Tensor | None, float]:
    return (coefficient, 0.0) if isinstance(coefficient, Tensor) else (None, coefficient)


def _power_of_2(n: int) -> int:
    """The next power of two; Triton's own takes microseconds."""
    return 1 << (n - 1).bit_length()


def _statistics_block(bins: int) -> int:
    """Samples per step of the [K, samples] comparison: 16 float64 values for each of 256 threads."""
    return max(4096 // _power_of_2(bins), 4)


@functools.lru_cache(maxsize=64)
def _update_meta(bins: Bins, half_life: float, rule: TableRule) -> tuple[dict[str, float | int], dict[str, object]]:
    """The scalar arguments and the constexprs that fold and table take, by name."""
    scalars: dict[str, float | int] = {
        "half_life": half_life,
        "width": bins.width,
        "strength": rule.strength,
        "smoothing": rule.smoothing,
        "log_clip": math.log(rule.clip),
        "prior": rule.prior,
        "radius": rule.radius(bins),
        "bins": bins.size,
    }
    constants = {
        "STATISTIC": rule.statistic,
        "SMOOTH": rule.smoothing > 0,
        "K": _power_of_2(bins.size),
        "num_warps": _statistics.NUM_WARPS,
        "maxnreg": 255,  # one program is alone on its multiprocessor: spilling a few bytes for occupancy gains nothing
    }
    return scalars, constants


def _finish(
    per_sample: Tensor | None,
    log_snr: Tensor,
    base_weight: Tensor | None,
    sample_weight: Tensor | None,
    weight: Tensor | None,
    state: Tensor,
    log_weights: Tensor,
    workspace: Tensor,
    elements: int,
    splits: int,
    ell: Tensor | None,
    loss: Tensor | None,
    bins: Bins,
    half_life: float,
    rule: TableRule,
    update: bool,
    gather: Gather | None,
) -> Tensor:
    """Everything after the elements: returns `saved` [2B + 1], writes `ell` and `loss`, moves the state."""
    samples = len(log_snr)
    tiles = -(-samples // TILE)
    mean = loss is not None and loss.dim() == 0
    saved = torch.empty(2 * samples + 1, device=log_snr.device, dtype=torch.float32)
    vector = 4 * bins.size + 1
    fold_at_once = update and tiles == 1 and gather is None
    parts = workspace.new_empty(tiles, vector) if update and not fold_at_once else None
    loss_parts = workspace.new_empty(tiles) if tiles > 1 else None
    table = log_weights.view(torch.float32)
    scalars, constants = _update_meta(bins, half_life, rule)
    split_block = _power_of_2(min(splits, 128)) if per_sample is None else 0
    statistics_kernel[(tiles,)](
        per_sample, log_snr, base_weight, sample_weight, weight, table, state, workspace, ell, saved,
        None if mean else loss, loss if mean else None, parts, loss_parts,
        low=bins.low, inv_width=bins.inv_width, samples=samples, elements=elements, splits=splits, tile=TILE,
        LOOK_UP=bool(rule.statistic), FOLD=fold_at_once, SPLITS=split_block,
        SETTLE=256 if split_block <= 4 else max(1024 // split_block, 8), SAMPLES=_statistics_block(bins.size),
        **scalars, **constants,
    )  # fmt: skip
    if tiles > 1:
        merged = workspace.new_empty(1, vector) if gather is not None and update else None
        fold_kernel[(1,)](
            parts, loss_parts, loss if mean else None, saved, merged, state, table, workspace, tiles, samples,
            FOLD=update and gather is None, **scalars, **constants,
        )  # fmt: skip
        parts = merged
    if update and gather is not None:
        gathered = gather(parts[0])  # type: ignore[index]
        fold_kernel[(1,)](
            gathered, None, None, None, None, state, table, workspace, len(gathered), samples,
            FOLD=True, **scalars, **constants,
        )  # fmt: skip
    return saved


def diffusion_loss(
    output: Tensor,
    target: Tensor | None,
    noise: Tensor | None,
    a: Coefficient,
    b: Coefficient,
    c: Coefficient,
    log_snr: Tensor,
    base_weight: Tensor | None,
    sample_weight: Tensor | None,
    weight: Tensor | None,
    state: Tensor,
    log_weights: Tensor,
    bins: Bins,
    half_life: float,
    rule: TableRule,
    huber_delta: float,
    mean: bool,
    with_gradient: bool,
    update: bool,
    gather: Gather | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `vadiff.reference.diffusion_loss`."""
    samples = len(output)
    elements = output.numel() // samples
    programs = _programs(output.device.index)
    splits, chunk = split_samples(samples, elements, programs)
    workspace = torch.empty(samples * (splits + 2) + 2 * bins.size, device=output.device, dtype=torch.float64)
    gradient = torch.empty_like(output) if with_gradient else output.new_empty(0)
    loss = torch.empty(() if mean else (samples,), device=output.device, dtype=torch.float32)
    ell = torch.empty(samples, device=output.device, dtype=torch.float32)
    (a_ptr, a), (b_ptr, b), (c_ptr, c) = (_pointer_and_number(x) for x in (a, b, c))
    with _on(output.device):
        rows_kernel[(min(samples * splits, programs),)](
            output, target, noise, a_ptr, b_ptr, c_ptr, a, b, c, log_snr, base_weight, sample_weight, weight,
            log_weights.view(torch.float32) if rule.statistic else None, workspace,
            gradient if with_gradient else None, bins.low, bins.inv_width, bins.size, huber_delta,
            1.0 / output.numel(), samples, elements, splits, chunk,
            HUBER=huber_delta > 0, EVEN=elements % 16 == 0, BLOCK=BLOCK, num_warps=_rows.NUM_WARPS,
        )  # fmt: skip
        saved = _finish(
            None, log_snr, base_weight, sample_weight, weight, state, log_weights, workspace, elements, splits, ell,
            loss, bins, half_life, rule, update, gather,
        )  # fmt: skip
    return loss, ell, saved, gradient


def diffusion_loss_backward(
    upstream: Tensor,
    saved: Tensor,
    output: Tensor,
    target: Tensor | None,
    noise: Tensor | None,
    a: Coefficient,
    b: Coefficient,
    c: Coefficient,
    huber_delta: float,
) -> Tensor:
    """See `vadiff.reference.diffusion_loss_backward`."""
    samples = len(output)
    elements = output.numel() // samples
    programs = _programs(output.device.index)
    splits, chunk = split_samples(samples, elements, programs)
    gradient = torch.empty_like(output)
    (a_ptr, a), (b_ptr, b), (c_ptr, c) = (_pointer_and_number(x) for x in (a, b, c))
    mean = upstream.dim() == 0
    with _on(output.device):
        backward_kernel[(min(samples * splits, programs),)](
            upstream, saved, output, target, noise, a_ptr, b_ptr, c_ptr, a, b, c, gradient,
            0 if mean else upstream.stride(0), huber_delta, 1.0 / (output.numel() if mean else elements),
            samples, elements, splits, chunk, MEAN=mean,
            HUBER=huber_delta > 0, EVEN=elements % 16 == 0, BLOCK=BLOCK, num_warps=_rows.NUM_WARPS,
        )  # fmt: skip
    return gradient


def scale_gradient(gradient: Tensor, upstream: Tensor, saved: Tensor, out: Tensor) -> None:
    """See `vadiff.reference.scale_gradient`."""
    total = gradient.numel()
    grid = min(-(-total // BLOCK), _programs(gradient.device.index))
    with _on(gradient.device):
        scale_kernel[(grid,)](
            gradient,
            out,
            upstream,
            saved,
            len(saved) // 2,
            total,
            INPLACE=out is gradient,
            BLOCK=BLOCK,
            num_warps=_rows.NUM_WARPS,
        )


def reweight(
    loss: Tensor,
    log_snr: Tensor,
    sample_weight: Tensor | None,
    weight: Tensor | None,
    state: Tensor,
    log_weights: Tensor,
    bins: Bins,
    half_life: float,
    rule: TableRule,
    update: bool,
    gather: Gather | None,
) -> Tensor:
    """See `vadiff.reference.reweight`."""
    workspace = torch.empty(2 * len(loss) + 2 * bins.size, device=loss.device, dtype=torch.float64)
    with _on(loss.device):
        saved = _finish(
            loss, log_snr, None, sample_weight, weight, state, log_weights, workspace, 1, 0, None, None,
            bins, half_life, rule, update, gather,
        )  # fmt: skip
    return saved[: len(loss)]
