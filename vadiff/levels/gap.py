"""A level distribution that adapts to a model's gap to the optimal loss (arXiv 2506.13763)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._validation import require_known, require_number
from ..loss import DiffusionLoss
from ..ops.reference import moments_of
from ..process import PREDICTION_TYPES, loss_ratio
from ..regression_target import removed_error
from ..weighting import GapWeighting, SNRWeighting
from ..weighting.optimal import OptimalCurve, require_curve
from .adaptive import AdaptiveLevels
from .fixed import LogUniform
from .sampler import LevelSampler


class GapLevels(AdaptiveLevels):
    """p(ln sigma) ∝ w·(J - J*): more draws where the weighted gap is larger (arXiv 2506.13763).

    A sample's gap is its x0 loss minus J*/D at its own noise level, so that the change of J* within a bin cancels. Bins
    with a negative mean gap get the floor, empty bins the average. With w also as the loss weight, a noise level
    contributes in proportion to w²·(J - J*), as in the paper.

    Args:
        optimal: the data set's J*.
        weighting: w, a weight of the x0 loss; `vadiff.weighting.GapWeighting(optimal)` by default.
        base: the distribution to tilt; by default uniform in ln(sigma) from 0.002 to 80, as in the paper.
        bins, log_snr_range: the criterion's.
        floor: share of levels drawn from the untilted base.
        half_life: mean number of samples per bin after which a gap counts half.
        prior: number of samples at which a bin's mean gap and the average count equally.
        prediction_type: form of the criterion's loss: "sample" for x0 and for EDM's D.
        sigma_data: standard deviation of the data, for "edm" (the raw network output F).

    Raises:
        TypeError: `optimal` is not a `vadiff.optimal_loss.OptimalLoss`, or `weighting` not an `SNRWeighting`.
        ValueError: an argument out of bounds.
    """

    def __init__(
        self,
        optimal: OptimalCurve,
        weighting: SNRWeighting | None = None,
        base: LevelSampler | None = None,
        bins: int = 128,
        log_snr_range: tuple[float, float] = (-16.0, 16.0),
        floor: float = 0.1,
        half_life: float = 256.0,
        prior: float = 32.0,
        prediction_type: str = "sample",
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__(base or LogUniform(), bins, log_snr_range, floor, corrected=False)
        require_known("prediction_type", prediction_type, PREDICTION_TYPES)
        require_curve(optimal)
        if weighting is not None and not isinstance(weighting, SNRWeighting):
            raise TypeError(
                f"weighting is {weighting!r}, expected a weight of the x0 loss: a vadiff.weighting.SNRWeighting, "
                "as GapWeighting, MinSNR and EDM are"
            )
        self.optimal = optimal
        self.weighting = GapWeighting(optimal) if weighting is None else weighting
        self.prior = require_number("prior", prior, above=0.0)
        self.prediction_type = prediction_type
        self.sigma_data = require_number("sigma_data", sigma_data, above=0.0)
        self._recorder = DiffusionLoss("constant", bins, log_snr_range, half_life)

    def _factors(self, criterion: DiffusionLoss, log_snr: Tensor | None) -> Tensor:
        ell = criterion.per_sample_loss
        if log_snr is None or ell is None:
            missing = "log_snr is None" if log_snr is None else "the criterion was not called yet"
            raise ValueError(f"{missing}, expected update(criterion, log_snr) after a loss: gaps are per sample")
        if log_snr.shape != ell.shape:
            raise ValueError(
                f"log_snr has shape {tuple(log_snr.shape)}, expected {tuple(ell.shape)}: that of the last loss"
            )
        k = loss_ratio(self.prediction_type, log_snr.double(), sigma_data=self.sigma_data)
        gap = ell.double() / k + removed_error(criterion, log_snr) - self.optimal.log_loss_at(log_snr).exp()
        with torch.enable_grad():  # the recorder records only with grad enabled
            self._recorder.reweight(gap.float(), log_snr)
        n, mean, *_ = moments_of(self._recorder.statistics.state, self.bins)
        weight = self.weighting.log_x0_weight(self.bin_centers.double()).exp()
        factors = weight * mean.clamp(min=0.0)
        masses = self._numbers(self.masses) * (n > 0)
        average = (factors * masses).sum() / masses.sum()
        tilted = (n * factors + self.prior * average) / (n + self.prior)
        return torch.where(average > 0, tilted, 1.0)  # the base if no bin has samples with a positive gap
