"""The x0 error of a network per noise level, and what it says of where noise levels belong.

With σ̃ = sigma/alpha = e^(-λ/2), a network's x0 error m(λ), per element, is at most σ̃² for a network that does no worse
than returning its noisy input. The **information rate** min(m/σ̃², 1) is what a step of ln σ̃ towards less noise tells
about x0: it is 1 where the noise is smaller than every detail of data without redundancy, and falls as σ̃⁻² where the
noise hides all of it. Levels of training (`vadiff.levels.Information`, `vadiff.levels.suggest`) and the steps of a
sampler (`vadiff.sampling.noise_levels`) are placed by it.

Sources: InfoNoise (arXiv 2602.18647) for training, rescaled entropic time (arXiv 2504.13612) for sampling.

The optimal loss J* is no such error. It is the error of a network that has memorised the training images, and its
integral is ln N, the choice among N images, whatever they show.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .bands import Criterion
from .files import replacing
from .ops.problem import Bins, TableRule
from .ops.reference import moments_of, smooth
from .process import loss_ratio
from .regression_target import removed_error

BaseWeight = Callable[[Tensor], Tensor]
"""u as a function of log-SNR, [B] → [B]."""

_TAIL = 0.01  # share of the information, at the noisiest levels, that the gate leaves out
_OUTSIDE = 0.1  # share of an end bin's samples from outside the range above which it has no error
FEWEST = 16.0  # smoothed samples that a bin needs to enter a profile
_COLUMNS = ("log_snr", "x0_error")


class Losses(Protocol):
    """The attributes of a `vadiff.validation.LevelLosses` that are read here."""

    @property
    def log_snr(self) -> Tensor: ...  # [L]

    @property
    def loss(self) -> Tensor: ...  # [L]


@dataclass(frozen=True, eq=False)
class Profile:
    """x0 error per noise level.

    Args:
        log_snr: [T] natural log of alpha²/sigma², T at least 2, all different, in any order.
        x0_error: [T] mean squared error of x0 per element, positive.

    Attributes:
        log_snr: [T] float64, rising.
        x0_error: [T] float64.

    Raises:
        TypeError: an argument is not a tensor, or is an optimal loss J*.
        ValueError: other shapes, or numbers that are not finite, different or positive.
    """

    log_snr: Tensor
    x0_error: Tensor

    def __post_init__(self) -> None:
        for name in _COLUMNS:
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor of shape (T,)")
            if value.dim() != 1 or len(value) < 2:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected (T,) with at least 2 noise levels")
        if len(self.log_snr) != len(self.x0_error):
            raise ValueError(
                f"x0_error has {len(self.x0_error)} entries, expected {len(self.log_snr)}: one per level of log_snr"
            )
        levels, order = self.log_snr.detach().cpu().double().sort()
        errors = self.x0_error.detach().cpu().double()[order]
        if not bool(levels.isfinite().all()) or bool((levels.diff() <= 0).any()):
            raise ValueError("log_snr has a non-finite number or one twice, expected different finite numbers")
        bad = ~(errors.isfinite() & (errors > 0))
        if bool(bad.any()):
            place = int(bad.nonzero()[0])
            raise ValueError(
                f"x0_error is {errors[place]:.4g} at log-SNR {levels[place]:.4g}, expected positive finite numbers"
            )
        object.__setattr__(self, "log_snr", levels)
        object.__setattr__(self, "x0_error", errors)

    @classmethod
    def of_criterion(
        cls,
        criterion: Criterion,
        prediction_type: str,
        *,
        sigma_data: float = 0.5,
        base_weight: BaseWeight | None = None,
        smoothing: float = 0.5,
    ) -> Profile:
        """The errors that a criterion has recorded: mean base loss of each bin, over k·u at its centre, smoothed.

        With posterior-mean targets, what they take out of the error is added. Copies the statistics to the host, which
        synchronises with the GPU.

        Args:
            criterion: a `vadiff.DiffusionLoss` of any weighting, which does not enter the recorded loss.
            prediction_type: form of the loss, one of `vadiff.process.PREDICTION_TYPES`: "edm" for EDM's objective,
                λ(σ)·(D - x0)², whose λ(σ) is part of that form.
            sigma_data: standard deviation of the data, for "edm".
            base_weight: any further u of the calls, as a function of log-SNR.
            smoothing: width of the local fit over neighbouring bins, in log-SNR units.

        Raises:
            ValueError: a loss other than "mse", an unknown prediction type, or fewer than two bins with enough samples.
        """
        check_has_profile(criterion)
        bins = criterion.statistics.bins
        moments = moments_of(criterion.statistics.state.cpu(), bins)
        centers = criterion.bin_centers.cpu().double()
        scale = x0_scale(centers, prediction_type, sigma_data=sigma_data, base_weight=base_weight)
        outside = criterion.statistics.outside.cpu()
        removed = removed_error(criterion, criterion.bin_centers).cpu()
        log_error, samples = smoothed_log_error(moments, outside, scale, removed, bins, smoothing)
        known = samples >= FEWEST
        if int(known.sum()) < 2:
            raise ValueError(
                f"the criterion has {moments[0].sum():,.0f} samples and {int(known.sum())} bins with at least "
                f"{FEWEST:.0f} of them, expected at least 2 such bins: train for some hundred steps first"
            )
        return cls(centers[known], log_error[known].exp())

    @classmethod
    def of_losses(
        cls, losses: Losses, prediction_type: str, *, sigma_data: float = 0.5, base_weight: BaseWeight | None = None
    ) -> Profile:
        """The errors of a validation at fixed levels, `vadiff.validation.LevelLosses`; arguments as for a criterion.

        Raises:
            ValueError: an unknown prediction type, or losses that are not positive.
        """
        levels = losses.log_snr.double()
        scale = x0_scale(levels, prediction_type, sigma_data=sigma_data, base_weight=base_weight)
        return cls(levels, losses.loss.double() / scale)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read CSV with the columns log_snr and x0_error, as `save` writes it.

        Raises:
            OSError: there is no such file.
            ValueError: it is not such a file.
        """
        try:
            with Path(path).open(newline="") as file:
                rows = [[float(row[name]) for name in _COLUMNS] for row in csv.DictReader(file)]
            return cls(*torch.tensor(rows, dtype=torch.float64).reshape(-1, 2).unbind(1))
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"{path} is no profile, expected CSV with the columns log_snr,x0_error: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write CSV with the columns log_snr and x0_error. Replaces the file in one step."""
        with replacing(Path(path)) as partial, partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            writer.writerows(zip(self.log_snr.tolist(), self.x0_error.tolist(), strict=True))

    def bounded(self, sigma_data: float) -> Profile:
        """With errors of at most sigma_data², the error of guessing the mean of the data.

        For networks that predict eps: at σ̃ far above sigma_data a small error of eps is a large one of x0, larger than
        that of the guess. It shows what the network does wrong there, and nothing of the data; without the bound it
        puts most steps of a sampler at high noise.

        Args:
            sigma_data: standard deviation of the data, or more: 1 for pixels in [-1, 1].

        Raises:
            ValueError: sigma_data is not a positive number.
        """
        if not 0.0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data is {sigma_data}, expected a positive number")
        return Profile(self.log_snr, self.x0_error.clamp(max=sigma_data**2))

    @property
    def sigma(self) -> Tensor:
        """sigma/alpha of the levels, falling. [T] float64."""
        return (-0.5 * self.log_snr).exp()

    def error_at(self, log_snr: Tensor) -> Tensor:
        """x0 error at any log-SNR, [N] → [N] float64.

        Linear in ln(error) between the levels; ∝ σ̃² at less noise than theirs, constant at more.
        """
        return (self._log_rate_at(log_snr) - log_snr.double()).exp()

    def rate_at(self, log_snr: Tensor) -> Tensor:
        """Information rate min(x0 error / σ̃², 1) at any log-SNR, [N] → [N] float64.

        Linear in its logarithm between the levels; constant at less noise than theirs, ∝ σ̃⁻² at more.
        """
        return self._log_rate_at(log_snr).clamp(max=0.0).exp()

    def _log_rate_at(self, log_snr: Tensor) -> Tensor:
        at = log_snr.detach().cpu().double()
        log_rate = self.x0_error.log() + self.log_snr
        right = torch.searchsorted(self.log_snr, at).clamp(1, len(self.log_snr) - 1)
        share = (at - self.log_snr[right - 1]) / (self.log_snr[right] - self.log_snr[right - 1])
        inside = torch.lerp(log_rate[right - 1], log_rate[right], share.clamp(0.0, 1.0))
        return inside + (at - self.log_snr[0]).clamp(max=0.0)

    @property
    def pivot(self) -> float | None:
        """sigma/alpha of the gate, c of `gate`: where the rate is half of its highest; None without one."""
        known = torch.ones_like(self.log_snr, dtype=torch.bool)
        found = float(log_pivot(self.log_snr, self.x0_error.log(), known))
        return None if math.isnan(found) else math.exp(found)


def x0_scale(
    log_snr: Tensor, prediction_type: str, *, sigma_data: float = 0.5, base_weight: BaseWeight | None = None
) -> Tensor:
    """k·u, by which the base loss differs from the x0 error per element: g = k·u·m. [B] float64.

    Args:
        log_snr: [B].
        prediction_type: form of the loss, one of `vadiff.process.PREDICTION_TYPES`.
        sigma_data: standard deviation of the data, for "edm".
        base_weight: u as a function of log-SNR; None is 1.

    Raises:
        TypeError: base_weight is no function.
        ValueError: an unknown prediction type, or a base weight that does not give a positive number for each level.
    """
    scale = loss_ratio(prediction_type, log_snr.double(), sigma_data=sigma_data)
    if base_weight is None:
        return scale
    if not callable(base_weight):
        raise TypeError(f"base_weight is {base_weight!r}, expected a function of log-SNR [B] that returns u [B]")
    weight: Any = base_weight(log_snr.float())
    if not isinstance(weight, Tensor) or weight.shape != log_snr.shape:
        got = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else f"type {type(weight).__name__}"
        raise ValueError(
            f"the result of base_weight has {got}, expected a tensor of shape {tuple(log_snr.shape)}: u of each level"
        )
    if not bool((weight.isfinite() & (weight > 0)).all()):
        raise ValueError("the result of base_weight has a number that is not positive and finite, expected u > 0")
    return scale * weight.double().to(scale.device)


def check_has_profile(criterion: Criterion) -> None:
    """Raise ValueError unless the criterion records squared errors, of which x0 errors can be computed."""
    if criterion.loss != "mse":
        raise ValueError(
            f"the criterion's loss is {criterion.loss!r}, expected 'mse': other losses do not convert to an x0 error"
        )


def smoothed_log_error(
    moments: Tensor, outside: Tensor, scale: Tensor, removed: Tensor, bins: Bins, smoothing: float
) -> tuple[Tensor, Tensor]:
    """ln of the x0 error per bin, smoothed as weights are, and the smoothed number of samples; 0 where there are none.

    An end bin has no error of its own, but with smoothing its neighbours', if more than a tenth of its samples are from
    outside the range, where k·u is not that of its centre.

    moments: [4, K] of the base loss. outside: [2], samples below and above the range. scale: [K], k·u at the bin
    centres. removed: [K], error that the target has taken out. Runs on the device, without synchronising.
    """
    count, mean = moments[0], moments[1]
    from_outside = torch.zeros_like(count)
    from_outside[0], from_outside[-1] = outside[0], outside[1]
    has_value = (count > 0) & (mean > 0) & (from_outside <= _OUTSIDE * count)
    log_error = torch.where(has_value, (mean / scale + removed).log(), 0.0)
    count = torch.where(has_value, count, 0.0)
    if smoothing > 0:
        return smooth(log_error, count, bins, TableRule("mean", -1.0, smoothing, math.inf, 1.0))
    return log_error, count


def log_pivot(log_snr: Tensor, log_error: Tensor, known: Tensor) -> Tensor:
    """ln c, c the highest σ̃ with at least half of the highest information rate; NaN without one. Scalar float64.

    NaN also if no known level has e times as much noise: then the rate does not yet fall there, as that of an untrained
    network that predicts eps, and says nothing of the data. The highest rate is 1 where every element has details of
    its own, and less where elements repeat each other or are constant, as in grey images in three channels.

    log_snr, log_error: [K] float64, by rising log-SNR. known: [K] bool. Runs on the device, without synchronising.
    """
    rate = torch.where(known, (log_error + log_snr).clamp(max=0.0), -math.inf)
    levels = torch.where(known, -0.5 * log_snr, -math.inf)
    informative = known & (rate >= rate.amax() - math.log(2.0))
    highest = torch.where(informative, levels, -math.inf).amax()
    return torch.where(highest.isfinite() & (highest + 1.0 <= levels.amax()), highest, math.nan)


def gate(log_sigma: Tensor, log_pivot: Tensor) -> Tensor:
    """σ̃³/(σ̃³ + c³): closes below the pivot c, where a network is far from optimal and its error is no information.

    Source: InfoNoise (arXiv 2602.18647), with n = 3. Its own pivot is a share of the maximum of m/σ̃³, which depends on
    the lowest noise level; this one does so only while the rate still rises there.
    """
    return torch.sigmoid(3.0 * (log_sigma - log_pivot))


def tail_gate(information: Tensor) -> Tensor:
    """F/(F + 0.01), F the share of the information at a level and all noisier ones: closes on the last hundredth.

    Where a loss weighs high noise little, as that of eps does, levels that hold next to no information would take most
    of the draws to make up for it.

    information: [K] by rising log-SNR, not negative. Runs on the device, without synchronising.
    """
    share = information.cumsum(0) / information.sum()
    return share / (share + _TAIL)
