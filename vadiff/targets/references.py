"""Where the references of a call come from: a data set, a random part of it at each call, or the batches before."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .posterior import Augment, References, as_floats, chunk_of, keys_of

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def bits_of(samples: Tensor) -> Tensor:
    """The same memory as integers, which float casts of a module (`.half()`) leave alone."""
    return samples.view(_BITS[samples.element_size()])


def first_of_each(keys: Tensor) -> Tensor:
    """Whether no earlier entry has the same key. [B] → bool [B]."""
    same = keys[:, None] == keys
    return ~same.tril(-1).any(1)


def among(keys: Tensor, others: Tensor, chunk: int = 4096) -> Tensor:
    """Whether each key is one of the others, without synchronising as `torch.isin` does. [M], [B] → bool [M]."""
    return torch.cat([(part == others[:, None]).any(0) for part in keys.split(chunk)])


class OwnTensors(nn.Module):
    """A module whose tensors move with it, but are no buffers.

    DistributedDataParallel overwrites the buffers of all ranks with those of rank 0, and averages of weights copy them.
    """

    _names: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name in self._names:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, fn(value))
        return self


class DataSet(OwnTensors):
    """All samples of a tensor, or a random part of them at each call.

    Args:
        samples: [N, ...].
        subset: how many at a time, the batch included; None is all.
        labels: [N] int64 classes.
        augment: applied to the chosen samples, for a subset.
    """

    _names = ("bits", "labels")

    def __init__(self, samples: Tensor, subset: int | None, labels: Tensor | None, augment: Augment | None) -> None:
        super().__init__()
        self.bits, self.labels = bits_of(samples), labels  # not saved with the state: they are the data
        self.subset, self.augment, self._dtype = subset, augment, samples.dtype
        self._keys: dict[torch.dtype, Tensor] = {}  # of the samples' bits in a dtype
        total, square = torch.zeros(samples[0].numel(), dtype=torch.float64), 0.0
        for part in samples.split(chunk_of(samples)):
            values = as_floats(part, torch.float32).flatten(1).double()
            total += values.sum(0).cpu()
            square += float(values.square().sum())
        mean = total / len(samples)
        self._variance = (square / len(samples) - float(mean.square().sum())) / len(mean)
        if not math.isfinite(self._variance):
            raise ValueError("reference has NaN or infinite values, expected finite numbers")

    def __deepcopy__(self, memo: dict[int, Any]) -> DataSet:
        """A copy that shares the memory, which is never written to."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(self.__dict__)
        return copied

    @property
    def samples(self) -> Tensor:
        """As they were given. [N, ...]"""
        return self.bits.view(self._dtype)

    def data_variance(self) -> Tensor:
        """Variance of the data, per element. Scalar float64."""
        return torch.full((), self._variance, dtype=torch.float64, device=self.bits.device)

    def references(self, batch: References, given: torch.dtype | None, generator: torch.Generator | None) -> References:
        """The samples of a call, without those of the batch (as `valid`).

        given: dtype of the batch's x0, whose `keys_of` are its keys; None: its keys are rows of the data set.
        """
        samples, labels, device = self.samples, self.labels, self.bits.device
        keys = torch.arange(len(samples), device=device) if given is None else self._keys_of_all(given)
        if self.subset is not None and self.subset < len(samples):
            size = self.subset - len(batch.keys)
            if size < 3 * len(batch.keys):
                raise ValueError(
                    f"subset is {self.subset} with a batch of {len(batch.keys)}, expected at least "
                    f"{4 * len(batch.keys)}: the samples of a batch share their references, and the noise of few "
                    "references does not average out"
                )
            rows = torch.randperm(len(samples), generator=generator, device=device)[:size]
            samples, keys = samples[rows], keys[rows]
            labels = None if labels is None else labels[rows]
        return References(samples, keys, labels, ~among(keys, batch.keys), self.augment)

    def keep(self, batch: References) -> None:
        """Nothing: the data set does not change."""

    def ready(self, batch: References) -> Tensor | None:
        """None: a data set has enough references from the first call on."""
        return None

    def full(self) -> Tensor | None:
        """None: a data set does not fill."""
        return None

    def _keys_of_all(self, dtype: torch.dtype) -> Tensor:
        found = self._keys.get(dtype)
        if found is None or found.device != self.bits.device:
            parts = self.samples.split(chunk_of(self.bits))
            found = torch.cat([keys_of(as_floats(part, torch.float32).to(dtype)) for part in parts])
            self._keys[dtype] = found
        return found

    def extra_repr(self) -> str:
        size = f"{len(self.bits):,} references"
        return size if self.subset in (None, len(self.bits)) else f"{self.subset:,} at random of {size}"


class Bank(OwnTensors):
    """The samples of recent batches, first in, first out.

    A sample that comes again replaces its earlier copy. The bank is in the state, so that a resumed run goes on with
    the same references.
    """

    _names = ("bits", "keys", "labels", "valid", "place", "moments")

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.bits: Any = None  # of the samples; all are made at the first call, which knows their shape
        self.keys: Any = None
        self.labels: Any = None
        self.valid: Any = None
        self.place: Any = None
        self.moments: Any = None

    def _make(self, like: Tensor, device: torch.device) -> None:
        size = self.size
        self.bits = bits_of(torch.zeros(size, *like.shape[1:], dtype=like.dtype, device=device))
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

    @property
    def _seen(self) -> Tensor:
        """Number of samples so far. Scalar float64."""
        seen: Tensor = self.moments.view(torch.float64)[-1]
        return seen

    def data_variance(self) -> Tensor:
        """Variance of all samples seen, per element. Scalar float64."""
        moments: Tensor = self.moments.view(torch.float64)
        total, square, number = moments[:-2], moments[-2], moments[-1]
        return (square / number - (total / number).square().sum()) / len(total)

    def references(self, batch: References, given: torch.dtype | None, generator: torch.Generator | None) -> References:
        """What is in the bank, without the samples of the batch (as `valid`)."""
        valid = self.valid & ~among(self.keys, batch.keys)
        return References(self.values, self.keys, None if batch.labels is None else self.labels, valid)

    def ready(self, batch: References) -> Tensor | None:
        """Whether three batches were put into it; before, draws keep their own targets. bool scalar.

        To be asked first in a call: the first one makes the tensors.
        """
        if self.size < 3 * len(batch.keys):
            raise ValueError(
                f"bank is {self.size} with a batch of {len(batch.keys)}, expected at least {3 * len(batch.keys)}: the "
                "samples of a batch share their references, and the noise of few references does not average out"
            )
        if self.bits is None:
            self._make(batch.values, batch.values.device)
        return self._seen >= 3 * len(batch.keys)

    def full(self) -> Tensor | None:
        """Whether as many samples were put into it as it has room for. bool scalar."""
        return self._seen >= self.size

    def keep(self, batch: References) -> None:
        """Put a batch into the bank."""
        size = len(batch.keys)
        where = (self.place + torch.arange(size, device=self.place.device)) % self.size
        self.valid &= ~among(self.keys, batch.keys)
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

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._names if self.bits is not None else ():
            destination[prefix + name] = getattr(self, name).detach()

    def load(self, state_dict: dict[str, Any], prefix: str, device: torch.device, errors: list[str]) -> None:
        """Take the bank's entries out of a state dict, onto a device."""
        found = {name: state_dict.pop(prefix + name) for name in self._names if prefix + name in state_dict}
        if not found:
            self.bits = None  # of a training that had not begun
            return
        if found.keys() != set(self._names) or len(found["bits"]) != self.size:
            errors.append(
                f"{prefix}bits has {len(found.get('bits', ()))} samples, expected {self.size}: the bank's size"
            )
            return
        for name, value in found.items():
            setattr(self, name, value.to(device, copy=True))

    def extra_repr(self) -> str:
        return f"{self.size:,} samples of recent batches"
