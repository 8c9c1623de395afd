"""Networks."""

from .denoiser import PROCESSES, Denoiser
from .edm2 import EDM2UNet
from .magnitude_preserving import normalize_weights
from .unet import unet

__all__ = ["PROCESSES", "Denoiser", "EDM2UNet", "normalize_weights", "unet"]
