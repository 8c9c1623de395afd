"""Names that pickles of version 0.1 have: `vadiff.ops.problem` defines them."""

from .ops.problem import Bins, TableRule

__all__ = ["Bins", "TableRule"]
