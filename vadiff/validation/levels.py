"""LevelValidation: hands out fixed levels and noise, and takes the losses back."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import process_defaults, schedulers
from .._validation import check_log_snr, check_per_sample
from ..process import NoiseProcess
from .checks import indices_from, levels_of, once_each, seed_of
from .dataset import IndexedDataset, Samples
from .fixed import noise_of, stratified
from .losses import LevelLosses, Records, check_reference

_WIDEST = 10.0  # a data-to-noise ratio of 1 to 150 and 150 to 1
_SAME_LEVEL = 0.07  # nats; bfloat16 rounds a log-SNR of 20 by 0.06
_SAME_OF_SPACING = 0.45  # of the distance between neighbours, so that swapped levels are seen

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
            must be finite and positive), or a result of another run, `LevelLosses.load(path)`. None compares with
            nothing.
        noise: draws the noise in place of the built-in normal noise; see `NoiseOf`. References are told apart by the
            function's name.
        sync: merge the losses of all ranks in `result`. False where one rank validates alone.

    Attributes:
        log_snr: [L] float64, the levels.
        turns: indices per sample: 1, or L with `every_level`. Sample n has the indices n·turns to (n + 1)·turns - 1.
        reference: the `LevelLosses` that results are compared with; None until there is one.

    Raises:
        ValueError, TypeError: an argument out of bounds; the message names it. A reference with other levels or other
            noise, with a loss that is not positive, or a file that is not one.
        OSError: the reference cannot be read.

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
        self.log_snr = levels_of(levels, log_snr_range)
        self.every_level, self.seed, self.sync = every_level, seed_of(seed), sync
        self.turns = len(self.log_snr) if every_level else 1
        self._noise = noise
        self._added: list[tuple[Tensor, Tensor]] = []  # (indices, losses) of each call
        self._shapes: set[tuple[int, ...]] = set()  # of the samples drawn for since the last result
        self._ended = False
        self._file = Path(reference) if isinstance(reference, (str, Path)) else None
        if self._file is None and not isinstance(reference, (LevelLosses, type(None))):
            raise TypeError(
                f"reference is a {type(reference).__name__}, expected the path of a file, a LevelLosses or None"
            )
        self.reference: LevelLosses | None = reference if isinstance(reference, LevelLosses) else None
        if self._file is not None:
            self.reference = self._load_reference()
        elif self.reference is not None:
            self._check(self.reference)

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
        chosen = levels_of(levels, (max(low, -_WIDEST), min(high, _WIDEST)) if log_snr_range is None else log_snr_range)
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
            indices: [B] integers ≥ 0, of the samples in the held-out set; B may be 0.
            shape: of the batch, (B, ...), as `clean.shape`.
            device: of the returned tensors; None is that of `indices`.

        Returns:
            log_snr [B] float32, noise [B, ...] float32.

        Raises:
            TypeError: indices are not integers.
            ValueError: negative indices, or a shape whose first size is not B.
        """
        given = indices_from(indices)
        shape = torch.Size(shape)
        if len(shape) == 0 or shape[0] != len(given):
            raise ValueError(
                f"shape is {tuple(shape)}, expected ({len(given)}, ...): that of the whole batch, one row per index"
            )
        if self._ended:
            self._shapes, self._ended = set(), False
        self._shapes.add(tuple(shape[1:]))
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
        given = indices_from(indices)
        device = loss_per_sample.device if isinstance(loss_per_sample, Tensor) else torch.device("cpu")
        loss = check_per_sample(
            "loss_per_sample", loss_per_sample, len(given), device, torch.float64, differentiable=True
        )
        check_log_snr(log_snr)
        if log_snr.shape != given.shape:
            raise ValueError(f"log_snr has shape {tuple(log_snr.shape)}, expected ({len(given)},): one per index")
        expected, found = self.log_snr[self._level_of(given)], log_snr.detach().double().cpu()
        wrong = ~((found - expected).abs() <= self._same_level)  # true for NaN
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"log_snr of index {int(given[first])} is {found[first]:.4g}, expected {expected[first]:.4g}: the "
                "level that draw gave for this index. If timesteps are rounded, make the levels with "
                "LevelValidation.for_process(scheduler), and the timesteps with timesteps_of(scheduler, log_snr)."
            )
        self._added.append((given, loss.detach().cpu()))

    def result(self, *, save_reference: bool = True) -> LevelLosses:
        """Loss per level over all ranks; the next `add` begins another pass. With `sync`, every rank must call it.

        A result that cannot be compared with the reference (other samples, or a file that appeared since and is none),
        or that cannot be written as one, warns and has no reference: a training goes on.

        Args:
            save_reference: whether the first result becomes the reference. False for a pass over a part of the
                held-out set.

        Raises:
            ValueError: nothing was added; a level without samples; an index with two different losses.
        """
        added, self._added = self._added, []
        self._ended = True
        index = torch.cat([indices for indices, _ in added]) if added else torch.empty(0, dtype=torch.int64)
        loss = torch.cat([losses for _, losses in added]) if added else torch.empty(0, dtype=torch.float64)
        shapes, problem = self._shapes, ""
        distributed = self.sync and torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        if rank == 0 and self.reference is None and self._file is not None:
            try:
                self.reference = self._load_reference()
            except (OSError, ValueError) as error:
                problem = str(error)
        if distributed:
            shares: list[Any] = [None] * torch.distributed.get_world_size()
            reference = self.reference if rank == 0 else None
            torch.distributed.all_gather_object(shares, (index, loss, shapes, reference, problem))
            index, loss = (torch.cat([share[part] for share in shares]) for part in (0, 1))
            shapes = {shape for share in shares for shape in share[2]}
            self.reference, problem = shares[0][3:]  # all ranks have what the first one read
        index, loss = once_each(index, loss)
        records = Records(index // self.turns, self._level_of(index), loss)
        found = LevelLosses.of(self.log_snr, records, self._draws, _data_of(index, shapes, self.turns))
        if self.reference is None and self._file is not None and save_reference and not problem:
            problem = self._keep(found, write=rank == 0)
        result = found
        if self.reference is not None:
            try:
                result = found.compared_with(self.reference)
            except ValueError as error:
                problem = f"{error}.{self._advice}"
        if problem and rank == 0:
            warnings.warn(f"validation without a comparison: {problem}", stacklevel=2)
        return result

    def reset(self) -> None:
        """Forget the losses added since the last `result`: after a pass that was broken off."""
        self._added, self._ended = [], True

    def _level_of(self, indices: Tensor) -> Tensor:
        """Place in `log_snr` of each index, [B] int64."""
        if self.every_level:
            return indices % self.turns
        return torch.tensor(stratified(indices.tolist(), len(self.log_snr), self.seed), dtype=torch.int64)

    @property
    def _draws(self) -> str:
        kind = "every level of each sample" if self.every_level else "one level per sample"
        return f"{kind}, seed {self.seed}" + (
            "" if self._noise is None else f", noise of {getattr(self._noise, '__name__', type(self._noise).__name__)}"
        )

    @property
    def _same_level(self) -> float:
        """Distance in nats below which a log-SNR is that of its index's level."""
        if len(self.log_snr) == 1:
            return _SAME_LEVEL
        return min(_SAME_LEVEL, _SAME_OF_SPACING * float(self.log_snr.sort().values.diff().min()))

    @property
    def _advice(self) -> str:
        return "" if self._file is None else f" Remove {self._file} to begin anew."

    def _load_reference(self) -> LevelLosses | None:
        """What the file holds, checked; None if there is none yet."""
        assert self._file is not None
        if not self._file.exists():
            return None
        loaded = LevelLosses.load(self._file)
        self._check(loaded)
        return loaded

    def _check(self, reference: LevelLosses) -> None:
        try:
            check_reference(reference, self.log_snr, self._draws)
        except ValueError as error:
            raise ValueError(f"{error}.{self._advice}") from None

    def _keep(self, found: LevelLosses, write: bool) -> str:
        """Take a result as reference; returns what went wrong, if anything."""
        try:
            check_reference(found, self.log_snr, self._draws)
        except ValueError as error:
            return f"this result is not taken as reference, as {error}"
        self.reference = replace(found, records=None)  # what a resumed run reads
        try:
            if write:
                found.save(self._file)  # type: ignore[arg-type]
        except OSError as error:
            return f"{self._file} cannot be written ({error}). Later results are compared with this one until the end"
        return ""


def _data_of(index: Tensor, shapes: set[tuple[int, ...]], turns: int) -> str:
    """Names the samples of a pass: how many, their shapes, and a hash of the indices [R] in ascending order."""
    shape = " and ".join(sorted("x".join(map(str, shape)) or "scalar" for shape in shapes))
    digest = hashlib.blake2b(index.numpy().astype("<i8").tobytes(), digest_size=6).hexdigest()
    return f"{len((index // turns).unique()):,} samples of shape {shape}, with indices of hash {digest}"
