"""Grids of runs, paired by seed: what to train, training it, and what came out."""

from .collect import Results, collect
from .grid import Grid, PlannedRun, read_grid
from .output import write_results
from .runner import train_all

__all__ = ["Grid", "PlannedRun", "Results", "collect", "read_grid", "train_all", "write_results"]
