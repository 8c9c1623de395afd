"""The names of `vadiff.trainer.training`, under the path that they had in version 0.1 and that scripts import."""

from .trainer.training import (
    PRESETS,
    HeldOutLoss,
    Objective,
    Run,
    Stopped,
    TrainConfig,
    TrainedRun,
    edm_objective,
    flow_objective,
    held_out_loss,
    open_run,
    train,
)

__all__ = [
    "PRESETS",
    "HeldOutLoss",
    "Objective",
    "Run",
    "Stopped",
    "TrainConfig",
    "TrainedRun",
    "edm_objective",
    "flow_objective",
    "held_out_loss",
    "open_run",
    "train",
]
