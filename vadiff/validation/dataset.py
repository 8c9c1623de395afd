"""Where a loop has the indices of its samples from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

_HASH_BYTES = 6  # so that 2**15 levels per sample still fit into an int64


class Samples(Protocol):
    """A dataset with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class IndexedDataset:
    """A dataset whose items are (index, item of `dataset`), for a DataLoader; see `LevelValidation.indexed`.

    Batches of a loader with the default `collate_fn` are [indices [B] int64, batch of `dataset`]. For a `collate_fn` of
    your own, give it here and `collate` to the loader.

    Args:
        dataset: with a length.
        turns: how often each item comes, with an index of its own: item n has the indices n·turns to (n + 1)·turns - 1.
        collate_fn: of the loader; None is torch's default.

    Raises:
        TypeError: the dataset has no length (an iterable one).
        ValueError: turns is not positive.
    """

    def __init__(self, dataset: Samples, turns: int = 1, collate_fn: Callable[[list[Any]], Any] | None = None) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"dataset is a {type(dataset).__name__}, expected one with a length and items by index. Use "
                "vadiff.validation.indices_of(samples) for a stream of samples without indices."
            )
        if turns < 1:
            raise ValueError(f"turns is {turns!r}, expected a positive integer")
        self.dataset, self.turns, self.collate_fn = dataset, turns, collate_fn

    def __len__(self) -> int:
        return self.turns * len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index is {index}, expected 0 to {len(self) - 1}")
        return int(index), self.dataset[int(index) // self.turns]

    def collate(self, examples: Sequence[tuple[int, Any]]) -> tuple[Tensor, Any]:
        """(indices [B] int64, what `collate_fn` makes of the items)."""
        from torch.utils.data import default_collate

        indices, items = zip(*examples, strict=True)
        return torch.tensor(indices), (self.collate_fn or default_collate)(list(items))


def indices_of(samples: Tensor) -> Tensor:
    """Indices from the samples' own bytes, for a loop whose batches carry none: a hash, equal for equal samples only.

    Samples must be the same in each pass: cached latents, or images without augmentation. Noise levels are then even on
    average only. With `every_level=True` turn k of a sample is `indices_of(samples) * validation.turns + k`.

    Args:
        samples: [B, ...], any dtype and device.

    Returns:
        [B] int64, 0 to 2**48 - 1, on the CPU.

    Raises:
        TypeError: not a tensor.
        ValueError: samples are [B], without a dimension beside the batch.
    """
    if not isinstance(samples, Tensor):
        raise TypeError(f"samples is a {type(samples).__name__}, expected a torch.Tensor of shape (B, ...)")
    if samples.dim() < 2:
        raise ValueError(f"samples have shape {tuple(samples.shape)}, expected (B, ...): the bytes of each are hashed")
    rows = samples.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    return torch.tensor(
        [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=_HASH_BYTES).digest(), "little") for row in rows]
    )
