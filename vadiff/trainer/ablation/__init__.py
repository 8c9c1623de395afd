"""Ablation grids, runs paired by seed: planning, training, evaluation and results."""

from .collect import Results, collect
from .evaluation import Evaluation
from .gaps import Gaps, collect_gaps, write_gaps
from .grid import Grid, PlannedRun, read_grid
from .output import results_table, write_results
from .runner import train_all

__all__ = [
    "Evaluation",
    "Gaps",
    "Grid",
    "PlannedRun",
    "Results",
    "collect",
    "collect_gaps",
    "read_grid",
    "results_table",
    "train_all",
    "write_gaps",
    "write_results",
]
