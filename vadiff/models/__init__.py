"""Networks."""

from .denoiser import Denoiser
from .edm2 import EDM2UNet
from .magnitude_preserving import normalize_weights
from .parameterisation import PREDICTIONS, PROCESSES, Parameterisation, parameterisation
from .unet import check_attention, check_halvings, unet

__all__ = [
    "PREDICTIONS",
    "PROCESSES",
    "Denoiser",
    "EDM2UNet",
    "Parameterisation",
    "check_attention",
    "check_halvings",
    "normalize_weights",
    "parameterisation",
    "unet",
]
