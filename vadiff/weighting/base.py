"""Base class of the weightings of `DiffusionLoss`."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.problem import NO_TABLE, Bins, Coefficient, Inputs, TableRule


class Weighting:
    """Loss weight of each noise level.

    A weighting is one of three: a table of ln w that follows the statistics (`AdaptiveWeighting`, by its `rule`), a
    function of log-SNR (`FixedWeighting`, by `for_batch`), or a learned function that adds a term to the loss
    (`LearnedUncertainty`, by `for_batch` and `extra_term`).
    """

    rule: TableRule = NO_TABLE
    """Parameters of the weight table computed from the statistics; `statistic` "" means no table."""

    needs_losses: ClassVar[bool] = False
    """Whether the weights depend on the losses of the batch; if so, `weights_of_losses` computes them."""

    has_parameters: ClassVar[bool] = False
    """Whether the weighting is a module with trainable parameters."""

    def for_call(self, criterion: Any, coefficients: tuple[Coefficient, Coefficient, Coefficient]) -> Weighting:
        """The weighting for the form of the loss that these coefficients show, where that is open (`UnknownForm`)."""
        return self

    @property
    def pointwise(self) -> bool:
        """Whether a sample's weight depends on its own log-SNR only, not on the rest of the batch."""
        return True

    def for_batch(self, log_snr: Tensor, sync: bool) -> Tensor | None:
        """The weights [B] of this rank's batch, without gradient; None if they come from the table or are all 1.

        sync: weights that depend on the batch use the batches of all ranks.
        """
        return None

    def weights_of_losses(self, loss: Tensor, sample_weight: Tensor | None, sync: bool) -> Tensor:
        """The weights [B] of the batch's base losses [B], if `needs_losses`."""
        raise NotImplementedError(f"{type(self).__name__} does not depend on losses")

    def weight_at(self, log_snr: Tensor, log_weights: Tensor, bins: Bins) -> Tensor:
        """Weight at each log-SNR [B], given the table `log_weights`; NaN if the weight depends on more."""
        return torch.full_like(log_snr, math.nan)

    def extra_term(self, ell: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor] | None:
        """A term [B] to add to the weighted losses, and the mean base loss without that term; None for no term.

        ell: per-sample losses [B], detached.
        """
        return None
