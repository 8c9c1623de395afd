"""Whether the noise levels that a criterion was given can be log-SNR, and what they probably are if not.

`problem_with_levels` judges the share of samples in each bin and the values of some batches, on the CPU. It warns only
where no noise schedule in use looks like that: most samples outside the bins, values all in [0, 1], values that are
never negative with a tail heavier than any schedule's, whole numbers, or the very distribution that a known mistake
makes of DDPM's, Stable Diffusion's or the cosine schedule. Mistakes that give a plausible distribution stay unseen: the
square root of ᾱ, and a reversed time where high and low noise are equally frequent (uniform times of a flow).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .ops.problem import Bins
from .process import DiscreteVP

FEWEST_SAMPLES = 150
"""Effective number of samples below which nothing is judged: 200 calls of one sample each are enough."""

_CLEAN = 12.75  # sigma .0017: EDM's lowest is .002, log-SNR 12.4
_NO_LOG_SNR = 40.0  # sigma 2e-9: a finite log-SNR above it is none
_PIXEL = 255.5  # noise levels of images with values up to 255 may be whole numbers
_FORGOTTEN = 1e-3  # share of the samples that may be left of an earlier use
_NEAR_ZERO, _NEAR_ONE = 0.26, 0.88  # some times are beyond these: logit-normal 14 % and 2 %, shifted by 3 1 % and 19 %
_FEW = 2e-3  # share of the samples that is enough for the first
_KNOWN_SAMPLES = 1000  # samples for comparing the distribution with known ones
_KNOWN_WIDTH = 0.51  # of the bins, likewise: that of fine-tuning is .5
_KNOWN_DISTANCE = 0.03  # Kolmogorov distance to those: every schedule in use that has their support is .1 away or more


class _Seen(NamedTuple):
    """The samples of a criterion."""

    inside: Tensor  # [K] effective number in each bin, without those outside the range
    bins: Bins
    samples: float  # effective number of all
    below: float  # share of the samples below the range
    above: float  # share at or above its end
    last: Tensor  # [N] float64: finite values of some batches

    @property
    def edges(self) -> Tensor:
        """Edges of the bins, [K + 1] float64."""
        return self.bins.low + self.bins.width * torch.arange(self.bins.size + 1, dtype=torch.float64)

    @property
    def never_negative(self) -> bool:
        below_zero = self.inside[self.edges[1:] <= 1e-9].sum().item() / self.samples
        return self.below + below_zero < _FORGOTTEN and not bool((self.last < 0).any())

    @property
    def largest(self) -> float:
        return self.last.max().item() if len(self.last) else math.nan

    def survival(self, with_outside: bool) -> Tensor:
        """Share of the samples at or above each edge, [K + 1]; without those outside unless `with_outside`."""
        above = self.above * self.samples if with_outside else 0.0
        below = self.below * self.samples if with_outside else 0.0
        tail = self.inside.flip(0).cumsum(0).flip(0) + above
        return torch.cat([tail, tail.new_tensor([above])]) / (self.inside.sum() + above + below)


def problem_with_levels(count: Tensor, bins: Bins, outside: Tensor, last: Tensor | None) -> str | None:
    """What is wrong with the log-SNR that a criterion was given, with the likely cause and the line to write.

    Args:
        count: effective number of samples per bin, [K] float64 on the CPU; those outside are in the end bins.
        bins: the K bins.
        outside: effective number of samples below the range, and at or above its end, [2] float64 on the CPU.
        last: log-SNR of one batch or of several, [N] on the CPU, if there is one.

    Returns:
        One sentence; None where nothing is wrong, cannot be told, or fewer than `FEWEST_SAMPLES` were seen.
    """
    samples = count.sum().item()
    if not samples >= FEWEST_SAMPLES:
        return None
    inside = count.double().clone()
    inside[0] -= outside[0]
    inside[-1] -= outside[1]
    below, above = (outside / samples).tolist()
    finite = torch.empty(0) if last is None else last[last.isfinite()]
    seen = _Seen(inside.clamp(min=0.0), bins, samples, below, above, finite.double())
    checks = (_timesteps, _timesteps_as_sigma, _mostly_outside, _unit_interval, _known_mistake, _not_a_logarithm)
    return next((problem for problem in (check(seen) for check in checks) if problem), None)


def _timesteps(seen: _Seen) -> str | None:
    """Never negative, and whole numbers up to some hundreds, or mostly above the range and beyond any log-SNR."""
    if not seen.never_negative or not seen.largest > 16:
        return None
    whole = bool((seen.last == seen.last.round()).all())
    if whole and (seen.above > 0.5 or len(seen.last[seen.last > 16].unique()) >= 4):
        return f"log_snr looks like timesteps: whole numbers, never negative, up to {seen.largest:g}. {_FROM_TIMESTEPS}"
    if seen.above > 0.5 and seen.largest > _NO_LOG_SNR:
        return (
            f"log_snr is never negative and up to {seen.largest:g}, like timesteps or SNR itself. {_FROM_TIMESTEPS} "
            "For SNR pass snr.log()."
        )
    return None


def _timesteps_as_sigma(seen: _Seen) -> str | None:
    """e**(-λ/2) is sigma: whole numbers up to some hundreds are timesteps."""
    sigma = (-0.5 * seen.last).exp()
    whole = bool(((sigma - sigma.round()).abs() < 1e-3).all())
    if not whole or len(sigma[(sigma > 16) & (sigma < 2000)].round().unique()) < 4 or not bool((sigma > _PIXEL).any()):
        return None
    return _SIGMA_IS_TIMESTEPS


def _mostly_outside(seen: _Seen) -> str | None:
    """More than half of the samples outside the range, at finite log-SNR (±inf is zero terminal SNR, or x0 itself)."""
    last, bins = seen.last, seen.bins
    clean = seen.inside[seen.edges[:-1] >= _CLEAN].sum().item() / seen.samples
    beyond = last[last >= bins.high]
    if bins.high >= _CLEAN:
        clean += seen.above
    elif len(beyond):
        clean += seen.above * (beyond >= _CLEAN).double().mean().item()
    if clean > 0.95 and bool((last >= _CLEAN).any()):
        return (
            f"almost all samples have a log-SNR above {_CLEAN:g}, next to no noise (sigma < 0.002): probably times "
            "from 0 to 1 were taken for timesteps from 0 to 1000. Multiply them by num_train_timesteps, or pass "
            "vadiff.log_snr.from_flow_time(t)."
        )
    for share, where, proof in (
        (seen.below, "below", last < bins.low),
        (seen.above, "above", last >= bins.high),
    ):
        if share > 0.5 and bool(proof.any()):
            return (
                f"{share:.0%} of the samples have a log-SNR {where} log_snr_range ({bins.low:g}, {bins.high:g}), for "
                f"example {last[proof][0].item():g}. If these are log-SNR, ln(alpha**2/sigma**2), choose the range for "
                "them (vadiff.DiffusionLoss.for_process); if not, convert them by vadiff.log_snr."
            )
    return None


def _unit_interval(seen: _Seen) -> str | None:
    """All values in [0, 1], from one end to the other. A single level, or a narrow band of them, is none of this."""
    if not seen.never_negative or seen.above > _FORGOTTEN or bool((seen.last > 1).any()):
        return None
    low, high, share = seen.edges[:-1], seen.edges[1:], seen.inside / seen.samples
    within = (low < 1.0 - 1e-9) & (high > 1e-9)  # bins that overlap [0, 1)
    if int(within.sum()) < 2:
        return None
    exactly_one = share[~within & (low <= 1.0) & (high > 1e-9)].sum().item()  # may be in the next bin
    strays = share[~within].sum().item() - exactly_one
    if strays > _FORGOTTEN or exactly_one > 0.05:
        return None
    # The bins hold all samples, and `last` some of them exactly: a band of levels inside does not reach both ends.
    lowest = seen.last.min().item() if len(seen.last) else math.nan
    near_zero = lowest < _NEAR_ZERO or share[within & (high <= _NEAR_ZERO)].sum().item() > _FEW
    if not near_zero or not seen.largest > _NEAR_ONE:
        return None
    return (
        "all values of log_snr lie in [0, 1], from end to end, like times, t/T, ᾱ or the sigma of a "
        "variance-preserving process. For times of a flow pass vadiff.log_snr.from_flow_time(t, data_at=0 or 1), for "
        "timesteps from_alphas_cumprod(alphas_cumprod, timesteps), for alpha and sigma from_alpha_sigma(alpha, sigma)."
    )


def _known_mistake(seen: _Seen) -> str | None:
    """The distribution is, within sampling noise, what a known mistake makes of a common schedule's timesteps."""
    if seen.samples < _KNOWN_SAMPLES or seen.bins.width > _KNOWN_WIDTH:
        return None
    edges = seen.edges
    found = seen.below + seen.inside.cumsum(0) / seen.samples  # [K] share below each upper edge
    padding = seen.bins.width
    for values, problem in _known_mistakes():
        expected = torch.searchsorted(values, edges[1:]).double() / len(values)  # [K]
        in_range = ((values >= seen.bins.low) & (values < seen.bins.high)).double().mean().item()
        elsewhere = (edges[1:] < values[0] - padding) | (edges[:-1] > values[-1] + padding)
        strays = seen.inside[elsewhere].sum().item() / seen.samples
        for outside, beyond in ((seen.below, values < seen.bins.low), (seen.above, values >= seen.bins.high)):
            if not bool(beyond.any()):  # where some belong outside, the distance counts the others
                strays += outside
        distance = (found - expected)[:-1].abs().max().item()
        limit = _KNOWN_DISTANCE + 0.5 / math.sqrt(seen.samples)
        if in_range < 0.9:  # a part of the distribution proves less
            limit = limit * in_range if seen.samples > 3 * _KNOWN_SAMPLES else 0.0
        if in_range > 0.5 and strays < 5e-3 and distance < limit:
            return problem
    return None


def _not_a_logarithm(seen: _Seen) -> str | None:
    """Never negative, frequent near 0, and with a heavier tail than any schedule's.

    A log-concave density, as those of all common schedules in log-SNR are, has a log-concave survival function S, so
    that S(k·x) <= S(x)**k for values that are never negative. Sigma and SNR, whose logarithms have such a density,
    break this by far.
    """
    edges = seen.edges
    first = int((edges[1:] > 1e-9).nonzero()[0]) if seen.bins.high > 0 else 0  # the bin that holds 0
    filled = seen.inside > 0
    if not seen.never_negative or not bool(filled[first : first + 4].all()) or int(filled.sum()) < 8:
        return None  # a few single levels have no density
    if seen.inside[first] < 0.02 * seen.samples:
        return None
    with_outside = bool((seen.last >= seen.bins.high).any())
    survival, distance = seen.survival(with_outside)[first + 1 :], edges[first + 1 :] - edges[first]
    n = seen.samples
    heavy = False
    for start in range(len(survival)):
        s = survival[start].item()
        if not 0.02 <= s <= 0.98:
            continue
        k = distance[start:] / distance[start]
        bound = min(s + 3.0 * math.sqrt(s * (1.0 - s) / n), 1.0) ** k
        allowed = bound + 4.0 * (bound / n).sqrt() + 4.0 / n
        heavy = heavy or bool((survival[start:] > 1.25 * allowed).any())
    if not heavy:
        return None
    return (
        "log_snr is never negative and distributed like sigma or SNR themselves, not like a logarithm. Pass "
        "vadiff.log_snr.from_sigma(sigma) for a sigma beside alpha = 1 (EDM), snr.log() for SNR, and "
        "vadiff.log_snr.from_alpha_sigma(alpha, sigma) for the sigma of a variance-preserving process."
    )


_FROM_TIMESTEPS = (
    "Pass vadiff.log_snr.from_alphas_cumprod(scheduler.alphas_cumprod, timesteps), or for any diffusers scheduler "
    "vadiff.schedulers.log_snr_of(scheduler, timesteps)."
)
_SIGMA_IS_TIMESTEPS = (
    f"log_snr is -2·ln of whole numbers up to some hundreds: from_sigma was probably given timesteps. {_FROM_TIMESTEPS}"
)
_USE_CUMPROD = "Pass from_alphas_cumprod the cumulative product, alphas_cumprod = (1 - betas).cumprod(0)."


@functools.cache
def _known_mistakes() -> list[tuple[Tensor, str]]:
    """(values that a mistake gives for all timesteps, rising [T] float64; the problem) for common schedules."""
    schedules = {
        "DDPM's linear": DiscreteVP.linear(),
        "Stable Diffusion's": DiscreteVP.scaled_linear(),
        "the cosine": DiscreteVP.cosine(),
    }
    found = [(-2.0 * torch.arange(1, 1000, dtype=torch.float64).log(), _SIGMA_IS_TIMESTEPS)]
    for name, process in schedules.items():
        alpha_bar = process.alphas_cumprod
        alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
        noise = f"the distribution of log_snr is that of {name} schedule"
        found += [
            (alphas.logit(), f"{noise} if alphas take the place of their cumulative product. {_USE_CUMPROD}"),
            (-alphas.logit(), f"{noise} if betas take the place of alphas_cumprod. {_USE_CUMPROD}"),
            (
                -torch.log1p(-alpha_bar),
                f"{noise} if from_sigma is given sqrt(1 - alphas_cumprod), the sigma of a variance-preserving process. "
                "Pass vadiff.log_snr.from_alpha_sigma(alpha, sigma), or from_alphas_cumprod(alphas_cumprod, t).",
            ),
        ]
        if name != "the cosine":  # which is its own mirror image
            found.append(
                (-alpha_bar.logit(), f"{noise} with its sign reversed: log-SNR is high where there is little noise. ")
            )
    return [(values.sort().values, problem.strip()) for values, problem in found]
