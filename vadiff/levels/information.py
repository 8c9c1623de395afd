"""Levels placed where training has information to gain, from the x0 error that the statistics hold."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..information import (
    BaseWeight,
    Profile,
    check_has_profile,
    gate,
    log_pivot,
    smoothed_log_error,
    x0_scale,
)
from ..loss import DiffusionLoss
from ..ops.reference import moments_of
from .adaptive import AdaptiveLevels
from .fixed import LogNormal
from .sampler import LevelSampler, require_number

_REACH = 1e-9  # least mass of a bin that may be tilted: the base's quantile resolves no levels in smaller ones
_SURE = 0.5  # confidence of a bin that the pivot may be read from


class Information(AdaptiveLevels):
    """p(λ) ∝ gate · min(m/σ̃², 1) / (w·u·k): as many draws as a level has information for each unit of its weight.

    m is the x0 error per element of the network in training, σ̃ = e^(-λ/2), and w·u·k the whole weight of the x0 error
    in the loss, so that p·w·u·k, what a level contributes, is gate · min(m/σ̃², 1) whatever the weighting is. An
    adaptive weighting therefore changes the draws and not the contributions: with Information, prefer constant weights.
    There is no 1/p correction, which would restore the base.

    The gate is σ̃³/(σ̃³ + c³) with the pivot c the highest σ̃ where m/σ̃² ≥ ½. Below it a network is far from optimal, and
    m/σ̃² would draw ever more levels that teach it nothing. While there is no pivot, or it is the highest level with
    samples, as in an untrained network, the levels stay on the base; `state` says so.

    Levels with few samples stay near the base, by n/(n + prior); `floor` of all draws come from it, so that no level
    starves; and the levels move half way to the profile in `half_life` samples per bin. All of this is in buffers: a
    resumed run goes on exactly.

    Sources: InfoNoise (arXiv 2602.18647); VDM++ (arXiv 2303.00848, appendix F) for levels that follow an average loss.

    Args:
        base: the distribution to start from, and to move away from only as far as samples allow; `LogNormal()` by
            default. It must reach wherever the information is: bins with less than 1e-9 of its mass keep their share.
        bins, log_snr_range: the criterion's.
        floor: share of levels drawn from the base, > 0.
        gate: False leaves the gate out.
        prediction_type: form of the criterion's loss, one of `vadiff.process.PREDICTION_TYPES`; "edm" for EDM's
            objective, λ(σ)·(D - x0)².
        sigma_data: standard deviation of the data, for "edm".
        base_weight: any further u of the calls, as a function of log-SNR.
        smoothing: width of the local fit over neighbouring bins, in log-SNR units.
        prior: number of samples at which a bin is half way between base and profile.
        half_life: mean number of samples per bin in which the levels move half way to the profile.
        largest_error: x0 errors above this count as this. A network that predicts eps can be worse than the mean of the
            data at high noise, where a small error of eps is a large one of x0: unbounded, it would draw most levels
            there. None is 1 for "epsilon", enough for pixels in [-1, 1] and latents of unit variance, else no bound.
        profile: errors to place the levels by, in place of those of the criterion: of a finished run or of a
            validation. Then they are there from the first draw, and only the weights are read in training.

    Raises:
        TypeError: the profile is not a `vadiff.information.Profile`; an optimal loss J* is none, see there.
        ValueError: an argument out of bounds.

    Example:
        >>> Information(LogNormal(-1.2, 1.2), bins=64).state
        'on its base LogNormal(p_mean=-1.2, p_std=1.2): no update yet'
    """

    scale: Tensor  # int64 [K]: k·u at the bin centres, bits of float64 as all here
    given: Tensor | None  # int64 [K]: ln of the error of `profile`
    progress: Tensor  # int64 [2]: mean confidence, NaN before the first update; ln of the pivot, NaN without one

    def __init__(
        self,
        base: LevelSampler | None = None,
        bins: int = 128,
        log_snr_range: tuple[float, float] = (-16.0, 16.0),
        floor: float = 0.1,
        gate: bool = True,
        prediction_type: str = "edm",
        sigma_data: float = 0.5,
        base_weight: BaseWeight | None = None,
        smoothing: float = 0.5,
        prior: float = 32.0,
        half_life: float = 32.0,
        largest_error: float | None = None,
        profile: Profile | None = None,
    ) -> None:
        super().__init__(base or LogNormal(), bins, log_snr_range, floor, corrected=False)
        self.gate = bool(gate)
        self.smoothing = require_number("smoothing", smoothing, at_least=0.0)
        self.prior = require_number("prior", prior, above=0.0)
        self.half_life = require_number("half_life", half_life, above=0.0)
        unbounded = 1.0 if prediction_type == "epsilon" else math.inf
        self.largest_error = (
            unbounded if largest_error is None else require_number("largest_error", largest_error, above=0.0)
        )
        self.profile = _checked(profile)
        scale = x0_scale(
            self.bin_centers.double(), prediction_type,
            sigma_data=require_number("sigma_data", sigma_data, above=0.0), base_weight=base_weight,
        )  # fmt: skip
        self.register_buffer("scale", scale.detach().cpu().contiguous().view(torch.int64), persistent=False)
        progress = torch.full((2,), math.nan, dtype=torch.float64).view(torch.int64)
        self.register_buffer("progress", progress)
        self.register_buffer("given", None, persistent=False)
        if self.profile is not None:
            log_error = self.profile.error_at(self.bin_centers).log()
            self.given = log_error.view(torch.int64)
            ones = torch.ones_like(log_error)
            self._set((1.0 - self.floor) * self._tilt(log_error, ones, ones) + self.floor)

    def _factors(self, criterion: DiffusionLoss, log_snr: Tensor | None) -> Tensor:
        weighting = criterion.weighting
        if not weighting.pointwise:
            raise ValueError(
                f"the criterion's weighting is {weighting}, expected one whose weight depends on log-SNR alone, by "
                "which Information divides the draws: give it a center, or use another weighting"
            )
        weight = criterion.weight_at(self.bin_centers).double()
        if self.given is not None:
            return self._tilt(self._numbers(self.given), torch.ones_like(weight), weight)
        check_has_profile(criterion)
        statistics = criterion.statistics
        moments = moments_of(statistics.state, self.bins)
        log_error, samples = smoothed_log_error(moments, self._numbers(self.scale), self.bins, self.smoothing)
        wanted = self._tilt(log_error, samples / (samples + self.prior), weight)
        if self.floor == 1.0:
            return wanted
        # The new tilt replaces the old one by half in half_life samples per bin, however often this is called.
        kept = torch.exp2(-statistics.samples_since_shares / (self.half_life * self.bins.size))
        now = (self._numbers(self.ratio) - self.floor) / (1.0 - self.floor)
        return torch.lerp(wanted, now, kept)

    def _tilt(self, log_error: Tensor, confidence: Tensor, weight: Tensor) -> Tensor:
        """Profile ÷ base in each bin, drawn towards 1 where confidence is low; its mean over the base is 1.

        log_error, confidence, weight: [K] float64, of the x0 error and of the criterion."""
        levels, masses = self.bin_centers.double(), self._numbers(self.masses)
        total = weight * self._numbers(self.scale)
        pivot = log_pivot(levels, log_error, confidence >= _SURE)
        bounded = log_error.clamp(max=math.log(self.largest_error))
        target = (bounded + levels).clamp(max=0.0) - total.log()
        if self.gate:
            target = target + gate(-0.5 * levels, pivot).log()
        known = (confidence > 0) & (masses >= _REACH) & target.isfinite()
        shares, base = (torch.where(known, values, -math.inf).log_softmax(0) for values in (target, masses.log()))
        factors = torch.where(known, confidence * (shares - base), 0.0).exp()
        self._numbers(self.progress).copy_(torch.stack([(masses * confidence).sum() / masses.sum(), pivot]))
        return factors / (factors * masses).sum()

    @property
    def state(self) -> str:
        """In words: whether the levels are on their base and why, or how far they have moved. Synchronises."""
        confidence, pivot = self._numbers(self.progress).tolist()
        if math.isnan(confidence):
            return f"on its base {self.base}: no update yet"
        if confidence == 0.0:
            return f"on its base {self.base}: the criterion has no samples"
        if self.gate and math.isnan(pivot):
            return (
                f"on its base {self.base}: the x0 error is not yet between half of σ̃² and far less over the levels "
                "with samples, so that the gate has no pivot"
            )
        return (
            f"{self.moved:.0%} of the draws moved from its base {self.base}"
            + (f", gate at sigma {math.exp(pivot):.3g}" if self.gate else "")
            + f", confidence {confidence:.0%}"
        )

    @property
    def moved(self) -> float:
        """Share of the draws that are elsewhere than the base's: total variation distance. Synchronises."""
        masses = self._numbers(self.masses)
        return float(0.5 * (masses * (self._numbers(self.ratio) - 1.0).abs()).sum())

    def extra_repr(self) -> str:
        return self.state


def _checked(profile: Any) -> Profile | None:
    if profile is None or isinstance(profile, Profile):
        return profile
    reason = ""
    if hasattr(profile, "log_loss_at"):
        reason = ": the optimal loss J* knows the training images by heart, and says nothing of what can be learned"
    raise TypeError(f"profile is a {type(profile).__name__}, expected a vadiff.information.Profile{reason}")
