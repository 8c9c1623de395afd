"""vadiff: fused, noise-level-aware losses for diffusion and flow training."""

from . import ema, levels, log_snr, optimal_loss, process, validation, weighting
from ._version import __version__
from .loss import DiffusionLoss
from .ops.backends import backend_report
from .statistics import LogSNRStatistics

__all__ = [
    "DiffusionLoss",
    "LogSNRStatistics",
    "__version__",
    "backend_report",
    "ema",
    "levels",
    "log_snr",
    "optimal_loss",
    "process",
    "validation",
    "weighting",
]
