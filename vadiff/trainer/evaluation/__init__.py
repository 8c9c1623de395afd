"""Evaluation of a denoiser: metrics of generated images, gradients per noise level."""

from .fidelity import image_metrics
from .gradients import LevelGradients, level_gradients

__all__ = ["LevelGradients", "image_metrics", "level_gradients"]
