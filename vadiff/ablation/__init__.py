"""Grids of runs, paired by seed: what to train, training it, and what came out."""

from .collect import Results, collect
from .gaps import Gaps, collect_gaps, write_gaps
from .grid import Grid, PlannedRun, read_grid
from .output import write_results
from .runner import train_all

__all__ = [
    "Gaps",
    "Grid",
    "PlannedRun",
    "Results",
    "collect",
    "collect_gaps",
    "read_grid",
    "train_all",
    "write_gaps",
    "write_results",
]
