"""How good a denoiser is: metrics of generated images, held-out loss and gradients per noise level."""

from .fidelity import image_metrics
from .gradients import LevelGradients, level_gradients

__all__ = ["LevelGradients", "image_metrics", "level_gradients"]
