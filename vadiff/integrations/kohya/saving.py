"""Statistics in the states that Accelerate saves and resumes, with an error that names the scripts' options."""

from __future__ import annotations

import os
from typing import Any

from ...loss import DiffusionLoss
from ..accelerate import prepare


def register(accelerator: Any, criterion: DiffusionLoss, fresh: bool) -> None:
    """Make the criterion part of `save_state` and `load_state`; called before a state is loaded.

    Args:
        accelerator: of accelerate.
        criterion: without parameters.
        fresh: whether a state may hold no statistics, or some that do not fit: they then start afresh.
    """
    criterion.fresh_statistics = criterion.fresh_statistics or fresh
    if not criterion.fresh_statistics:
        accelerator.register_load_state_pre_hook(_require_statistics)
    prepare(accelerator, criterion)


def _require_statistics(models: list[Any], folder: str) -> None:
    if not any(name.startswith(("vadiff_criterion", "custom_checkpoint")) for name in os.listdir(folder)):
        raise ValueError(
            f"the state {folder} holds no statistics: it was saved without vadiff. Start them afresh, with "
            "--vadiff_fresh_statistics or with fresh_statistics = True in the trainer's class"
        )
