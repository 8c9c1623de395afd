"""How a training step calls the criterion."""

from collections.abc import Callable

from torch import Tensor

from ..log_snr import from_sigma
from ..loss import DiffusionLoss
from ..process import coefficients, loss_ratio

Objective = Callable[[DiffusionLoss, Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""(criterion, network output F [B, ...], x0 [B, ...], eps [B, ...], sigma [B], sigma_data) → scalar loss."""


def edm_objective(
    criterion: DiffusionLoss, output: Tensor, x0: Tensor, eps: Tensor, sigma: Tensor, sigma_data: float
) -> Tensor:
    """EDM's objective: λ(σ)·(D - x0)², where the residual D - x0 is taken from F, x0 and eps in the kernel.

    Source: EDM (arXiv 2206.00364), eq. 2 and table 1; λ(σ) = 1/c_out² is the base weight.
    """
    log_snr = from_sigma(sigma)
    return criterion(
        output,
        x0,
        log_snr,
        noise=eps,
        coefficients=coefficients("edm", 1.0, sigma, sigma_data=sigma_data),
        base_weight=loss_ratio("edm", log_snr, sigma_data=sigma_data),
    )
