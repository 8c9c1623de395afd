"""metrics.jsonl, one JSON object per line, and the same for TensorBoard.

A line has, with K the number of bins:

    step, images              done so far
    loss                      weighted, mean over the finite steps since the last line
    base_loss                 without the weighting: Σ mass·mean / Σ mass of the running statistics
    level_free_loss           base loss since the last line, free of which levels were drawn (criterion.level_free_loss)
    grad_norm, clipped_share  mean norm before clipping, share of steps clipped, since the last line
    skipped_samples           samples with a non-finite loss, in the whole run
    skipped_steps             steps with a non-finite gradient, in the whole run
    bad_images                with --on-bad-image skip: pictures that could not be read, in the whole run
    learning_rate, images_per_second, seconds, memory_bytes
    statistics                count, mean, variance, mass of the base loss, [K] each
    weights                   w at the bin centres, [K]
    target                    if posterior_mean: description in words, removed_x0_error at the bin centres, [K]
    levels                    if information: state in words, moved (share of draws that are not where the base's are)

and at times held_out (log_snr, loss_raw, loss_ema, [L] each: EDM's loss per noise level, of the trained weights and of
their running average), rms (weights, updates and activations per layer) and evaluation. NaN and infinities are null.
"""

import contextlib
import json
import math
import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import RunError
from ...extras import import_extra
from ...files import reason, replacing, writing
from ...levels import Information, LevelSampler
from ...loss import DiffusionLoss
from ...metrics_file import finite, json_lines
from ...regression_target import target_of

METRICS = "metrics.jsonl"  # in a run directory
_TAIL = 2**16  # bytes at the end of the file in which a whole line is looked for first
_PER_BIN = ("count", "mean", "variance", "mass")


def statistics_of(criterion: DiffusionLoss) -> dict[str, Any]:
    """Entries of a line about the criterion. Copies to the CPU, hence waits for the device.

    Reads the level-free loss, which starts a new mean."""
    statistics = criterion.statistics
    per_bin = {name: getattr(statistics, name).cpu() for name in _PER_BIN}
    mass = per_bin["mass"]
    target = target_of(criterion)
    removed = {}
    if target is not None:
        errors = target.removed_error(criterion.bin_centers).tolist()
        removed = {"target": {"description": target.description, "removed_x0_error": errors}}
    return {
        **removed,
        "base_loss": ((mass * per_bin["mean"].nan_to_num()).sum() / mass.sum()).item(),
        "level_free_loss": criterion.level_free_loss.item(),
        "skipped_samples": int(statistics.skipped),
        "statistics": {name: values.tolist() for name, values in per_bin.items()},
        "weights": criterion.weights.tolist(),
    }


def levels_state(levels: LevelSampler) -> dict[str, Any]:
    """Entry of a line about levels that say where they are. Waits for the device."""
    if not isinstance(levels, Information):
        return {}
    return {"levels": {"state": levels.state, "moved": levels.moved}}


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far, of the GPU or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def stacked(entries: Sequence[Mapping[str, Any]], *keys: str) -> Tensor:
    """One value of all lines as a tensor: `stacked(entries, "statistics", "mean")` is [R, K] float64; null is NaN."""
    rows = []
    for entry in entries:
        value: Any = entry
        for key in keys:
            value = value[key]
        rows.append([math.nan if item is None else item for item in value] if isinstance(value, list) else value)
    return torch.tensor([math.nan if row is None else row for row in rows], dtype=torch.float64)


class MetricsLog:
    """Writes the lines of a run.

    Args:
        run: the run directory; None keeps the lines in `entries` only.
        tensorboard: write for TensorBoard too.
        after: the steps done so far; lines of later steps, left by a killed process, are removed.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, run: Path | None, *, tensorboard: bool, after: int = 0) -> None:
        self.entries: list[dict[str, Any]] = []
        self._path = None if run is None else run / METRICS
        self._writer: Any = None
        if run is None:
            return
        self.entries = _cut(run / METRICS, after)
        if tensorboard:
            import_extra("tensorboard", "train")
            module = import_extra("torch.utils.tensorboard", "train")
            self._writer = module.SummaryWriter(run / "tensorboard", purge_step=after + 1)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write a line.

        Raises:
            RunError: it cannot be written (a full disk); the lines before it are unchanged.
        """
        values: dict[str, Any] = finite(entry)
        self.entries.append(values)
        if self._path is not None:
            with _written(self._path), self._path.open("a") as file:
                file.write(json.dumps(values, allow_nan=False) + "\n")
        if self._path is not None and self._writer is not None:
            with _written(self._path.with_name("tensorboard")):
                for name, value in _scalars(values):
                    self._writer.add_scalar(name, value, values["step"])
                self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    """Raise RunError for a failing write inside the `with` block."""
    try:
        with writing(path):
            yield
    except OSError as error:
        raise RunError(f"{path} cannot be written: {reason(error)}. Fix that, then go on with --resume") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; an incomplete last line, left by a killed process, is ignored.

    Raises:
        RunError: a line that is not JSON.
    """
    try:
        return [line for _, line in json_lines(path)]
    except ValueError as error:
        raise RunError(str(error)) from error


def last_step(run: Path) -> int:
    """The step of the last whole line of a run's metrics; 0 without one. Reads the end of the file only."""
    try:
        with (run / METRICS).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            part = min(size, _TAIL)
            while True:
                file.seek(size - part)
                *lines, _ = file.read(part).split(b"\n")  # behind the last line feed: a line that is being written
                if len(lines) > 1 or part == size:
                    break
                part = min(size, 4 * part)
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _cut(path: Path, after: int) -> list[dict[str, Any]]:
    """Remove the lines of steps beyond `after`; returns the others."""
    entries = [entry for entry in read_metrics(path) if entry["step"] <= after] if path.exists() else []
    with replacing(path) as partial:
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return entries


def _scalars(entry: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in entry.items():
        if isinstance(value, Mapping):
            found += _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "step":
            found.append((prefix + key, value))
    return found
