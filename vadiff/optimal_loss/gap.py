"""What a model's loss is above the optimal one: measured, and trained on (arXiv 2506.13763, section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._validation import is_number
from ..levels.adaptive import AdaptiveLevels
from ..levels.fixed import LogUniform
from ..levels.sampler import LevelSampler, require_number
from ..loss import DiffusionLoss
from ..process import PREDICTION_TYPES, loss_ratio
from ..ops.reference import moments_of
from ..weighting.fixed import MAX_WEIGHT, SNRWeighting
from .curve import OptimalLoss

Denoise = Callable[..., Tensor]
"""D(noisy [B, ...], sigma [B]) → estimate of x0 [B, ...]; called with labels [B] as third argument where given."""


class ModelGap(NamedTuple):
    """A model's x0 loss beside the optimal one, both as a mean over elements; each [T] float64."""

    sigma: Tensor
    loss: Tensor
    optimal: Tensor  # J*/D
    gap: Tensor  # loss - J*/D: what training can still win. Below 0 only by chance, or for a model that saw other data
    stderr: Tensor  # of the gap, from images, noise and J*; NaN with a single image


@torch.no_grad()
def model_gap(
    denoise: Denoise,
    images: Tensor,
    optimal: OptimalLoss,
    *,
    labels: Tensor | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    draws: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ModelGap:
    """A model's loss above the optimal one, at each noise level.

    The images are to be those of the split and the augmentation that `optimal` is of: J* bounds the loss on the
    training set. On held-out images there is no such bound; report their loss as it is. Give averaged weights, as one
    samples with; a module is put in eval mode for the while.

    Args:
        denoise: D(noisy, sigma) or D(noisy, sigma, labels) → estimate of x0.
        images: [N, ...] floating, as the network sees them.
        optimal: J* of their data set: without labels that of `estimate`, with them that of `estimate_given_class`.
        labels: [N], passed on.
        sigmas: noise levels; those of `optimal` by default.
        draws: noises per image. They are the same for every model and level.
        batch_size: images at a time.
        seed: of the noise.
        device: where `denoise` runs.

    Raises:
        TypeError: images is not a floating-point tensor.
        ValueError: images of another size than J* is of, labels of another length, labels and a J* that is not that
            of a denoiser that is told them, or the other way round; what `denoise` returned of another shape; a number
            out of bounds.
    """
    if not images.is_floating_point():
        raise TypeError(f"images has dtype {images.dtype}, expected floating point: images as the network sees them")
    if images.dim() < 2 or len(images) == 0:
        raise ValueError(f"images has shape {tuple(images.shape)}, expected (N, ...) with at least one image")
    for name, number in (("draws", draws), ("batch_size", batch_size)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} is {number!r}, expected a positive integer")
    elements = images[0].numel()
    if elements != optimal.elements:
        raise ValueError(
            f"images have {elements} elements, expected {optimal.elements}: the optimal loss is of another data set"
        )
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"labels has length {len(labels)}, expected {len(images)}: one for each image")
    if (labels is None) == (optimal.classes > 0):
        kind = "is told the class" if optimal.classes else "is told no class"
        raise ValueError(
            f"labels is {'None' if labels is None else 'given'}, but the optimal loss is of a denoiser that {kind}: "
            f"take it from {'estimate_given_class' if labels is not None else 'estimate'}"
        )
    levels = optimal.sigma if sigmas is None else torch.as_tensor(sigmas, dtype=torch.float64)
    if levels.dim() != 1 or len(levels) == 0 or not bool(((levels > 0) & levels.isfinite()).all()):
        raise ValueError(f"sigmas is {sigmas!r}, expected one or more noise levels, positive and finite")
    sums = torch.zeros(2, len(levels), dtype=torch.float64)  # of an image's loss, and of its square
    generator = torch.Generator().manual_seed(seed)
    with _evaluating(denoise):
        for start in range(0, len(images), batch_size):
            clean = images[start : start + batch_size].to(device)
            given = () if labels is None else (labels[start : start + batch_size].to(device),)
            per_image = torch.zeros(len(levels), len(clean), dtype=torch.float64)
            for _ in range(draws):
                noise = torch.randn(clean.shape, generator=generator).to(device)
                for level, sigma in enumerate(levels.tolist()):
                    at = torch.full((len(clean),), sigma, device=device)
                    denoised = denoise(clean + sigma * noise, at, *given)
                    if denoised.shape != clean.shape:
                        raise ValueError(
                            f"denoise returned shape {tuple(denoised.shape)}, expected {tuple(clean.shape)}: an "
                            "estimate of each image"
                        )
                    error = denoised - clean
                    per_image[level] += error.square().flatten(1).mean(1).double().cpu() / draws
            sums += torch.stack([per_image.sum(1), per_image.square().sum(1)])
    size = len(images)
    loss = sums[0] / size
    variance = (sums[1] / size - loss.square()).clamp(min=0.0) / (size - 1 or math.nan)
    best = optimal.log_loss_at(-2.0 * levels.log()).exp() if sigmas is not None else optimal.loss / elements
    # Where levels lie between those of the curve, its error is that of the nearest.
    nearest = (levels.log()[:, None] - optimal.sigma.log()).abs().argmin(1)
    stderr = (variance + (optimal.stderr[nearest] / elements).square()).sqrt()
    return ModelGap(levels, loss, best, loss - best, stderr)


@contextmanager
def _evaluating(denoise: Denoise) -> Iterator[None]:
    """A module in eval mode, afterwards in the mode it was in."""
    training = isinstance(denoise, nn.Module) and denoise.training
    if isinstance(denoise, nn.Module):
        denoise.eval()
    try:
        yield
    finally:
        if isinstance(denoise, nn.Module):
            denoise.train(training)


@dataclass(frozen=True)
class GapWeighting(SNRWeighting):
    """scale·min(D/J*, cap) + bump·N(ln sigma; bump_mean, bump_std²)·[sigma < sigma*] on the x0 loss per element.

    The weight of the optimal-loss schedule (arXiv 2506.13763, section 5). The paper's values of its constants are not
    known to us. Ours make the first term 1 up to sigma* and let it fall as 1/J* above; the bump adds 0.4 at its peak.

    Args:
        optimal: the data set's J*.
        cap: the paper's w*; by default D/J* at sigma*, where J* is 1e-3 of the total variance.
        scale: the paper's a; by default 1/cap.
        bump: factor of the Gaussian; 1 in the paper, 0 leaves it out.
        bump_mean: its centre in ln(sigma); by default 1 below ln(sigma*).
        bump_std: its width in ln(sigma).
        prediction_type, sigma_data, max_weight: see `weighting.SNRWeighting`.

    Raises:
        TypeError: `optimal` is no `OptimalLoss`.
        ValueError: an argument out of bounds, or a curve on which there is no sigma*.
    """

    optimal: OptimalLoss
    cap: float | None = None
    scale: float | None = None
    bump: float = 1.0
    bump_mean: float | None = None
    bump_std: float = 1.0
    prediction_type: str = "edm"
    sigma_data: float = 0.5
    max_weight: float = MAX_WEIGHT

    _log_star: float = field(init=False, repr=False, compare=False)

    _positive = ("bump_std",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_curve(self.optimal)
        object.__setattr__(self, "_log_star", math.log(self.optimal.sigma_star()))
        for name, lowest in (("cap", 0.0), ("scale", 0.0), ("bump_mean", -math.inf)):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and lowest < value < math.inf):
                raise ValueError(f"{name} is {value!r}, expected a finite number above {lowest:g}, or None")
        if not is_number(self.bump) or not 0 <= self.bump < math.inf:
            raise ValueError(f"bump is {self.bump!r}, expected a finite number of at least 0")

    def log_x0_weight(self, log_snr: Tensor) -> Tensor:
        cap = 1e3 * self.optimal.elements / self.optimal.total_variance if self.cap is None else self.cap
        scale = 1.0 / cap if self.scale is None else self.scale
        center = self._log_star - 1.0 if self.bump_mean is None else self.bump_mean
        log_sigma = -0.5 * log_snr
        inverse = (-self.optimal.log_loss_at(log_snr)).clamp(max=math.log(cap)).exp()
        bump = (-0.5 * ((log_sigma - center) / self.bump_std).square()).exp() / (self.bump_std * math.sqrt(math.tau))
        return (scale * inverse + self.bump * torch.where(log_sigma < self._log_star, bump, 0.0)).log()


class GapLevels(AdaptiveLevels):
    """p(ln sigma) ∝ w·(J - J*): more draws where a weighted model is furthest from its optimum (arXiv 2506.13763).

    From each sample's loss in x0 form J*/D at its own noise level is subtracted before it enters a bin, so that what J*
    does within a bin does not matter. Bins with a negative mean gap get the floor, bins never visited the average. With
    w as weight and this as levels, a noise level gets w²·(J - J*), as in the paper.

    Args:
        optimal: the data set's J*.
        weighting: w, a weight of the x0 loss; `GapWeighting(optimal)` by default.
        base: what is tilted; by default uniform in ln(sigma) from 0.002 to 80, as in the paper.
        bins, log_snr_range: the criterion's.
        floor: share of levels drawn from the base as it is.
        half_life: samples per bin after which a gap counts half.
        prior: samples at which a bin's own evidence counts half.
        prediction_type: of what the criterion's squared residual is the error: "sample" for x0 and for EDM's D.
        sigma_data: for "edm", the raw output F.

    Raises:
        TypeError: `optimal` is no `OptimalLoss`, or `weighting` no weight of the x0 loss.
        ValueError: an argument out of bounds.
    """

    def __init__(
        self,
        optimal: OptimalLoss,
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
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {prediction_type!r}, expected one of {', '.join(PREDICTION_TYPES)}")
        _require_curve(optimal)
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
        gap = ell.double() / k - self.optimal.log_loss_at(log_snr).exp()
        with torch.enable_grad():  # it records in training only
            self._recorder.reweight(gap.float(), log_snr)
        n, mean, *_ = moments_of(self._recorder.statistics.state, self.bins)
        weight = self.weighting.log_x0_weight(self.bin_centers.double()).exp()
        factors = weight * mean.clamp(min=0.0)
        masses = self._numbers(self.masses) * (n > 0)
        average = (factors * masses).sum() / masses.sum()
        tilted = (n * factors + self.prior * average) / (n + self.prior)
        return torch.where(average > 0, tilted, 1.0)  # the base where nothing was seen, or nothing is to win anywhere


def _require_curve(optimal: OptimalLoss) -> None:
    if not isinstance(optimal, OptimalLoss):
        raise TypeError(f"optimal is a {type(optimal).__name__}, expected a vadiff.optimal_loss.OptimalLoss")
