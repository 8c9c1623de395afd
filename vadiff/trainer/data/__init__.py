"""Data sets."""

from . import cifar, digits
from .digits import Digits, load_digits
from .encoding import PIXELS, Encoding, Samples, inputs_of_rows
from .images import Images, hold_out_last
from .latents import LatentEncoding, open_latents
from .pictures import Pictures, hold_out, open_pictures, shuffled, with_labels

__all__ = [
    "PIXELS",
    "Digits",
    "Encoding",
    "Images",
    "LatentEncoding",
    "Pictures",
    "Samples",
    "cifar",
    "digits",
    "hold_out",
    "hold_out_last",
    "inputs_of_rows",
    "load_digits",
    "open_latents",
    "open_pictures",
    "shuffled",
    "with_labels",
]
