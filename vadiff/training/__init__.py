"""Training of small diffusion models with `vadiff.DiffusionLoss`."""

from .checkpoint import load_denoiser
from .config import PRESETS, TrainConfig
from .held_out import HeldOutLoss, held_out_loss
from .loop import History, TrainedRun, train
from .objective import Objective, edm_objective

__all__ = [
    "PRESETS",
    "HeldOutLoss",
    "History",
    "Objective",
    "TrainConfig",
    "TrainedRun",
    "edm_objective",
    "held_out_loss",
    "load_denoiser",
    "train",
]
