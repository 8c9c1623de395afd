"""Noise and noise levels as functions of a sample's index: Philox counters, no state.

A counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) has an independent stream
for every counter, so no stream depends on which others are drawn, or in which order. torch's CPU generator would not
do: it reads only the low 32 bits of a seed.
"""

from __future__ import annotations  # np.random is imported when noise is drawn: it is not part of `import numpy`

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_NOISE, _LEVELS = 0, 1  # purposes, so that the streams of one index differ


def noise_of(samples: Sequence[int], shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal noise of each sample, [B, *shape] float32 on the CPU."""
    noise = np.empty((len(samples), *shape), dtype=np.float32)
    for row, sample in enumerate(samples):
        noise[row] = _stream(seed, _NOISE, sample).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(noise)


def stratified(indices: Sequence[int], levels: int, seed: int) -> list[int]:
    """One level for each index: each block of `levels` consecutive indices has every level once, in random order.

    The order is drawn anew for each block; otherwise data whose classes take turns could give each level one class.
    """
    orders: dict[int, list[int]] = {}
    for block in {index // levels for index in indices}:
        orders[block] = _stream(seed, _LEVELS, block).permutation(levels).tolist()
    return [orders[index // levels][index % levels] for index in indices]


def _stream(seed: int, purpose: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, index, 0]))
