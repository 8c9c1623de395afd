"""Prediction types: what the network's output F stands for, and the residual that follows.

`coefficients` gives (a, b, c) of the residual r = a·F + b·x0 + c·eps, and `loss_ratio` gives k, the factor between the
squared error in that form and the squared error of x0. The formulas of k are defined only here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.problem import Coefficient
from .base import require_direction

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow", "edm")


class EDMPreconditioning(NamedTuple):
    """The four factors of D(x; sigma) = c_skip·x + c_out·F(c_in·x; c_noise), each [B]."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class VTerms(NamedTuple):
    """(a, b, c) of an error of v = alpha·eps - sigma·x0: what `coefficients` gives for "v_prediction"."""

    a: Coefficient
    b: Coefficient
    c: Coefficient


class EDMTerms(NamedTuple):
    """(a, b, c) of an error of x0 by EDM's preconditioned network: what `coefficients` gives for "edm"."""

    a: Coefficient
    b: Coefficient
    c: Coefficient


def edm_preconditioning(sigma: Tensor, sigma_data: float = 0.5) -> EDMPreconditioning:
    """EDM's preconditioning (arXiv 2206.00364, table 1).

    With s² = sigma² + sigma_data²: c_skip = sigma_data²/s², c_out = sigma·sigma_data/s, c_in = 1/s,
    c_noise = ln(sigma)/4.

    Args:
        sigma: noise levels > 0, [B].
        sigma_data: standard deviation of the data.

    Returns:
        (c_skip, c_out, c_in, c_noise), each [B], dtype of `sigma`.
    """
    total = sigma.square() + sigma_data**2
    return EDMPreconditioning(
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data / total.sqrt(),
        c_in=total.rsqrt(),
        c_noise=sigma.log() / 4,
    )


def coefficients(
    prediction_type: str,
    alpha: Coefficient,
    sigma: Coefficient,
    *,
    sigma_data: float = 0.5,
    data_at: int = 0,
) -> tuple[Coefficient, Coefficient, Coefficient]:
    """(a, b, c) of the residual r = a·F + b·x0 + c·eps for a prediction type.

    | prediction type | the residual is the error of               | a     | b             | c            |
    |-----------------|--------------------------------------------|-------|---------------|--------------|
    | `epsilon`       | eps                                        | 1     | 0             | -1           |
    | `sample`        | x0                                         | 1     | -1            | 0            |
    | `v_prediction`  | v = alpha·eps - sigma·x0                   | 1     | sigma         | -alpha       |
    | `flow`          | v = eps - x0 (x0 - eps where data_at = 1)  | 1     | 1 (-1)        | -1 (1)       |
    | `edm`           | x0, by D = c_skip·x_t + c_out·F; alpha = 1 | c_out | c_skip - 1    | c_skip·sigma |

    c_skip - 1 is computed in closed form, -sigma² / (sigma² + sigma_data²).

    The kernels do not read a tensor whose coefficient is the number 0.0.

    Args:
        prediction_type: one of `PREDICTION_TYPES`.
        alpha: number or [B].
        sigma: number or [B].
        sigma_data: standard deviation of the data (`edm` only).
        data_at: time at which the path reaches data (`flow` only).

    Returns:
        (a, b, c), each a float, or [B] where it depends on a tensor. The type of the tuple of "v_prediction" and "edm",
        whose numbers do not show the form, tells it to `form_of`.

    Raises:
        ValueError: an unknown prediction type or `data_at`, or `edm` with an alpha other than 1.

    Example:
        >>> coefficients("v_prediction", alpha=0.8, sigma=0.6)
        VTerms(a=1.0, b=0.6, c=-0.8)
    """
    if prediction_type == "epsilon":
        return 1.0, 0.0, -1.0
    if prediction_type == "sample":
        return 1.0, -1.0, 0.0
    if prediction_type == "v_prediction":
        return VTerms(1.0, sigma, -alpha)
    if prediction_type == "flow":
        require_direction(data_at)
        return (1.0, 1.0, -1.0) if data_at == 0 else (1.0, -1.0, 1.0)
    if prediction_type == "edm":
        _require_variance_exploding(alpha)
        variance = sigma**2
        total = variance + sigma_data**2
        return EDMTerms(sigma * sigma_data / total**0.5, -variance / total, sigma * sigma_data**2 / total)
    raise _unknown(prediction_type)


def form_of(coefficients: tuple[Coefficient, Coefficient, Coefficient]) -> str | None:
    """The form of a loss with these (a, b, c), or None where they do not show it.

    What the residual a·F + b·x0 + c·eps is an error of, a·F estimates, whatever a is: b and c decide. As numbers they
    show "epsilon", "sample" and "flow". Those of "v_prediction" and "edm" depend on the noise level, and tensors are
    not read: only the result of `coefficients` shows these. For "edm" the form is "sample", the error of x0.
    """
    if isinstance(coefficients, VTerms):
        return "v_prediction"
    if isinstance(coefficients, EDMTerms):
        return "sample"
    _, b, c = coefficients
    if isinstance(b, Tensor) or isinstance(c, Tensor):
        return None
    shown = {(0.0, -1.0): "epsilon", (-1.0, 0.0): "sample", (1.0, -1.0): "flow", (-1.0, 1.0): "flow"}
    return shown.get((b, c))


def loss_ratio(prediction_type: str, log_snr: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """k(λ): squared error in the form of `prediction_type` = k(λ) × squared error of x0. With S = e^λ:

    `epsilon` S · `sample` 1 · `v_prediction` 1 + S · `flow` (1 + √S)² · `edm` S + 1/sigma_data² (the raw
    network output F; EDM's weight of the loss of D). A weight of the x0 loss is converted to another form by
    weight_P = weight_x0 / k_P.

    Args:
        prediction_type: one of `PREDICTION_TYPES`.
        log_snr: λ, [B]; ±inf gives the limit.
        sigma_data: standard deviation of the data (`edm` only).

    Returns:
        k, [B], dtype of `log_snr`.

    Raises:
        ValueError: an unknown prediction type.
    """
    if prediction_type == "epsilon":
        return log_snr.exp()
    if prediction_type == "sample":
        return torch.ones_like(log_snr)
    if prediction_type == "v_prediction":
        return 1.0 + log_snr.exp()
    if prediction_type == "flow":
        return (1.0 + (0.5 * log_snr).exp()).square()
    if prediction_type == "edm":
        return log_snr.exp() + 1.0 / sigma_data**2
    raise _unknown(prediction_type)


def _unknown(prediction_type: str) -> ValueError:
    return ValueError(f"prediction_type is {prediction_type!r}, expected one of {', '.join(PREDICTION_TYPES)}.")


def _require_variance_exploding(alpha: Coefficient) -> None:
    if isinstance(alpha, Tensor):
        if alpha.device.type != "cpu" or torch.compiler.is_compiling():
            return
        is_one = bool((alpha == 1).all())
    else:
        is_one = alpha == 1
    if not is_one:
        raise ValueError(
            "alpha is not 1, expected 1 for prediction_type 'edm': EDM's network sees x0 + sigma·eps. "
            "For x_t = alpha·x0 + sigma·eps pass x_t / alpha to the network and sigma / alpha as sigma."
        )
