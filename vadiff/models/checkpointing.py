"""Gradient checkpointing: the backward pass computes the activations of a block again instead of keeping them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


class Checkpointing:
    """Calls a block without keeping what is inside it for the backward pass: only its inputs are kept.

    Outputs and gradients are those of a plain call, to the bit where the block is deterministic.

    Args:
        random: whether blocks draw random numbers, as dropout does. The state of the generators is then saved before a
            block and restored when it is computed again, which a CUDA graph cannot hold.
    """

    def __init__(self, *, random: bool) -> None:
        self.random = random

    def __call__(self, block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=self.random)
