"""Ablation grids, runs paired by seed: planning, training, evaluation and results."""

from .collect import Results, collect
from .evaluation import Evaluation
from .gaps import Gaps, collect_gaps, write_gaps
from .grid import Grid, PlannedRun, read_grid
from .output import write_results
from .runner import evaluate_all, train_all

__all__ = [
    "Evaluation",
    "Gaps",
    "Grid",
    "PlannedRun",
    "Results",
    "collect",
    "collect_gaps",
    "evaluate_all",
    "read_grid",
    "train_all",
    "write_gaps",
    "write_results",
]
