"""Power-function averages of weights, and reconstruction of any width after training (EDM2, arXiv 2312.02696)."""

from .average import PowerFunctionEMA
from .profile import decay, gamma_from_sigma_rel, reconstruction_coefficients, sigma_rel_from_gamma
from .snapshots import PRECISIONS, reconstruct, remove_after, times_saved

__all__ = [
    "PRECISIONS",
    "PowerFunctionEMA",
    "decay",
    "gamma_from_sigma_rel",
    "reconstruct",
    "reconstruction_coefficients",
    "remove_after",
    "sigma_rel_from_gamma",
    "times_saved",
]
