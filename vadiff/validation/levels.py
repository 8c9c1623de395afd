"""LevelValidation: hands out fixed levels and noise, and takes the losses back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import process_defaults, schedulers
from .._validation import check_log_snr, check_per_sample
from ..process import NoiseProcess
from .dataset import IndexedDataset, Samples
from .fixed import noise_of, stratified
from .losses import LevelLosses, Records

_LARGEST = 2**63 - 1
_WIDEST = 10.0  # a data-to-noise ratio of 1 to 150 and 150 to 1
_SAME_LEVEL = 0.05  # nats; bfloat16 rounds a log-SNR of 10 by 0.03
_SAME_LOSS = 0.05  # relative; the same sample in another batch differs by rounding only

NoiseOf = Callable[[Tensor, torch.Size], Tensor]
"""(samples [B] int64, shape [B, ...]) → noise of that shape, a function of each sample's index alone."""


class LevelValidation:
    """Loss at fixed noise levels, with fixed noise, for any loop.

    Level and noise of a sample are functions of the seed and of its index in the held-out set, whatever the batch size,
    order, data workers, ranks, device, or what was drawn before; so a resumed run gives the same numbers. By default
    each sample gets one level, and every `levels` consecutive samples have each level once; with `every_level` each
    sample gets every level, with the same noise.

    One pass is: `draw` and `add` for each batch, then `result`, which begins the next pass. With several ranks of the
    default process group each validates its share and all call `result`.

    Args:
        levels: how many, evenly spaced in log-SNR over `log_snr_range`, ends included; or the log-SNRs themselves.
        log_snr_range: (low, high), natural log of alpha²/sigma², within what the network was trained on.
        every_level: every sample at every level: `levels` times the work, and much smaller standard errors.
        seed: of levels and noise.
        reference: what `result` compares with: a file, which the first result is written to if it does not exist (it
            must be finite), or a result of another run, `LevelLosses.load(path)`. None compares with nothing.
        noise: draws the noise in place of the built-in normal noise; see `NoiseOf`.
        sync: merge the losses of all ranks in `result`. False where one rank validates alone.

    Attributes:
        log_snr: [L] float64, the levels.
        turns: indices per sample: 1, or L with `every_level`. Sample n has the indices n·turns to (n + 1)·turns - 1.

    Raises:
        ValueError, TypeError: an argument out of bounds; the message names it.

    Example:
        >>> validation = LevelValidation(levels=4, log_snr_range=(-6.0, 6.0))
        >>> for indices in torch.arange(100).split(32):
        ...     log_snr, noise = validation.draw(indices, (len(indices), 3, 8, 8))
        ...     validation.add(indices, log_snr, noise.square().flatten(1).mean(1))
        >>> validation.result().samples
        tensor([25, 25, 25, 25])
    """

    def __init__(
        self,
        levels: int | Sequence[float] | Tensor = 12,
        *,
        log_snr_range: tuple[float, float] | None = None,
        every_level: bool = False,
        seed: int = 0,
        reference: str | Path | LevelLosses | None = None,
        noise: NoiseOf | None = None,
        sync: bool = True,
    ) -> None:
        self.log_snr = _levels(levels, log_snr_range)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= _LARGEST:
            raise ValueError(f"seed is {seed!r}, expected an integer from 0 to 2**63 - 1")
        self.every_level, self.seed, self.sync = every_level, seed, sync
        self.turns = len(self.log_snr) if every_level else 1
        self.reference = Path(reference) if isinstance(reference, str) else reference
        self._noise = noise
        self._added: list[tuple[Tensor, Tensor]] = []  # (indices, losses) of each call

    @classmethod
    def for_process(
        cls,
        process: Any,
        levels: int | Sequence[float] | Tensor = 12,
        *,
        log_snr_range: tuple[float, float] | None = None,
        **options: Any,
    ) -> LevelValidation:
        """Levels that a noise process has: at whole timesteps, where it has timesteps.

        Use it with a diffusers scheduler, so that `vadiff.schedulers.timesteps_of(scheduler, log_snr)` is exact and
        `log_snr` holds the levels actually used.

        Args:
            process: as for `DiffusionLoss.for_process`: a scheduler, an object from `vadiff.process`, or a name.
            levels: how many, or log-SNRs; each is moved to the nearest timestep.
            log_snr_range: (low, high); None is the range of the process as far as it lies within -10 to 10, beyond
                which data or noise have vanished.
            options: of `LevelValidation`.

        Raises:
            ValueError: levels outside the process, or more than it has timesteps there.
            TypeError: not a process.
        """
        process = process_defaults.resolved(process)
        low, high = process_defaults.log_snr_range_of(process)
        chosen = _levels(levels, (max(low, -_WIDEST), min(high, _WIDEST)) if log_snr_range is None else log_snr_range)
        if not isinstance(process, NoiseProcess) or hasattr(process, "alphas_cumprod"):
            wanted = chosen
            chosen = schedulers.log_snr_of(process, schedulers.timesteps_of(process, wanted)).double()
            if len(chosen.unique()) < len(chosen):
                raise ValueError(
                    f"levels are {len(chosen)} from {float(wanted.min()):.4g} to {float(wanted.max()):.4g}, but the "
                    f"process has only {len(chosen.unique())} different timesteps nearest to them: use fewer levels"
                )
        return cls(chosen, **options)

    def indexed(self, dataset: Samples, collate_fn: Callable[[list[Any]], Any] | None = None) -> IndexedDataset:
        """The held-out set with indices, and with each sample `turns` times: what the loop's DataLoader reads.

        Args:
            dataset: with a length and items by index, the same ones each time: no augmentation, no random crop.
            collate_fn: a function of your own that makes a batch of items; then give the loader
                `collate_fn=indexed.collate`.

        Raises:
            TypeError: the dataset has no length.
        """
        return IndexedDataset(dataset, self.turns, collate_fn)

    def draw(
        self, indices: Tensor | Sequence[int], shape: Sequence[int], device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """The fixed level and noise of each sample.

        Drawn on the CPU and then moved, so that every device gets the same noise.

        Args:
            indices: [B] integers ≥ 0, of the samples in the held-out set.
            shape: of the batch, (B, ...), as `clean.shape`.
            device: of the returned tensors; None is that of `indices`.

        Returns:
            log_snr [B] float32, noise [B, ...] float32.

        Raises:
            TypeError: indices are not integers.
            ValueError: negative indices, or a shape whose first size is not B.
        """
        given = _checked_indices(indices)
        shape = torch.Size(shape)
        if len(shape) == 0 or shape[0] != len(given):
            raise ValueError(
                f"shape is {tuple(shape)}, expected ({len(given)}, ...): that of the whole batch, one row per index"
            )
        if device is None:
            device = indices.device if isinstance(indices, Tensor) else "cpu"
        samples = given // self.turns
        if self._noise is None:
            noise = noise_of(samples.tolist(), shape[1:], self.seed)
        else:
            noise = self._noise(samples, shape)
        return self.log_snr[self._level_of(given)].float().to(device), noise.to(device)

    def add(self, indices: Tensor | Sequence[int], log_snr: Tensor, loss_per_sample: Tensor) -> None:
        """Record the losses of a batch. Waits for the device.

        An index that comes again with the same loss counts once: samplers and loaders repeat samples to fill the last
        batch of each rank.

        Args:
            indices: [B], those given to `draw`.
            log_snr: [B], what `draw` returned, or the log-SNR of the timesteps made of it.
            loss_per_sample: [B], the network's loss of each sample, in the same form each time and best unweighted.

        Raises:
            TypeError: tensors of a wrong type.
            ValueError: wrong shapes; or a log-SNR that is not the level of that index.
        """
        given = _checked_indices(indices)
        loss = check_per_sample(
            "loss_per_sample", loss_per_sample, len(given), loss_per_sample.device, torch.float64, differentiable=True
        )
        check_log_snr(log_snr)
        if log_snr.shape != given.shape:
            raise ValueError(f"log_snr has shape {tuple(log_snr.shape)}, expected ({len(given)},): one per index")
        expected, found = self.log_snr[self._level_of(given)], log_snr.detach().double().cpu()
        wrong = ~((found - expected).abs() <= _SAME_LEVEL)  # true for NaN
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"log_snr of index {int(given[first])} is {found[first]:.4g}, expected {expected[first]:.4g}: the "
                "level that draw gave for this index. If timesteps are rounded, make the levels with "
                "LevelValidation.for_process(scheduler), and the timesteps with timesteps_of(scheduler, log_snr)."
            )
        self._added.append((given, loss.detach().cpu()))

    def result(self) -> LevelLosses:
        """Loss per level over all ranks; the next `add` begins another pass. With `sync`, every rank must call it.

        Raises:
            ValueError: nothing was added; a level without samples; an index with two different losses; a reference at
                other levels, with other samples or noise, or a file that is not one.
        """
        added, self._added = self._added, []
        index = torch.cat([indices for indices, _ in added]) if added else torch.empty(0, dtype=torch.int64)
        loss = torch.cat([losses for _, losses in added]) if added else torch.empty(0, dtype=torch.float64)
        reference: LevelLosses | Exception | None = None
        distributed = self.sync and torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        if rank == 0:
            reference = self._read_reference()
        if distributed:
            shares: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(shares, (index, loss, reference))
            index, loss = (torch.cat([share[part] for share in shares]) for part in (0, 1))
            reference = shares[0][2]  # all ranks raise what the first one met, none waits for another
        if isinstance(reference, Exception):
            raise reference
        index, loss = _once_each(index, loss)
        records = Records(index // self.turns, self._level_of(index), loss)
        found = LevelLosses.of(self.log_snr, records, self._draws)
        if reference is None and isinstance(self.reference, Path) and not bool(found.non_finite.any()):
            if rank == 0:
                found.save(self.reference)
            reference = replace(found, records=None)  # what the next result, or a resumed run, reads
        try:
            return found.compared_with(reference)
        except ValueError as error:
            where = f" Remove {self.reference} to begin anew." if isinstance(self.reference, Path) else ""
            raise ValueError(f"{error}.{where}") from None

    def reset(self) -> None:
        """Forget the losses added since the last `result`: after a pass that was broken off."""
        self._added = []

    def _level_of(self, indices: Tensor) -> Tensor:
        """Place in `log_snr` of each index, [B] int64."""
        if self.every_level:
            return indices % self.turns
        return torch.tensor(stratified(indices.tolist(), len(self.log_snr), self.seed), dtype=torch.int64)

    @property
    def _draws(self) -> str:
        kind = "every level of each sample" if self.every_level else "one level per sample"
        return f"{kind}, seed {self.seed}" + ("" if self._noise is None else ", noise of another function")

    def _read_reference(self) -> LevelLosses | Exception | None:
        if not isinstance(self.reference, Path):
            return self.reference
        try:
            return LevelLosses.load(self.reference) if self.reference.exists() else None
        except (OSError, ValueError) as error:
            return error


def _once_each(index: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
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
    differ = ~torch.isclose(before, after, rtol=_SAME_LOSS, atol=0.0, equal_nan=True)
    if bool(differ.any()):
        which = int(differ.nonzero()[0])
        raise ValueError(
            f"index {int(index[1:][again][which])} was added twice, with the losses {before[which]:.6g} and "
            f"{after[which]:.6g}. Indices have to be those of the whole held-out set, not places in a batch (use "
            "validation.indexed(dataset)), and each pass has to end with result()."
        )
    first = torch.cat([torch.ones(1, dtype=torch.bool), ~again])
    return index[first], loss[first]


def _checked_indices(indices: Tensor | Sequence[int]) -> Tensor:
    """[B] int64 on the CPU."""
    given = torch.as_tensor(indices).detach()
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"indices have dtype {given.dtype}, expected integers: places in the held-out set")
    if given.dim() != 1 or len(given) == 0:
        raise ValueError(f"indices have shape {tuple(given.shape)}, expected (B,): one per sample")
    given = given.cpu().long()
    if int(given.min()) < 0:
        raise ValueError(f"indices have {int(given.min())}, expected 0 or more: places in the held-out set")
    return given


def _levels(levels: int | Sequence[float] | Tensor, log_snr_range: tuple[float, float] | None) -> Tensor:
    """[L] float64."""
    if isinstance(levels, int) and not isinstance(levels, bool):
        if levels < 1:
            raise ValueError(f"levels is {levels}, expected at least 1")
        if log_snr_range is None:
            raise ValueError(
                "log_snr_range is None, expected (low, high): the log-SNRs between which levels are spaced. "
                "LevelValidation.for_process(scheduler) takes them from a scheduler or process."
            )
        low, high = log_snr_range
        found = torch.linspace(low, high, levels, dtype=torch.float64)
        if not (low < high and bool(found.isfinite().all())):
            raise ValueError(f"log_snr_range is {log_snr_range}, expected a lower and a higher finite number")
        return found
    found = torch.as_tensor(levels, dtype=torch.float64).cpu()
    if found.dim() != 1 or len(found) == 0 or not bool(found.isfinite().all()):
        raise ValueError(f"levels is {levels!r}, expected a number of levels, or finite log-SNRs [L]")
    if len(found.unique()) < len(found):
        raise ValueError(f"levels is {levels!r}, expected each log-SNR once")
    return found
