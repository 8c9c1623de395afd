"""How a training step calls the criterion."""

from collections.abc import Callable

from torch import Tensor

from ...log_snr import from_sigma
from ...loss import DiffusionLoss
from ...process import coefficients, loss_ratio
from ..config import TrainConfig

Objective = Callable[[DiffusionLoss, Tensor, Tensor, Tensor, Tensor, float, Tensor | None], Tensor]
"""(criterion, network output F [B, ...], x0 [B, ...], eps [B, ...], sigma [B], sigma_data, sample weight [B] or None)
→ scalar loss."""


def edm_objective(
    criterion: DiffusionLoss,
    output: Tensor,
    x0: Tensor,
    eps: Tensor,
    sigma: Tensor,
    sigma_data: float,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """EDM's objective: λ(σ)·(D - x0)²; the kernel computes the residual D - x0 from F, x0 and eps.

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
        sample_weight=sample_weight,
    )


def flow_objective(
    criterion: DiffusionLoss,
    output: Tensor,
    x0: Tensor,
    eps: Tensor,
    sigma: Tensor,
    sigma_data: float,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Flow matching: (F - (eps - x0))², F the velocity at t = sigma/(1 + sigma), which has the same log-SNR.

    Source: Lipman et al., Flow matching (arXiv 2210.02747), eq. 23 with sigma_min = 0, seen from noise to data.
    """
    return criterion(
        output,
        x0,
        from_sigma(sigma),
        noise=eps,
        coefficients=coefficients("flow", 1.0, sigma),
        sample_weight=sample_weight,
    )


def vp_objective(prediction: str) -> Objective:
    """The squared error of eps, v or x0 of a variance-preserving process, without a weight: DDPM's simple objective.

    Source: Ho et al., DDPM (arXiv 2006.11239), eq. 14; v: Salimans & Ho (arXiv 2202.00512), section 4.

    Args:
        prediction: "epsilon", "v_prediction" or "sample".
    """

    def objective(
        criterion: DiffusionLoss,
        output: Tensor,
        x0: Tensor,
        eps: Tensor,
        sigma: Tensor,
        sigma_data: float,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        log_snr = from_sigma(sigma)
        alpha, noise = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        return criterion(
            output, x0, log_snr, noise=eps, coefficients=coefficients(prediction, alpha, noise),
            sample_weight=sample_weight,
        )  # fmt: skip

    return objective


def objective_of(config: TrainConfig) -> Objective:
    """The objective that is usual for what a config's network predicts."""
    prediction = config.form().prediction
    return OBJECTIVES[prediction]


OBJECTIVES: dict[str, Objective] = {
    "edm": edm_objective,
    "flow": flow_objective,
    **{prediction: vp_objective(prediction) for prediction in ("epsilon", "v_prediction", "sample")},
}
"""By what the network predicts."""
