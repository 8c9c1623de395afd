"""Lightning: callbacks that log the statistics of a LightningModule's criteria, and a validation by noise level.

Nothing else is needed. A criterion that is an attribute of the LightningModule is moved, saved in checkpoints and
restored with it; statistics are merged over ranks; with accumulation, every batch is recorded.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from .._validation import require_count
from ..extras import MissingExtraError
from ..loss import DiffusionLoss
from ..summary import BANDS
from ..validation import LevelLosses, LevelValidation

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    # Lightning has two package names with separate classes: try the one already imported first.
    for package in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        try:
            Callback = importlib.import_module(package).Callback
            break
        except ImportError as error:
            cause = error
    else:
        raise MissingExtraError(f"lightning cannot be imported ({cause}). Install it with: pip install lightning")

__all__ = ["StatisticsLogger", "ValidationLogger"]


class StatisticsLogger(Callback):
    """Logs the statistics of every criterion in the LightningModule to the trainer's loggers, from rank zero.

    Names begin with ``vadiff/`` and the criterion's name in the LightningModule; see `DiffusionLoss.log_to`.
    Only a step that logs synchronises with the device.

    Args:
        every_n_steps: optimiser steps between records; None is the trainer's `log_every_n_steps`.
        bands: see `DiffusionLoss.log_to`.

    Raises:
        ValueError: an argument out of bounds; or, when training starts, the LightningModule has no criterion.
    """

    def __init__(self, every_n_steps: int | None = None, bands: int = BANDS) -> None:
        super().__init__()
        if every_n_steps is not None:
            require_count("every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self.bands = bands
        self._logged_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _criteria(pl_module):
            raise ValueError(
                f"{type(pl_module).__name__} has no vadiff.DiffusionLoss among its modules: set self.criterion = "
                "vadiff.DiffusionLoss() in its __init__, so that Lightning moves it, saves it and restores it"
            )
        self._logged_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step  # does not move while gradients accumulate
        every: int = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (
            not trainer.is_global_zero or step == self._logged_at or not every or step % every
        ):  # 0: the trainer logs nothing
            return
        self._logged_at = step
        for name, criterion in _criteria(pl_module):
            for logger in trainer.loggers:
                criterion.log_to(logger, step, f"vadiff/{name}", self.bands)


def _criteria(module: nn.Module) -> list[tuple[str, DiffusionLoss]]:
    return [(name, found) for name, found in module.named_modules() if isinstance(found, DiffusionLoss)]


class ValidationLogger(Callback):
    """Ends each validation of a `LevelValidation` and logs it with the LightningModule's own values.

    The module's `validation_step` draws and adds; see docs/validation.md. `vadiff/validation/mean_log_ratio` can be the
    `monitor` of a ModelCheckpoint or of EarlyStopping. The sanity check and `fast_dev_run` give no result, and with
    `limit_val_batches` no result becomes the reference: a part of the held-out set is no measure for the whole.

    Args:
        validation: the one that the module uses.
        prefix: of the names, see `LevelLosses.log_to`.

    Attributes:
        result: `LevelLosses` of the last validation; None before the first.

    Raises:
        TypeError: not a `LevelValidation`.
    """

    def __init__(self, validation: LevelValidation, prefix: str = "vadiff/validation") -> None:
        super().__init__()
        if not isinstance(validation, LevelValidation):
            raise TypeError(
                f"validation is a {type(validation).__name__}, expected a vadiff.validation.LevelValidation"
            )
        self.validation = validation
        self.prefix = prefix
        self.result: LevelLosses | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation.reset()  # what a pass left that was broken off

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        limit = trainer.limit_val_batches
        whole = isinstance(limit, float) and limit == 1.0  # the integer 1 is one batch
        self.result = self.validation.result(save_reference=whole)
        if not whole and self.validation.reference is None and trainer.is_global_zero:
            warnings.warn(
                f"limit_val_batches is {limit}, so no validation becomes the reference, and no ratio is logged. "
                "Give the loader a part of the held-out set instead",
                stacklevel=2,
            )
        # On all ranks, as the loss is the same on all of them: callbacks of each may watch it.
        self.result.log_to(lambda values, step: pl_module.log_dict(values), trainer.global_step, self.prefix)
