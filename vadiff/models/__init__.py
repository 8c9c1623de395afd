"""Networks."""

from .denoiser import Denoiser
from .digits_unet import digits_unet

__all__ = ["Denoiser", "digits_unet"]
