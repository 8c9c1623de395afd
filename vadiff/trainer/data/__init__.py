"""Data sets."""

from . import cifar, digits, folder
from .digits import Digits, load_digits
from .images import Images, hold_out_last

__all__ = [
    "Digits",
    "Images",
    "cifar",
    "digits",
    "folder",
    "hold_out_last",
    "load_digits",
]
