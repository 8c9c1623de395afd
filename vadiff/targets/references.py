"""Where the references of a call come from: a data set, a random part of it at each call, or the batches before."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .posterior import References, as_floats, keys_of

Augment = Callable[[Tensor], Tensor]
"""Samples [m, ...] as floats → the same, augmented as the batch's x0 were."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def bits_of(samples: Tensor) -> Tensor:
    """The same memory as integers, which float casts of a module (`.half()`) leave alone."""
    return samples.view(_BITS[samples.element_size()])


def first_of_each(keys: Tensor) -> Tensor:
    """Whether no earlier entry has the same key. [B] → bool [B]."""
    same = keys[:, None] == keys
    return ~same.tril(-1).any(1)


def among(keys: Tensor, others: Tensor, chunk: int) -> Tensor:
    """Whether each key is one of the others, without synchronising as `torch.isin` does. [M], [B] → bool [M]."""
    return torch.cat([(part == others[:, None]).any(0) for part in keys.split(chunk)])


class DataSet(nn.Module):
    """All samples of a tensor, or a random part of them at each call.

    Args:
        samples: [N, ...].
        subset: how many at a time, the batch included; None is all.
        labels: [N] int64 classes.
        augment: applied to the chosen samples, for a subset.
    """

    bits: Tensor  # of the samples; not saved with the state: it is the data
    labels: Tensor | None

    def __init__(self, samples: Tensor, subset: int | None, labels: Tensor | None, augment: Augment | None) -> None:
        super().__init__()
        self.register_buffer("bits", bits_of(samples), persistent=False)
        self.register_buffer("labels", labels, persistent=False)
        self.subset, self.augment, self._dtype = subset, augment, samples.dtype
        self._keys: Tensor | None = None  # of the samples' bits
        total, square = torch.zeros(samples[0].numel(), dtype=torch.float64), 0.0
        for part in samples.split(512):
            values = as_floats(part, torch.float32).flatten(1).double()
            total += values.sum(0).cpu()
            square += float(values.square().sum())
        mean = total / len(samples)
        self._variance = (square / len(samples) - float(mean.square().sum())) / len(mean)
        if not math.isfinite(self._variance):
            raise ValueError("reference has NaN or infinite values, expected finite numbers")

    @property
    def samples(self) -> Tensor:
        """As they were given. [N, ...]"""
        return self.bits.view(self._dtype)

    def data_variance(self) -> Tensor:
        """Variance of the data, per element. Scalar float64."""
        return torch.full((), self._variance, dtype=torch.float64, device=self.bits.device)

    def references(self, batch: References, by_index: bool, generator: torch.Generator | None) -> References:
        """The samples of a call, without those of the batch (as `valid`).

        by_index: the keys of the batch are rows of the data set; else they are those of `keys_of`.
        """
        samples, labels, device = self.samples, self.labels, self.samples.device
        if self.subset is None:
            keys = torch.arange(len(samples), device=device) if by_index else self._keys_of_all()
        else:
            everything = self.subset == len(samples)  # for its augmentation: there are no more
            size = self.subset - len(batch.keys)
            if size < 3 * len(batch.keys) and not everything:
                raise ValueError(
                    f"subset is {self.subset} with a batch of {len(batch.keys)}, expected at least "
                    f"{4 * len(batch.keys)}: the samples of a batch share their references, and the noise of few "
                    "references does not average out"
                )
            rows = torch.randperm(len(samples), generator=generator, device=device)[: None if everything else size]
            keys = rows if by_index else self._keys_of_all()[rows]
            samples = as_floats(samples[rows], batch.values.dtype)
            labels = None if labels is None else labels[rows]
            if self.augment is not None:
                samples = self.augment(samples)
        return References(samples, keys, labels, valid=~among(keys, batch.keys, 4096))

    def keep(self, batch: References) -> None:
        """Nothing: the data set does not change."""

    def ready(self, batch: References) -> Tensor | None:
        """None: a data set has enough references from the first call on."""
        return None

    def _keys_of_all(self) -> Tensor:
        if self._keys is None or self._keys.device != self.samples.device:
            self._keys = torch.cat([keys_of(as_floats(part, torch.float32)) for part in self.samples.split(512)])
        return self._keys

    def extra_repr(self) -> str:
        size = f"{len(self.bits):,} references"
        return size if self.subset is None else f"{self.subset:,} at random of {size}"


class Bank(nn.Module):
    """The samples of recent batches, first in, first out.

    A sample that comes again replaces its earlier copy. The bank is in the state, so that a resumed run goes on with
    the same references.
    """

    bits: Any  # of the samples
    keys: Any
    labels: Any
    valid: Any
    place: Any
    moments: Any

    _NAMES = ("bits", "keys", "labels", "valid", "place", "moments")

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        for name in self._NAMES:
            self.register_buffer(name, None)  # made at the first call, which knows their shape

    def _make(self, like: Tensor) -> None:
        device, size = like.device, self.size
        self.bits = bits_of(like.new_zeros(size, *like.shape[1:]))
        self.keys = torch.zeros(size, dtype=torch.int64, device=device)
        self.labels = torch.zeros(size, dtype=torch.int64, device=device)
        self.valid = torch.zeros(size, dtype=torch.bool, device=device)
        self.place = torch.zeros((), dtype=torch.int64, device=device)  # where the next sample goes
        elements = like[0].numel()
        self.moments = torch.zeros(elements + 2, dtype=torch.int64, device=device)  # bits of float64: sum, |x|², number

    @property
    def values(self) -> Tensor:
        """The samples, float32 or float64. [size, ...]"""
        values: Tensor = self.bits.view(torch.float64 if self.bits.dtype is torch.int64 else torch.float32)
        return values

    def data_variance(self) -> Tensor:
        """Variance of all samples seen, per element. Scalar float64."""
        moments: Tensor = self.moments.view(torch.float64)
        total, square, number = moments[:-2], moments[-2], moments[-1]
        return (square / number - (total / number).square().sum()) / len(total)

    def references(self, batch: References, by_index: bool, generator: torch.Generator | None) -> References:
        """What is in the bank, without the samples of the batch (as `valid`)."""
        if self.size < 3 * len(batch.keys):
            raise ValueError(
                f"bank is {self.size} with a batch of {len(batch.keys)}, expected at least {3 * len(batch.keys)}: the "
                "samples of a batch share their references, and the noise of few references does not average out"
            )
        if self.bits is None:
            self._make(batch.values)
        valid = self.valid & ~among(self.keys, batch.keys, 4096)
        return References(self.values, self.keys, None if batch.labels is None else self.labels, valid)

    def ready(self, batch: References) -> Tensor | None:
        """Whether there are three batches in the bank; before, draws keep their own targets. bool scalar."""
        ready: Tensor = self.valid.sum() >= 3 * len(batch.keys)
        return ready

    def keep(self, batch: References) -> None:
        """Put a batch into the bank."""
        size = len(batch.keys)
        where = (self.place + torch.arange(size, device=self.place.device)) % self.size
        self.valid &= ~among(self.keys, batch.keys, 4096)
        stored = self.values
        stored[where] = batch.values.to(stored.dtype)
        self.keys[where] = batch.keys
        if batch.labels is not None:
            self.labels.index_copy_(0, where, batch.labels)
        self.valid[where] = batch.valid
        self.place.add_(size).remainder_(self.size)
        values = batch.values.flatten(1).double()
        moments = self.moments.view(torch.float64)
        moments[:-2] += values.sum(0)
        moments[-2] += values.square().sum()
        moments[-1] += size

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        found = state_dict.get(prefix + "bits")
        if isinstance(found, Tensor) and self.bits is None and len(found) == self.size:
            self._make(found)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{self.size:,} samples of recent batches"
