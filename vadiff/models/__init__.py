"""Networks."""

from .denoiser import PROCESSES, Denoiser
from .unet import unet

__all__ = ["PROCESSES", "Denoiser", "unet"]
