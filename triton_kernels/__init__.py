"""The fused loss in Triton: the four functions of a backend, see `vadiff.ops.problem`.

One rank and up to 2,048 samples: two launches forward (rows, statistics), one backward. Above, or with several ranks, a
third one merges. No autotuning (it would change the order of sums from run to run), no atomics, no host sync.
Runs on CUDA tensors, and on CPU tensors under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from ..ops.problem import BATCH_TOTALS, ELL, FACTOR, MASKED, SLOPE, Gather, Inputs, Problem, State, Step
from . import rows as _rows
from . import statistics as _statistics
from .launch import Launcher
from .rows import BLOCK, backward_kernel, rows_kernel, scale_kernel
from .statistics import TILE, fold_kernel, statistics_kernel

INTERPRETED = not isinstance(rows_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 when this module was imported
PROGRAMS_PER_SM = 8
MIN_BLOCKS_PER_ITEM = 2  # a sample is not split finer than this

_launch_rows = Launcher(rows_kernel, num_warps=_rows.NUM_WARPS)
_launch_backward = Launcher(backward_kernel, num_warps=_rows.NUM_WARPS)
_launch_scale = Launcher(scale_kernel, num_warps=_rows.NUM_WARPS)
# maxnreg: one program is alone on its multiprocessor, where spilling a few bytes for occupancy gains nothing.
_launch_statistics = Launcher(statistics_kernel, num_warps=_statistics.NUM_WARPS, maxnreg=255)
_launch_fold = Launcher(fold_kernel, num_warps=_statistics.NUM_WARPS, maxnreg=255)


@functools.cache
def _programs(device_index: int | None) -> int:
    """Size of the fixed grids; the interpreter (no device) gets a small one, so that its programs stride too."""
    if device_index is None:
        return PROGRAMS_PER_SM
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device_index).multi_processor_count


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


def _power_of_2(n: int) -> int:
    """The next power of two; Triton's own takes microseconds."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=64)
def _update_arguments(problem: Problem) -> dict[str, Any]:
    """What fold and table take, by name: numbers, then constexprs."""
    bins, rule = problem.bins, problem.rule
    return {
        "half_life": problem.half_life,
        "width": bins.width,
        "strength": rule.strength,
        "smoothing": rule.smoothing,
        "log_clip": math.log(rule.clip),
        "prior": rule.prior,
        "radius": rule.radius(bins),
        "bins": bins.size,
        "STATISTIC": rule.statistic,
        "SMOOTH": rule.smoothing > 0,
        "K": _power_of_2(bins.size),
    }


def _residual_arguments(problem: Problem, inputs: Inputs) -> dict[str, Any]:
    """What the kernels over elements take of the residual, by name."""
    arguments: dict[str, Any] = {
        "prediction_ptr": inputs.prediction, "target_ptr": inputs.target, "noise_ptr": inputs.noise,
        "huber_delta": problem.huber_delta, "HUBER": problem.huber_delta > 0, "BLOCK": BLOCK,
    }  # fmt: skip
    for name in "abc":
        value = getattr(inputs, name)
        each = isinstance(value, Tensor)
        arguments[f"{name}_ptr"], arguments[name] = (value, 0.0) if each else (None, value)
    samples = len(inputs.prediction)
    elements = inputs.prediction.numel() // samples
    splits, chunk = split_samples(samples, elements, _programs(inputs.prediction.device.index))
    arguments.update(samples=samples, elements=elements, splits=splits, chunk=chunk, EVEN=elements % 16 == 0)
    return arguments


def _weight_arguments(problem: Problem, inputs: Inputs, state: State) -> dict[str, Any]:
    """What the kernels take to weight a sample, by name."""
    return {
        "log_snr_ptr": inputs.log_snr, "base_weight_ptr": inputs.base_weight,
        "sample_weight_ptr": inputs.sample_weight, "weight_ptr": inputs.weight,
        "log_weights_ptr": state.log_weights.view(torch.float32) if problem.rule.statistic else None,
        "low": problem.bins.low, "inv_width": problem.bins.inv_width,
    }  # fmt: skip


def _settle(
    problem: Problem, inputs: Inputs, state: State, workspace: Tensor, out: dict[str, Tensor | None],
    splits: int, update: bool, gather: Gather | None,
) -> None:  # fmt: skip
    """Everything after the elements: per-sample results, loss, statistics.

    out: the pointers that `statistics_kernel` writes per-sample results and the mean loss to. splits: partial sums per
    sample in `workspace`; 0: the per-sample losses are the prediction."""
    samples = len(inputs.log_snr)
    tiles = -(-samples // TILE)
    vector = 4 * problem.bins.size + len(BATCH_TOTALS)
    fold_at_once = update and tiles == 1 and gather is None
    parts = workspace.new_empty(tiles, vector) if update and not fold_at_once else None
    mean_ptr = out["mean_ptr"]
    loss_parts = workspace.new_empty(tiles) if tiles > 1 and mean_ptr is not None else None
    arguments = _update_arguments(problem)
    split_block = _power_of_2(min(splits, 128)) if splits else 0
    _launch_statistics(
        tiles, loss_ptr=workspace if splits else inputs.prediction, state_ptr=state.state, workspace_ptr=workspace,
        parts_ptr=parts, loss_parts_ptr=loss_parts, samples=samples, elements=inputs.prediction.numel() // samples,
        splits=splits, tile=TILE, FOLD=fold_at_once, SPLITS=split_block,
        SETTLE=256 if split_block <= 4 else max(1024 // split_block, 8),
        SAMPLES=max(4096 // arguments["K"], 4),  # of [K, samples]: 16 float64 values for each of 256 threads
        **out, **_weight_arguments(problem, inputs, state), **arguments,
    )  # fmt: skip
    fold = functools.partial(
        _launch_fold, 1, state_ptr=state.state, log_weights_ptr=state.log_weights.view(torch.float32),
        workspace_ptr=workspace, samples=samples, **arguments,
    )  # fmt: skip
    if loss_parts is not None or (parts is not None and tiles > 1):
        merged = workspace.new_empty(1, vector) if gather is not None and update else None
        fold(
            parts_ptr=parts, loss_parts_ptr=loss_parts, mean_ptr=mean_ptr, merged_ptr=merged, parts=tiles,
            FOLD=update and gather is None,
        )  # fmt: skip
        parts = merged
    if parts is not None and gather is not None:
        gathered = gather(parts[0])
        fold(
            parts_ptr=gathered, loss_parts_ptr=None, mean_ptr=None, merged_ptr=None, parts=len(gathered), FOLD=True
        )  # fmt: skip


@torch.no_grad()
def step(
    problem: Problem, inputs: Inputs, state: State, *, gradient: bool, update: bool, gather: Gather | None
) -> Step:
    """See `vadiff.ops.reference.step`."""
    prediction = inputs.prediction
    device, samples = prediction.device, len(prediction)
    residual = _residual_arguments(problem, inputs)
    splits = residual["splits"]
    workspace = torch.empty(samples * (splits + 2) + 2 * problem.bins.size, device=device, dtype=torch.float64)
    made = torch.empty_like(prediction) if gradient else prediction.new_empty(0)
    loss = torch.empty(() if inputs.mean else (samples,), device=device, dtype=torch.float32)
    per_sample = torch.empty((4, samples), device=device, dtype=torch.float32)
    out = {
        "ell_ptr": per_sample[ELL], "factor_ptr": per_sample[FACTOR], "slope_ptr": per_sample[SLOPE],
        "masked_ptr": per_sample[MASKED], "out_ptr": None if inputs.mean else loss,
        "mean_ptr": loss if inputs.mean else None,
    }  # fmt: skip
    with torch.cuda.device_of(prediction):  # Triton launches on the current device
        _launch_rows(
            min(samples * splits, _programs(device.index)), partial_ptr=workspace,
            gradient_ptr=made if gradient else None, bins=problem.bins.size, scale=1.0 / prediction.numel(),
            **residual, **_weight_arguments(problem, inputs, state),
        )  # fmt: skip
        _settle(problem, inputs, state, workspace, out, splits, update, gather)
    return Step(loss, per_sample, made)


def backward(problem: Problem, inputs: Inputs, per_sample: Tensor, upstream: Tensor) -> Tensor:
    """See `vadiff.ops.reference.backward`."""
    prediction = inputs.prediction
    gradient = torch.empty_like(prediction)
    residual = _residual_arguments(problem, inputs)
    mean = upstream.dim() == 0
    items = residual["samples"] * residual["splits"]
    with torch.cuda.device_of(prediction):
        _launch_backward(
            min(items, _programs(prediction.device.index)), upstream_ptr=upstream, factor_ptr=per_sample[FACTOR],
            masked_ptr=per_sample[MASKED], gradient_ptr=gradient, upstream_stride=0 if mean else upstream.stride(0),
            scale=1.0 / (prediction.numel() if mean else residual["elements"]), **residual,
        )  # fmt: skip
    return gradient


def scale(gradient: Tensor, upstream: Tensor) -> None:
    """See `vadiff.ops.reference.scale`."""
    total = gradient.numel()
    grid = min(-(-total // BLOCK), _programs(gradient.device.index))
    with torch.cuda.device_of(gradient):
        _launch_scale(grid, gradient_ptr=gradient, upstream_ptr=upstream, total=total, BLOCK=BLOCK)


def reweight(problem: Problem, inputs: Inputs, state: State, *, update: bool, gather: Gather | None) -> Tensor:
    """See `vadiff.ops.reference.reweight`."""
    loss = inputs.prediction
    workspace = torch.empty(2 * len(loss) + 2 * problem.bins.size, device=loss.device, dtype=torch.float64)
    factor = torch.empty_like(loss)
    out = dict.fromkeys(("ell_ptr", "slope_ptr", "masked_ptr", "out_ptr", "mean_ptr"))
    with torch.cuda.device_of(loss):
        _settle(problem, inputs, state, workspace, {**out, "factor_ptr": factor}, 0, update, gather)
    return factor
