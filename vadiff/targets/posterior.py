"""Posterior mean and variance of the data given noisy samples, by exact softmax over reference samples.

Given x_t = alpha·x0 + sigma·eps, with the sample's own x0 and M other references x_j from the same distribution,

    logit_j = -(|x_t - alpha·x_j|² - |x_t - alpha·x0|²) / (2 sigma²)        (0 for the own x0)

and the posterior mean is the sum of softmax(logit)_j·x_j. The own x0 is a term of its own, exact at every noise level.
x_t·x_j and the weighted sum are two matrix products; over chunks of the references the softmax is kept online (running
maximum, sum, and sums weighted by it), so that memory does not grow with their number.

Products run in float32 (float64 for float64 samples), outside of autocast. They lose digits where the mean of the data
is many times its standard deviation, which the samples that networks see do not have. Where torch is allowed to use
TF32 for matrix products, it uses it here too: its rounding changes a logit by about 5e-4·sqrt(D)·rms(x)·alpha/sigma,
0.01 for CIFAR-10 at the lowest noise at which targets are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..pixels import normalised

Augment = Callable[[Tensor], Tensor]
"""Samples [m, ...] as floats → the same, augmented as the batch's x0 were."""

_AT_ONCE = 2**24  # elements of the references that are in the products at a time, 64 MiB
_LOWEST = -1e30  # below every logit; with -inf, -inf - -inf would be NaN


class References(NamedTuple):
    """Samples over which a softmax runs."""

    values: Tensor  # [M, ...] floats, or bytes: pixels that `normalised` maps to [-1, 1]
    keys: Tensor  # [M] int64: equal for equal samples
    labels: Tensor | None  # [M] int64 classes
    valid: Tensor  # [M] bool
    augment: Augment | None = None  # applied to the values as floats, a part of them at a time


class Draws(NamedTuple):
    """Noisy samples, with their own references."""

    x0: Tensor  # [B, D]
    noisy: Tensor  # [B, D]
    alpha: Tensor  # [B]
    sigma: Tensor  # [B], positive
    keys: Tensor  # [B] int64
    labels: Tensor | None  # [B] int64 classes
    unlabelled: int | None  # the label of draws whose posterior is over all classes


class Posterior(NamedTuple):
    """Mean and variance of the posterior of each draw."""

    mean: Tensor  # [B, D]
    variance: Tensor  # [B] per element: what the mean takes out of the squared error


def chunk_of(samples: Tensor) -> int:
    """How many samples [N, ...] to work on at a time, so that memory does not grow with their size."""
    return max(1, min(4096, _AT_ONCE // max(1, samples[0].numel())))


def posterior(draws: Draws, sets: Sequence[References], chunk: int | None = None) -> Posterior:
    """The posterior over the own x0 and those references of all sets whose key differs from its own.

    Args:
        draws: floats of one dtype, float32 or float64.
        sets: no key is in two of them, unless `valid` is False in one.
        chunk: references at a time, which bounds the memory; None chooses by their size.
    """
    x0, noisy, alpha, sigma = draws[:4]
    own_norm = x0.square().sum(1)
    own_product = (noisy * x0).sum(1, keepdim=True)
    slope = (alpha / sigma.square())[:, None]
    curvature = (0.5 * alpha.square() / sigma.square())[:, None]
    top, total = torch.zeros_like(sigma), torch.ones_like(sigma)
    mean, norm = x0.clone(), own_norm.clone()
    with torch.autocast(x0.device.type, enabled=False):
        for values, allowed in _chunks(draws, sets, chunk):
            norms = values.square().sum(1)
            logits = torch.addmm(own_product, noisy, values.T, beta=-1.0).mul_(slope)
            logits.sub_((norms - own_norm[:, None]).mul_(curvature))
            logits.masked_fill_(~allowed, _LOWEST)
            higher = torch.maximum(top, logits.amax(1))
            scale = (top - higher).exp_()
            weights = logits.sub_(higher[:, None]).exp_()
            total = total * scale + weights.sum(1)
            norm = norm * scale + weights @ norms
            mean = torch.addmm(mean.mul_(scale[:, None]), weights, values)
            top = higher
    mean = mean.div_(total[:, None])
    variance = (norm / total - mean.square().sum(1)).clamp_(min=0.0) / x0.shape[1]
    return Posterior(mean, variance)


def _chunks(draws: Draws, sets: Sequence[References], chunk: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Values [m, D] and, for each draw, whether they are references of it, bool [B, m]."""
    for references in sets:
        size = chunk or chunk_of(references.values)
        for start in range(0, len(references.values), size):
            part = slice(start, start + size)
            values = as_floats(references.values[part], draws.x0.dtype)
            if references.augment is not None:
                values = references.augment(values)
            values = values.flatten(1)
            allowed = (references.keys[part] != draws.keys[:, None]) & references.valid[part]
            if references.labels is not None and draws.labels is not None:
                labels = draws.labels[:, None]
                same_class = references.labels[part] == labels
                if draws.unlabelled is not None:
                    same_class |= labels == draws.unlabelled
                allowed &= same_class
            yield values, allowed


def as_floats(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Samples in the dtype of the products; bytes as pixels in [-1, 1]."""
    return (normalised(values) if values.dtype is torch.uint8 else values).to(dtype)


def keys_of(samples: Tensor) -> Tensor:
    """int64 [B] keys of floats [B, ...]: equal for samples of equal bits, else different but for one in 2**60 pairs.

    float16 and bfloat16 have the keys of the float32 numbers that they stand for.

    Sums of integers do not depend on their order, so that a sample's key does not depend on its place in a batch.
    """
    bits = samples.float().flatten(1).contiguous().view(torch.int32).long()
    places = torch.arange(1, bits.shape[1] + 1, device=bits.device)
    return ((_mixed(bits + places * -7046029254386353131)) * (2 * _mixed(places) + 1)).sum(1)


def _mixed(value: Tensor) -> Tensor:
    """A bijection of int64 whose every bit depends on all bits of its argument (the finaliser of SplitMix64)."""
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return value ^ ((value >> 31) & 0x1FFFFFFFF)
