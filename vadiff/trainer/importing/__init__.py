"""Networks that others trained, as run directories."""

from .run_directory import import_networks

__all__ = ["import_networks"]
