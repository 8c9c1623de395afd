"""Levels placed where training has information to gain, from the x0 error that the statistics hold."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._validation import is_number, require_number
from ..information import (
    BaseWeight,
    Profile,
    check_has_profile,
    gate,
    log_pivot,
    smoothed_log_error,
    tail_gate,
    x0_scale,
)
from ..loss import DiffusionLoss
from ..ops.reference import moments_of
from ..regression_target import removed_error
from .adaptive import AdaptiveLevels, require_not_adaptive
from .fixed import LogNormal
from .sampler import LevelSampler

_REACH = 1e-9  # least mass of a bin that may be tilted: the base's quantile resolves no levels in smaller ones
_SURE = 0.5  # confidence of a bin that the pivot may be read from
_MOVED = 0.005  # share of the draws below which the levels are on their base


class Information(AdaptiveLevels):
    """p(λ) ∝ gate · min(m/σ̃², 1) / (w·u·k): as many draws as a level has information for each unit of its weight.

    m is the x0 error per element of the network in training, σ̃ = e^(-λ/2), and w·u·k the whole weight of the x0 error
    in the loss, so that p·w·u·k, what a level contributes, is gate · min(m/σ̃², 1) whatever the weighting is. An
    adaptive weighting therefore changes the draws and not the contributions: with Information, prefer constant weights.
    There is no 1/p correction, which would restore the base. docs/levels.md has what was measured: better samples where
    a base does not fit the data, worse ones than uniform timesteps for a loss of eps.

    The gate closes at both ends. At low noise it is σ̃³/(σ̃³ + c³): below the pivot c, the highest σ̃ with half of the
    highest m/σ̃², a network is far from optimal, and m/σ̃² would draw ever more levels that teach it nothing. At high
    noise it closes on the levels that hold the last hundredth of the information, which a loss of eps, whose weight
    falls as σ̃⁻², would draw most. While the rate does not fall at the noisiest levels with samples, as that of an
    untrained network, there is no pivot, and the levels stay on the base; `state` says so.

    Levels with few samples stay near the base, by n/(n + prior); `floor` of all draws come from it, so that no level
    starves; and the levels move half way to what the statistics say in `half_life` samples per bin. All of this is in
    buffers: a resumed run goes on exactly. A batch that diverged stays in the statistics for their own half-life, and
    so in the levels.

    Sources: InfoNoise (arXiv 2602.18647); VDM++ (arXiv 2303.00848, appendix F) for levels that follow an average loss.

    Args:
        base: the distribution to start from; `LogNormal()` by default. It must reach wherever the information is: bins
            with less than 1e-9 of its draws keep that share. Not an adaptive one.
        bins, log_snr_range: the criterion's.
        floor: share of levels drawn from the base, > 0.
        gate: False leaves the gate open at both ends.
        prediction_type: form of the criterion's loss, one of `vadiff.process.PREDICTION_TYPES`; "edm" for EDM's
            objective, λ(σ)·(D - x0)².
        sigma_data: standard deviation of the data, for "edm".
        base_weight: any further u of the calls, as a function of log-SNR.
        smoothing: width of the local fit over neighbouring bins, in log-SNR units.
        prior: number of samples at which a bin is half way between base and profile.
        half_life: mean number of samples per bin in which the levels move half way to the profile.
        largest_error: x0 errors above this count as this. A network that predicts eps can be worse than the mean of the
            data at high noise, where a small error of eps is a large one of x0: unbounded, it would draw most levels
            there. Give the variance of your data. None is 1 for "epsilon", enough for pixels in [-1, 1] and latents of
            unit variance, else infinity: no bound.
        profile: errors to place the levels by, in place of those of the criterion: of a finished run or of a
            validation. Then the levels are there from the first draw, an update reads only the criterion's weights and
            follows them at once, and smoothing, prior and half_life are not used.

    Raises:
        TypeError: the profile is not a `vadiff.information.Profile` (an optimal loss J* is none, see there); base is
            not a `LevelSampler`, or is an adaptive one; base_weight is no function.
        ValueError: an argument out of bounds.
        RuntimeError: from `load_state_dict`, as `Table`, and for a sampler of another form of the loss.

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
        base = LogNormal() if base is None else require_not_adaptive("base", base)
        super().__init__(base, bins, log_snr_range, floor, corrected=False)
        if gate not in (0, 1):  # numbers on a command line
            raise ValueError(f"gate is {gate!r}, expected True or False")
        self.gate = bool(gate)
        self.smoothing = require_number("smoothing", smoothing, at_least=0.0)
        self.prior = require_number("prior", prior, above=0.0)
        self.half_life = require_number("half_life", half_life, above=0.0)
        if largest_error is None:
            largest_error = 1.0 if prediction_type == "epsilon" else math.inf
        if not is_number(largest_error) or not largest_error > 0.0:
            raise ValueError(f"largest_error is {largest_error!r}, expected a positive number, or infinity")
        self.largest_error = float(largest_error)
        self.profile = _checked(profile)
        scale = x0_scale(
            self.bin_centers.double(), prediction_type,
            sigma_data=require_number("sigma_data", sigma_data, above=0.0), base_weight=base_weight,
        )  # fmt: skip
        self.register_buffer("scale", scale.detach().cpu().contiguous().view(torch.int64))
        progress = torch.full((2,), math.nan, dtype=torch.float64).view(torch.int64)
        self.register_buffer("progress", progress)
        self.register_buffer("given", None, persistent=False)
        if self.profile is not None:
            log_error = self.profile.error_at(self.bin_centers).log()
            self.given = log_error.view(torch.int64)
            ones = torch.ones_like(log_error)
            self._set((1.0 - self.floor) * self._tilt(log_error, ones, ones, self._measured()) + self.floor)

    def _factors(self, criterion: DiffusionLoss, log_snr: Tensor | None) -> Tensor:
        weighting = criterion.weighting
        if not weighting.pointwise:
            raise ValueError(
                f"the criterion's weighting is {weighting}, expected one whose weight depends on log-SNR alone, by "
                "which Information divides the draws: give it a center, or use another weighting"
            )
        weight = criterion.weight_at(self.bin_centers).double()
        if self.given is not None:
            return self._tilt(self._numbers(self.given), torch.ones_like(weight), weight, self._measured())
        check_has_profile(criterion)
        statistics = criterion.statistics
        moments = moments_of(statistics.state, self.bins)
        log_error, samples = smoothed_log_error(
            moments,
            statistics.outside,
            self._numbers(self.scale),
            removed_error(criterion, self.bin_centers),
            self.bins,
            self.smoothing,
        )
        confidence = samples / (samples + self.prior)
        wanted = self._tilt(log_error, confidence, weight, confidence >= _SURE)
        if self.floor == 1.0:
            return wanted
        # The new tilt replaces the old one by half in half_life samples per bin, however often this is called.
        kept = torch.exp2(-statistics.samples_since_shares / (self.half_life * self.bins.size))
        now = (self._numbers(self.ratio) - self.floor) / (1.0 - self.floor)
        return torch.lerp(wanted, now, kept)

    def _measured(self) -> Tensor:
        """The bins within the levels of the given profile, beyond which its errors are extrapolated. [K] bool."""
        assert self.profile is not None
        levels = self.bin_centers.double()
        return (levels >= float(self.profile.log_snr[0])) & (levels <= float(self.profile.log_snr[-1]))

    def _tilt(self, log_error: Tensor, confidence: Tensor, weight: Tensor, sure: Tensor) -> Tensor:
        """Profile ÷ base in each bin, drawn towards 1 where confidence is low; its mean over the base is 1.

        log_error, confidence, weight: [K] float64, of the x0 error and of the criterion. sure: [K] bool, where the
        pivot may be read from."""
        levels, masses = self.bin_centers.double(), self._numbers(self.masses)
        total = weight * self._numbers(self.scale)
        pivot = log_pivot(levels, log_error, sure)
        rate = (log_error.clamp(max=math.log(self.largest_error)) + levels).clamp(max=0.0)
        within = (confidence > 0) & (masses >= _REACH)
        if self.gate:
            rate = rate + gate(-0.5 * levels, pivot).log()
            rate = rate + tail_gate(torch.where(within, rate.exp(), 0.0)).log()
        target = rate - total.log()
        known = within & target.isfinite()
        shares, base = (torch.where(known, values, -math.inf).log_softmax(0) for values in (target, masses.log()))
        factors = torch.where(known, confidence * (shares - base), 0.0).exp()
        self._numbers(self.progress).copy_(torch.stack([(masses * confidence).sum() / masses.sum(), pivot]))
        return factors / (factors * masses).sum()

    @property
    def state(self) -> str:
        """In words: whether the levels are on their base and why, or how far they have moved. Synchronises."""
        confidence, pivot = self._numbers(self.progress).tolist()
        moved = self.moved
        if math.isnan(confidence):
            return f"on its base {self.base}: no update yet"
        if confidence == 0.0:
            reason = "the criterion has no samples"
        elif self.gate and math.isnan(pivot):
            reason = (
                "the x0 error falls no faster than the noise at the noisiest levels that are known: the network is "
                "untrained, or the base does not reach noise that hides the data"
            )
        else:
            return (
                f"{moved:.0%} of the draws moved from its base {self.base}"
                + (f", gate at sigma {math.exp(pivot):.3g}" if self.gate else "")
                + f", confidence {confidence:.0%}"
            )
        if moved < _MOVED:
            return f"on its base {self.base}: {reason}"
        return f"{moved:.0%} of the draws are away from its base {self.base}, and return: {reason}"

    @property
    def moved(self) -> float:
        """Share of the draws that are elsewhere than the base's: total variation distance. Synchronises."""
        masses = self._numbers(self.masses)
        return float(0.5 * (masses * (self._numbers(self.ratio) - 1.0).abs()).sum())

    def extra_repr(self) -> str:
        return self.state

    def _mismatch(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        scale = state_dict.get(prefix + "scale")
        if isinstance(scale, Tensor) and scale.shape == self.scale.shape and scale.dtype == torch.int64:
            mine, saved = self._numbers(self.scale.cpu()), self._numbers(scale.cpu())
            if not torch.allclose(mine, saved, rtol=1e-6, atol=0.0):
                return (
                    "scale belongs to another form of the loss: make the sampler with the prediction_type, sigma_data "
                    "and base_weight that were saved"
                )
        return super()._mismatch(state_dict, prefix)


def _checked(profile: Any) -> Profile | None:
    if profile is None or isinstance(profile, Profile):
        return profile
    reason = ""
    if hasattr(profile, "log_loss_at"):
        reason = ": the optimal loss J* is the error of a network that has memorised the training images"
    raise TypeError(f"profile is a {type(profile).__name__}, expected a vadiff.information.Profile{reason}")
