"""What posterior-mean targets have taken out of a training's losses, without their references."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .removed import RemovedError


class Recorded(nn.Module):
    """Stand-in for the `PosteriorMean` of a finished training, to read its criterion's statistics.

    Assign it to `criterion.target`, then load the criterion's state.

    Args:
        description: what the targets were, in words.
    """

    def __init__(self, description: str) -> None:
        super().__init__()
        self.description = description
        self.removed = RemovedError(0.0)

    @torch.no_grad()
    def removed_error(self, log_snr: Tensor) -> Tensor:
        """See `PosteriorMean.removed_error`."""
        return self.removed.at(log_snr)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in [name for name in state_dict if name.startswith(f"{prefix}source.")]:
            del state_dict[name]  # a bank, which is not needed
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return self.description
