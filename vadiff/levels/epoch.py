"""Uniform numbers that are stratified over each batch and over an epoch of batches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .._validation import require_count
from .sampler import LARGEST, SMALLEST

_ORDER, _PLACE = 0, 1  # streams


class EpochUniforms:
    """Uniform numbers of each global batch, stratified over the batch and over an epoch of M batches.

    A batch has one number in each of B equal parts of (0, 1), and the M batches of an epoch have one in each of B·M
    parts: batch b has u = (j + (π_j(b) + r)/M)/B in part j = 0, ..., B - 1, in random order, with a permutation π_j of
    the M batches for each j and r uniform in (0, 1). A mean over an epoch then has less variance than with batches
    that are stratified each on its own. Each number is a function of seed and step alone, so that a resumed
    run needs no state.

    For gradient accumulation, draw the numbers of the whole step at once and slice them, here as with `uniforms`; each
    rank takes its slice too.

    Args:
        batch_size: B, of the global batch.
        batches: M, in an epoch.
        seed: the same on every rank.

    Raises:
        ValueError: batch_size or batches is not a positive integer, or seed a negative one.

    Example:
        >>> draw = EpochUniforms(batch_size=4, batches=2, seed=0)
        >>> torch.cat([draw(0), draw(1)]).mul(8).long().sort().values.tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def __init__(self, batch_size: int, batches: int, seed: int) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("batches", batches, 1), ("seed", seed, 0)):
            require_count(name, value, least)
        self.batch_size, self.batches, self.seed = batch_size, batches, seed
        self._epoch = -1
        self._parts = torch.empty(0)  # [M, B]: π_j(b) of this epoch

    def __call__(self, step: int) -> Tensor:
        """The numbers of step 0, 1, ..., counted over all epochs. [B] float64, on the CPU.

        Once per epoch it sorts B·M numbers.

        Raises:
            ValueError: step is not an integer of at least 0.
        """
        require_count("step", step, 0)
        epoch, batch = divmod(step, self.batches)
        if epoch != self._epoch:
            order = torch.rand(self.batches, self.batch_size, generator=self._generator(_ORDER, epoch))
            self._parts, self._epoch = order.argsort(0), epoch
        source = self._generator(_PLACE, step)
        place = torch.rand(self.batch_size, generator=source, dtype=torch.float64)
        strata = torch.arange(self.batch_size, dtype=torch.float64)
        u = (strata + (self._parts[batch] + place) / self.batches) / self.batch_size
        return u[torch.randperm(self.batch_size, generator=source)].clamp(SMALLEST, LARGEST)

    def __repr__(self) -> str:
        return f"EpochUniforms(batch_size={self.batch_size}, batches={self.batches}, seed={self.seed})"

    def _generator(self, stream: int, number: int) -> torch.Generator:
        seed = np.random.SeedSequence((self.seed, stream, number)).generate_state(1, np.uint64)[0] >> np.uint64(1)
        return torch.Generator().manual_seed(int(seed))
