"""Figures, tables and HTML reports of trained runs."""

from .demo import run_demo
from .figure import comparison_figure
from .from_log import write_log_report
from .page import write_report
from .runs import Group, History, group_runs, read_history
from .table import held_out_table

__all__ = [
    "Group",
    "History",
    "comparison_figure",
    "group_runs",
    "held_out_table",
    "read_history",
    "run_demo",
    "write_log_report",
    "write_report",
]
