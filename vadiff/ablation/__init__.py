"""Grids of runs, paired by seed: what to train, training and evaluating it, and what came out."""

from .collect import Results, collect
from .evaluation import Evaluation
from .grid import Grid, PlannedRun, read_grid
from .output import write_results
from .runner import evaluate_all, train_all

__all__ = [
    "Evaluation",
    "Grid",
    "PlannedRun",
    "Results",
    "collect",
    "evaluate_all",
    "read_grid",
    "train_all",
    "write_results",
]
