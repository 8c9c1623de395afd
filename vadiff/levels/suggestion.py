"""What to type for a data set: noise levels suggested by the x0 errors of a network that was trained on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._validation import require_number
from ..information import Profile
from ..process import loss_ratio

_BEYOND = 12.0  # the integrals reach this far beyond the levels, in ln σ̃
_POINTS = 8001
_SEEN = 0.8  # least share of the suggested density between the lowest and the highest level
_GROWTH = 1.5  # of the error over the last factor 2 of noise, above which it is not the data's variance
_MEAN_ONLY = 0.1  # information rate below which a network is left with little but the mean image


@dataclass(frozen=True, eq=False)
class Suggestion:
    """Levels by the information profile: of EDM's objective and of flow matching, without further weight.

    Attributes:
        sigma_data: standard deviation of the data around its mean, or as given to `suggest`.
        p_mean, p_std: of ln σ for EDM: mean and standard deviation under p ∝ rate / (1/σ² + 1/sigma_data²).
        logit_mean, logit_std: of logit(t) for a flow, t the noise share: those of ln σ̃ under p ∝ rate / (1 + 1/σ̃)².
        alpha: e^logit_mean, the shift that moves a logit-normal (0, 1), or uniform times, to this mean.
        profile: the errors that this is from.
    """

    sigma_data: float
    p_mean: float
    p_std: float
    logit_mean: float
    logit_std: float
    alpha: float
    profile: Profile

    def __str__(self) -> str:
        p_mean, logit_mean = (round(mean, 2) + 0.0 for mean in (self.p_mean, self.logit_mean))  # no -0.00
        return (
            f"sigma_data {self.sigma_data:.3g}; EDM: P_mean {p_mean:.2f}, P_std {self.p_std:.2f}; flow: "
            f"logit-normal ({logit_mean:.2f}, {self.logit_std:.2f}), or shift alpha {self.alpha:.2f}"
        )


def suggest(log_snr: Tensor, x0_error: Tensor, *, sigma_data: float | None = None) -> Suggestion:
    """Suggest noise levels from x0 errors per level, as `vadiff levels suggest` does.

    The density per ln σ̃ is the information rate min(m/σ̃², 1) over the objective's weight of the x0 error; there is no
    gate, as these weights vanish at low noise. For Gaussian data of standard deviation s and its optimal denoiser,
    EDM's is a logistic density of mean ln s and standard deviation π/(2√3) = 0.91.

    Args:
        log_snr: [T] natural log of alpha²/sigma².
        x0_error: [T] mean squared error of x0 per element, of a network that was trained on all of these levels.
        sigma_data: standard deviation of the data, for EDM; errors above its square count as that, see
            `Profile.bounded`. None takes the error that is left at the highest noise, which does not count how the mean
            image varies over its pixels, and which a network that predicts eps does not show.

    Raises:
        TypeError, ValueError: as `vadiff.information.Profile`; or the levels do not reach far enough to either side.

    Example:
        >>> sigma = torch.logspace(-2, 2, 40)
        >>> print(suggest(-2 * sigma.log(), sigma**2 / (1 + sigma**2)))
        sigma_data 1; EDM: P_mean 0.00, P_std 0.91; flow: logit-normal (0.00, 1.01), or shift alpha 1.00
    """
    profile = Profile(log_snr, x0_error)
    if sigma_data is None:
        spread = _standard_deviation(profile)
    else:
        spread = require_number("sigma_data", sigma_data, above=0.0)
        profile = profile.bounded(spread)
    edm_mean, edm_std = _moments(profile, "edm", spread)
    flow_mean, flow_std = _moments(profile, "flow", spread)
    return Suggestion(spread, edm_mean, edm_std, flow_mean, flow_std, math.exp(flow_mean), profile)


def information_density(profile: Profile, log_sigma: Tensor, prediction_type: str, sigma_data: float = 0.5) -> Tensor:
    """Density over ln σ̃ of the levels that `suggest` takes mean and standard deviation of, [N] → [N] float64.

    Args:
        profile: x0 errors.
        log_sigma: [N].
        prediction_type: form of the loss, one of `vadiff.process.PREDICTION_TYPES`, without further weight.
        sigma_data: standard deviation of the data, for "edm".
    """
    grid = _grid(profile)
    area = torch.trapezoid(_rate_by_weight(profile, grid, prediction_type, sigma_data), grid)
    return _rate_by_weight(profile, log_sigma.double(), prediction_type, sigma_data) / area


def _rate_by_weight(profile: Profile, log_sigma: Tensor, prediction_type: str, sigma_data: float) -> Tensor:
    log_snr = -2.0 * log_sigma
    return profile.rate_at(log_snr) / loss_ratio(prediction_type, log_snr, sigma_data=sigma_data)


def _grid(profile: Profile) -> Tensor:
    """Values of ln σ̃, rising, over which densities are integrated. [P] float64."""
    levels = -0.5 * profile.log_snr
    low, high = levels[-1].item() - _BEYOND, levels[0].item() + _BEYOND
    return torch.linspace(low, high, _POINTS, dtype=torch.float64)


def _moments(profile: Profile, prediction_type: str, sigma_data: float) -> tuple[float, float]:
    """Mean and standard deviation of ln σ̃ under the density of an objective.

    Raises:
        ValueError: much of the density is beyond the levels, where the error is not known.
    """
    at = _grid(profile)
    density = information_density(profile, at, prediction_type, sigma_data)
    low, high = -0.5 * profile.log_snr[-1].item(), -0.5 * profile.log_snr[0].item()
    shares = [float(torch.trapezoid(torch.where(side, density, 0.0), at)) for side in (at < low, at > high)]
    if 1.0 - sum(shares) < _SEEN:
        below, above = shares
        where, more = ("below", "lower") if below > above else ("above", "higher")
        raise ValueError(
            f"log_snr reaches from sigma {math.exp(low):.3g} to {math.exp(high):.3g}, but {max(shares):.0%} of the "
            f"suggested levels are {where} that: measure the error at {more} noise too"
        )
    mean = float(torch.trapezoid(density * at, at))
    return mean, math.sqrt(float(torch.trapezoid(density * (at - mean).square(), at)))


def _standard_deviation(profile: Profile) -> float:
    """Standard deviation of the data from the error at the highest noise: s² = m/(1 - m/σ̃²), as of Gaussian data.

    Raises:
        ValueError: the error is still near the noise there.
    """
    rate = profile.rate_at(profile.log_snr)
    if not float(rate[0]) < 0.5:
        raise ValueError(
            f"x0_error is {rate[0].item():.0%} of the noise's square at the highest level, sigma "
            f"{profile.sigma[0].item():.3g}, expected far less: measure it at higher noise, up to many times the "
            "standard deviation of the data, or train for longer"
        )
    highest = (rate <= max(_MEAN_ONLY, float(rate[0]))).cumprod(0).bool()  # not the least noise, as of two points
    top = profile.log_snr[:1]
    growth = float(profile.error_at(top) / profile.error_at(top + 2.0 * math.log(2.0)))  # over a factor 2 of noise
    if growth > _GROWTH:
        raise ValueError(
            f"x0_error still grows at the highest noise, {growth:.2f} times over the last factor 2 of sigma to "
            f"{profile.sigma[0].item():.3g}: give sigma_data, as the errors of a network that predicts eps do "
            "not show it; or measure at higher noise"
        )
    error = profile.x0_error[highest]
    return math.sqrt(float((error / (1.0 - rate[highest])).mean()))
