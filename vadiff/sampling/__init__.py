"""Sampling from a trained denoiser: solvers, their steps, and many images on several devices."""

from .generation import draw
from .solvers import euler, heun
from .steps import Churn, flow_times, noise_levels

__all__ = ["Churn", "draw", "euler", "flow_times", "heun", "noise_levels"]
