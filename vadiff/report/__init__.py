"""Pictures and tables of trained runs."""

from .demo import run_demo
from .figure import comparison_figure
from .table import held_out_table

__all__ = ["comparison_figure", "held_out_table", "run_demo"]
