"""Data sets."""

from . import cifar, digits, folder
from .digits import Digits, load_digits
from .encoding import PIXELS, Encoding
from .images import Images, Samples, hold_out_last
from .latents import LatentEncoding, open_latents

__all__ = [
    "PIXELS",
    "Digits",
    "Encoding",
    "Images",
    "LatentEncoding",
    "Samples",
    "cifar",
    "digits",
    "folder",
    "hold_out_last",
    "load_digits",
    "open_latents",
]
