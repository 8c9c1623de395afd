"""Networks."""

from .denoiser import PROCESSES, Denoiser
from .edm2 import EDM2UNet
from .magnitude_preserving import normalize_weights
from .unet import check_attention, check_halvings, unet

__all__ = ["PROCESSES", "Denoiser", "EDM2UNet", "check_attention", "check_halvings", "normalize_weights", "unet"]
