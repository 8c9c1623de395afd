"""Drawing samples from a trained denoiser: EDM's second-order sampler, and Euler's method on the path of flows.

A seed stands for an image. All the noise of an image comes from a generator of its own, so that which image a seed
gives does not depend on the batch size, on the other seeds, on the number of devices or (to rounding) on the device.
"""

import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["Churn", "draw", "euler", "flow_times", "heun", "noise_levels"]

Denoise = Callable[..., Tensor]
"""D(x, sigma) or D(x, sigma, labels) → estimate of x0; x [B, *shape] float32 = x0 + sigma·eps, sigma [B] float32,
labels [B] int64."""


def noise_levels(steps: int = 18, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Noise levels from sigma_max down to sigma_min, then 0.

    sigma_i = (sigma_max^(1/ρ) + i/(N-1)·(sigma_min^(1/ρ) - sigma_max^(1/ρ)))^ρ for i < N, and sigma_N = 0.
    Source: EDM (arXiv 2206.00364), eq. 5.

    Args:
        steps: N, at least 2.
        sigma_min: lowest level before 0, > 0.
        sigma_max: highest level.
        rho: how much the steps shorten towards low noise.

    Returns:
        [N + 1] float64, falling.

    Raises:
        ValueError: fewer than 2 steps, or not 0 < sigma_min < sigma_max.
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}, expected at least 2.")
    if not 0.0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min is {sigma_min} and sigma_max {sigma_max}, expected 0 < sigma_min < sigma_max.")
    roots = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps, dtype=torch.float64)
    return torch.cat([roots**rho, roots.new_zeros(1)])


def flow_times(steps: int = 50, sigma_max: float = 1000.0) -> Tensor:
    """Times t = sigma/(1 + sigma) of the straight path x_t = (1 - t)·x0 + t·eps, evenly from sigma_max down to 0.

    Args:
        steps: N, at least 1.
        sigma_max: the level that stands for pure noise. At t = 1 itself sigma is infinite, and a denoiser has nothing
            to divide by.

    Returns:
        [N + 1] float64, falling, the last 0.

    Raises:
        ValueError: no step, or sigma_max not a positive number.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1.")
    if not 0.0 < sigma_max < math.inf:
        raise ValueError(f"sigma_max is {sigma_max}, expected a positive number.")
    return torch.linspace(sigma_max / (1.0 + sigma_max), 0.0, steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class Churn:
    """How much new noise EDM's stochastic sampler adds before each step (arXiv 2206.00364, algorithm 2).

    Args:
        amount: S_churn; each step raises sigma by the factor 1 + min(amount / N, √2 - 1). 0 is deterministic.
        sigma_min: S_tmin, below which nothing is added.
        sigma_max: S_tmax, above which nothing is added.
        noise: S_noise, the standard deviation of what is added, slightly above 1 against lost detail.

    Raises:
        ValueError: a negative or non-finite amount or noise, or sigma_min above sigma_max.
    """

    amount: float
    sigma_min: float = 0.0
    sigma_max: float = math.inf
    noise: float = 1.0

    def __post_init__(self) -> None:
        for name in ("amount", "noise"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"churn {name} is {getattr(self, name)}, expected 0 or a positive number.")
        if not 0.0 <= self.sigma_min <= self.sigma_max:
            raise ValueError(
                f"churn sigma_min is {self.sigma_min} and sigma_max {self.sigma_max}, "
                "expected 0 <= sigma_min <= sigma_max."
            )

    def raised(self, sigma: float, steps: int) -> float:
        """The level to which noise is added at `sigma`, with N = `steps`."""
        inside = self.sigma_min <= sigma <= self.sigma_max
        return sigma * (1.0 + min(self.amount / steps, math.sqrt(2.0) - 1.0)) if inside else sigma


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
        labels: [len(seeds)] int64 classes, or None for a denoiser without.
        guidance: w of D = D(x) + w·(D(x, labels) - D(x)); 1 is the conditional denoiser, and costs half as much.
        batch_size: samples at a time.
        device: where `denoise` runs.

    Returns:
        [len(seeds), *shape] float32, on the CPU, not clipped.

    Raises:
        ValueError: labels that do not fit, or guidance without labels.
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
            if following > 0.0:  # at σ = 0 the slope is 0/0, and Euler's step has gone straight to D
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

    dx_t/dt = eps - x0 = (x_t - D) / t, with D = D(x_t/(1-t); σ = t/(1-t)), which has alpha = 1 as everywhere here.
    Source: Lipman et al., Flow matching (arXiv 2210.02747), section 4.1. The state is kept in float64.

    Args:
        times: [N + 1] falling times below 1 that end in 0; `flow_times()` by default, 50 evaluations.
        denoise, shape, seeds, labels, guidance, batch_size, device: as for `heun`.

    Returns:
        [len(seeds), *shape] float32, on the CPU, not clipped.

    Raises:
        ValueError: labels that do not fit, guidance without labels, or a time of 1 or more.
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


def draw(
    sample: Callable[[torch.device, Sequence[int]], Tensor],
    seeds: Sequence[int],
    devices: Sequence[torch.device],
    batch_size: int = 256,
) -> Iterator[tuple[int, Tensor]]:
    """Draw any number of images over several devices, each of which takes the next batch when it is free.

    Args:
        sample: (device, seeds of a batch) → images [B, ...], called in one thread per device.
        seeds: one per image.
        devices: at least one; a device named twice gets two threads.
        batch_size: images at a time and device.

    Yields:
        (place of its first image among the seeds, images) of each batch, as they are ready.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1.")
    free: queue.SimpleQueue[torch.device] = queue.SimpleQueue()
    for device in devices:
        free.put(device)

    stopped = threading.Event()

    def work(start: int) -> tuple[int, Tensor] | None:
        if stopped.is_set():
            return None
        device = free.get()
        try:
            return start, sample(device, seeds[start : start + batch_size])
        except BaseException:
            stopped.set()
            raise
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as threads:
        batches = [threads.submit(work, start) for start in range(0, len(seeds), batch_size)]
        try:
            for batch in as_completed(batches):
                if (drawn := batch.result()) is not None:
                    yield drawn
        finally:  # an error, or a caller who stops early: what has not begun will not
            stopped.set()


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
        free = self.denoise(x.float(), sigmas).double()
        return free + self.guidance * (conditional - free)


class _Noise:
    """The noise of a batch, each image's from its own generator: every call gives the next [B, *shape] float64."""

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
