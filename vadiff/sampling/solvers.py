"""Solvers that draw samples from a denoiser: EDM's second-order sampler, and Euler's method for flows.

All noise of an image comes from its own generator with its own seed, so that the image does not depend on the batch
size, on the other seeds, on the number of devices or (up to rounding) on the device.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .steps import Churn, flow_times, noise_levels

Denoise = Callable[..., Tensor]
"""D(x, sigma) or D(x, sigma, labels) → estimate of x0; x [B, *shape] float32 = x0 + sigma·eps, sigma [B] float32,
labels [B] int64."""


@torch.no_grad()
def heun(
    denoise: Denoise,
    shape: Sequence[int],
    seeds: Sequence[int],
    *,
    levels: Tensor | None = None,
    churn: Churn | None = None,
    labels: Tensor | None = None,
    guidance: float = 1.0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw one sample per seed by Heun's method on dx/dσ = (x - D(x; σ)) / σ, from pure noise to σ = 0.

    The state is kept in float64. Source: EDM (arXiv 2206.00364), algorithm 1; with `churn` algorithm 2.

    Args:
        denoise: D(x, sigma) or, with `labels`, D(x, sigma, labels). A module is used in the mode it is in; call
            `.eval()` first if it has dropout.
        shape: shape of one sample, as (1, 8, 8).
        seeds: one per sample.
        levels: [N + 1] falling noise levels that end in 0; `noise_levels()` by default, 2·18 - 1 evaluations.
        churn: the stochastic sampler; None is the deterministic one.
        labels: [len(seeds)] int64 classes, or None for an unconditional denoiser.
        guidance: w of D = D(x) + w·(D(x, labels) - D(x)); 1 is the conditional denoiser, and costs half as much.
        batch_size: samples at a time.
        device: where `denoise` runs.

    Returns:
        [len(seeds), *shape] float32, on the CPU, not clipped.

    Raises:
        ValueError: labels of another shape, or guidance without labels.
    """
    steps = (noise_levels() if levels is None else levels).tolist()
    churn = churn or Churn(0.0)

    def batch(denoised: "_Guided", noise: "_Noise") -> Tensor:
        def slope(x: Tensor, sigma: float) -> Tensor:
            return (x - denoised(x, sigma)) / sigma

        x = noise() * steps[0]
        for sigma, following in pairwise(steps):
            raised = churn.raised(sigma, len(steps) - 1)
            if raised > sigma:
                x = x + math.sqrt(raised**2 - sigma**2) * churn.noise * noise()
            here = slope(x, raised)
            x = x + (following - raised) * here  # Euler's step
            if following > 0.0:  # at σ = 0 the slope is 0/0; Euler's step ends at D
                x = x + (following - raised) * 0.5 * (slope(x, following) - here)
        return x

    return _in_batches(batch, denoise, shape, seeds, labels, guidance, batch_size, torch.device(device))


@torch.no_grad()
def euler(
    denoise: Denoise,
    shape: Sequence[int],
    seeds: Sequence[int],
    *,
    times: Tensor | None = None,
    labels: Tensor | None = None,
    guidance: float = 1.0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw one sample per seed by Euler's method on the straight path x_t = (1 - t)·x0 + t·eps of flow matching.

    dx_t/dt = eps - x0 = (x_t - D) / t, with D = D(x_t/(1-t); σ = t/(1-t)), where D takes alpha = 1 as everywhere here.
    Source: Lipman et al., Flow matching (arXiv 2210.02747), section 4.1. The state is kept in float64.

    Args:
        times: [N + 1] falling times below 1 that end in 0; `flow_times()` by default, 50 evaluations.
        denoise, shape, seeds, labels, guidance, batch_size, device: as for `heun`.

    Returns:
        [len(seeds), *shape] float32, on the CPU, not clipped.

    Raises:
        ValueError: labels of another shape, guidance without labels, or a time of 1 or more.
    """
    steps = (flow_times() if times is None else times).tolist()
    if steps[0] >= 1.0:
        raise ValueError(f"times begin with {steps[0]}, expected less than 1, where sigma = t/(1 - t) is infinite.")

    def batch(denoised: "_Guided", noise: "_Noise") -> Tensor:
        x = noise() * steps[0]
        for time, following in pairwise(steps):
            x0 = denoised(x / (1.0 - time), time / (1.0 - time))
            x = x + (following - time) * (x - x0) / time
        return x

    return _in_batches(batch, denoise, shape, seeds, labels, guidance, batch_size, torch.device(device))


class _Guided:
    """D at one level for the whole batch, in float64, with labels and guidance."""

    def __init__(self, denoise: Denoise, labels: Tensor | None, guidance: float) -> None:
        self.denoise, self.labels, self.guidance = denoise, labels, guidance

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        sigmas = torch.full((len(x),), sigma, dtype=torch.float32, device=x.device)
        if self.labels is None:
            return self.denoise(x.float(), sigmas).double()
        conditional = self.denoise(x.float(), sigmas, self.labels).double()
        if self.guidance == 1.0:
            return conditional
        unconditional = self.denoise(x.float(), sigmas).double()
        return unconditional + self.guidance * (conditional - unconditional)


class _Noise:
    """The noise of a batch from one generator per image; every call returns the next [B, *shape] float64."""

    def __init__(self, shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> None:
        self.shape, self.device = tuple(shape), device
        # On the CPU, so that a seed means the same image on every device.
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        noise = [torch.randn(self.shape, generator=stream) for stream in self.streams]
        return torch.stack(noise).to(self.device).double()


def _in_batches(
    batch: Callable[[_Guided, _Noise], Tensor],
    denoise: Denoise,
    shape: Sequence[int],
    seeds: Sequence[int],
    labels: Tensor | None,
    guidance: float,
    batch_size: int,
    device: torch.device,
) -> Tensor:
    if labels is not None and labels.shape != (len(seeds),):
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected ({len(seeds)},): one class per seed.")
    if labels is None and guidance != 1.0:
        raise ValueError(f"guidance is {guidance} without labels: there is no class to guide to. Pass labels.")
    samples = []
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        classes = None if labels is None else labels[part].to(device)
        noise = _Noise(shape, seeds[part], device)
        samples.append(batch(_Guided(denoise, classes, guidance), noise).float().cpu())
    return torch.cat(samples) if samples else torch.empty(0, *shape)
