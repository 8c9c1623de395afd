"""vadiff: fused, noise-level-aware losses for diffusion and flow training."""

from . import ema, levels, log_snr, optimal_loss, process, targets, validation, weighting
from ._version import __version__
from .loss import DiffusionLoss
from .metrics_file import MetricsFile
from .ops.backends import backend_report
from .statistics import LogSNRStatistics

__all__ = [
    "DiffusionLoss",
    "LogSNRStatistics",
    "MetricsFile",
    "__version__",
    "backend_report",
    "ema",
    "levels",
    "log_snr",
    "optimal_loss",
    "process",
    "targets",
    "validation",
    "weighting",
]
