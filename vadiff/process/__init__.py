"""Noise processes x_t = alpha·x0 + sigma·eps, and the prediction types of networks.

A process turns a time per sample into alpha, sigma and log-SNR. A prediction type says what the network's output stands
for, see `coefficients` and `loss_ratio`.
"""

from .base import NoiseProcess
from .continuous import EDM, Flow, VPCosine, VPLinear, VPScaledLinear
from .discrete import DiscreteVP
from .forms import (
    PREDICTION_TYPES,
    EDMPreconditioning,
    EDMTerms,
    VTerms,
    coefficients,
    edm_preconditioning,
    form_of,
    loss_ratio,
)

__all__ = [
    "EDM",
    "PREDICTION_TYPES",
    "DiscreteVP",
    "EDMPreconditioning",
    "EDMTerms",
    "Flow",
    "NoiseProcess",
    "VPCosine",
    "VPLinear",
    "VPScaledLinear",
    "VTerms",
    "coefficients",
    "edm_preconditioning",
    "form_of",
    "loss_ratio",
]
