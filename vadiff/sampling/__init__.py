"""Sampling from a trained denoiser: solvers, their steps, and many images on several devices."""

from .devices import draw
from .solvers import ddpm, dpmpp_2m, euler, heun
from .steps import Churn, flow_levels, network_calls, noise_levels, steps_for_calls, timestep_levels

__all__ = [
    "Churn",
    "ddpm",
    "dpmpp_2m",
    "draw",
    "euler",
    "flow_levels",
    "heun",
    "network_calls",
    "noise_levels",
    "steps_for_calls",
    "timestep_levels",
]
