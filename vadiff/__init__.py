"""vadiff: fused, noise-level-aware losses for diffusion and flow training."""

from . import log_snr, process, weighting
from ._version import __version__
from .backends import backend_report
from .loss import DiffusionLoss
from .statistics import LogSNRStatistics

__all__ = [
    "DiffusionLoss",
    "LogSNRStatistics",
    "__version__",
    "backend_report",
    "log_snr",
    "process",
    "weighting",
]
