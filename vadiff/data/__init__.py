"""Data sets."""

from .digits import Digits, load_digits

__all__ = ["Digits", "load_digits"]
