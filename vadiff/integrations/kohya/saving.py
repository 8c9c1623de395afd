"""Statistics in the states that Accelerate saves and resumes, and how they are left out of one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...loss import DiffusionLoss
from ..accelerate import prepare


def register(accelerator: Any, criterion: DiffusionLoss, fresh: bool) -> None:
    """Make the criterion part of `save_state` and `load_state`; called before a state is loaded.

    Args:
        accelerator: of accelerate.
        criterion: without parameters.
        fresh: whether a state that is loaded leaves the criterion what it is, and may hold none.
    """
    if fresh:
        _register_without_loading(accelerator, criterion)
    else:
        prepare(accelerator, criterion)
        accelerator.register_load_state_pre_hook(_require_statistics)


def _files_of_statistics(folder: str) -> list[str]:
    """Accelerate's files of registered objects in a state; the scripts register none of their own."""
    return [name for name in os.listdir(folder) if re.fullmatch(r"custom_checkpoint_\d+\.pkl", name)]


def _require_statistics(models: list[Any], folder: str) -> None:
    if not _files_of_statistics(folder):
        raise ValueError(
            f"the state {folder} holds no statistics: it was saved without vadiff. Start them afresh, with "
            "--vadiff_fresh_statistics or with fresh_statistics = True in the trainer's class"
        )


def _register_without_loading(accelerator: Any, criterion: DiffusionLoss) -> None:
    """`accelerate.prepare` with a criterion that a state does not change.

    Accelerate refuses states with more or fewer objects than are registered: the criterion is one from the first state
    that is saved, or that is loaded and has one.
    """
    criterion.to(accelerator.device)
    registered: list[_Kept] = []

    def register() -> None:
        if not registered:
            registered.append(_Kept(criterion.state_dict))
            accelerator.register_for_checkpointing(registered[0])

    def before_loading(models: list[Any], folder: str) -> None:
        if _files_of_statistics(folder):
            register()

    accelerator.register_load_state_pre_hook(before_loading)
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: register())


class _Kept:
    """What Accelerate saves of a criterion, and does not load."""

    def __init__(self, state_dict: Callable[[], dict[str, Tensor]]) -> None:
        self.state_dict = state_dict

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass
