"""Training of diffusion and flow models with `vadiff.DiffusionLoss`."""

from ..config import TrainConfig
from ..presets import PRESETS
from .held_out import HeldOutLoss, held_out_loss
from .loop import TrainedRun, train
from .objective import Objective, edm_objective, flow_objective
from .run import Run, open_run
from .stopping import Stopped

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
