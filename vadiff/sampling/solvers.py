"""Solvers that draw samples from a denoiser D(x; σ), x = x0 + σ·eps, from pure noise to σ = 0.

| solver | method | network calls for N steps |
|---|---|---|
| `heun` | EDM's second-order sampler, with `churn` its stochastic one | 2N - 1 |
| `euler` | Euler's method: DDIM, and Euler on the straight path of a flow | N |
| `ddpm` | ancestral sampling: a new draw from the posterior at each step | N |
| `dpmpp_2m` | DPM-Solver++(2M): second order from the last two estimates of x0 | N |

A variance-preserving process or a flow has x_t = alpha·x0 + sigma·eps; x = x_t/alpha and σ = sigma/alpha bring it to
this form, in which each method is the one that was published for such a process. The state is kept in float64.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .per_seed import EVERY_SIGMA, Denoise, Guided, Noise, solve_in_batches
from .steps import Churn


def heun(
    denoise: Denoise,
    shape: Sequence[int],
    seeds: Sequence[int],
    *,
    levels: Tensor | None = None,
    churn: Churn | None = None,
    labels: Tensor | None = None,
    guide: Denoise | None = None,
    guidance: float = 1.0,
    guided_sigma: tuple[float, float] = EVERY_SIGMA,
    clip: bool = False,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw one sample per seed by Heun's method on dx/dσ = (x - D(x; σ)) / σ.

    Source: EDM (arXiv 2206.00364), algorithm 1; with `churn` algorithm 2.

    Args:
        denoise: D(x, sigma) or, with `labels`, D(x, sigma, labels). A module is used in the mode it is in; call
            `.eval()` first if it has dropout.
        shape: shape of one sample, as (1, 8, 8).
        seeds: one per sample.
        levels: [N + 1] falling noise levels that end in 0; `noise_levels()` by default, 18 steps.
        churn: the stochastic sampler; None is the deterministic one.
        labels: [len(seeds)] int64 classes, or None for an unconditional denoiser.
        guide: a weaker denoiser, called as `denoise` is, labels included (autoguidance, arXiv 2406.02507). None:
            `denoise` itself without labels (classifier-free guidance, arXiv 2207.12598).
        guidance: w of D_guide + w·(D - D_guide); 1 is D alone, and costs half as much.
        guided_sigma: (low, high): guidance at noise levels low < sigma <= high, D alone elsewhere (limited-interval
            guidance, arXiv 2404.07724).
        clip: clamp every estimate of x0 to [-1, 1], after guidance, as DDPM's `clip_denoised` does.
        batch_size: samples at a time.
        device: where `denoise` runs.

    Returns:
        [len(seeds), *shape] float32, on the CPU.

    Raises:
        ValueError: levels that do not fall to 0, labels of another shape, guidance without labels or guide, or a
            guided_sigma that is no interval.
    """

    def solve(denoised: Guided, noise: Noise, sigmas: list[float]) -> Tensor:
        def slope(x: Tensor, sigma: float) -> Tensor:
            return (x - denoised(x, sigma)) / sigma

        x = noise() * sigmas[0]
        for sigma, following in pairwise(sigmas):
            raised = sigma if churn is None else churn.raised(sigma, len(sigmas) - 1)
            if churn is not None and raised > sigma:
                x = x + math.sqrt(raised**2 - sigma**2) * churn.noise * noise()
            here = slope(x, raised)
            x = x + (following - raised) * here  # Euler's step
            if following > 0.0:  # at σ = 0 the slope is 0/0; Euler's step ends at D
                x = x + (following - raised) * 0.5 * (slope(x, following) - here)
        return x

    return solve_in_batches(
        solve, denoise, shape, seeds, levels=levels, labels=labels, guide=guide, guidance=guidance,
        guided_sigma=guided_sigma, clip=clip, batch_size=batch_size, device=device,
    )  # fmt: skip


def euler(
    denoise: Denoise,
    shape: Sequence[int],
    seeds: Sequence[int],
    *,
    levels: Tensor | None = None,
    labels: Tensor | None = None,
    guide: Denoise | None = None,
    guidance: float = 1.0,
    guided_sigma: tuple[float, float] = EVERY_SIGMA,
    clip: bool = False,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw one sample per seed by Euler's method on dx/dσ = (x - D(x; σ)) / σ: x' = D + (σ'/σ)·(x - D).

    The step is exact for constant D, and the same for every process: it is DDIM (arXiv 2010.02502, eq. 12 with η = 0),
    and Euler's method in t on the straight path of flow matching (arXiv 2210.02747).

    With `clip` eps = (x - D)/σ is that of the clipped D, so that x0 and eps of a step always make x: the convention of
    Improved DDPM's code, and of diffusers' DDIMScheduler with `use_clipped_model_output=True`. By default that
    scheduler keeps the network's own eps beside the clipped x0, and its images differ.

    Args:
        denoise, shape, seeds, levels, labels, guide, guidance, guided_sigma, clip, batch_size, device: as for `heun`.

    Returns:
        [len(seeds), *shape] float32, on the CPU.

    Raises:
        ValueError: as for `heun`.
    """

    def solve(denoised: Guided, noise: Noise, sigmas: list[float]) -> Tensor:
        x = noise() * sigmas[0]
        for sigma, following in pairwise(sigmas):
            x0 = denoised(x, sigma)
            x = x0 + following / sigma * (x - x0)
        return x

    return solve_in_batches(
        solve, denoise, shape, seeds, levels=levels, labels=labels, guide=guide, guidance=guidance,
        guided_sigma=guided_sigma, clip=clip, batch_size=batch_size, device=device,
    )  # fmt: skip


def ddpm(
    denoise: Denoise,
    shape: Sequence[int],
    seeds: Sequence[int],
    *,
    levels: Tensor | None = None,
    labels: Tensor | None = None,
    guide: Denoise | None = None,
    guidance: float = 1.0,
    guided_sigma: tuple[float, float] = EVERY_SIGMA,
    clip: bool = False,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw one sample per seed by ancestral sampling: each step draws x' from its posterior given x and x0 = D(x; σ).

    x' ~ N(D + (σ'²/σ²)·(x - D), σ'²·(σ² - σ'²)/σ²). Source: DDPM (arXiv 2006.11239), eq. 6 and 7 divided by
    sqrt(alpha-bar); the variance is the smaller of its two, the posterior's.

    Args:
        denoise, shape, seeds, levels, labels, guide, guidance, guided_sigma, clip, batch_size, device: as for `heun`.

    Returns:
        [len(seeds), *shape] float32, on the CPU.

    Raises:
        ValueError: as for `heun`.
    """

    def solve(denoised: Guided, noise: Noise, sigmas: list[float]) -> Tensor:
        x = noise() * sigmas[0]
        for sigma, following in pairwise(sigmas):
            x0 = denoised(x, sigma)
            kept = (following / sigma) ** 2
            x = x0 + kept * (x - x0)
            if following > 0.0:
                x = x + following * math.sqrt(1.0 - kept) * noise()
        return x

    return solve_in_batches(
        solve, denoise, shape, seeds, levels=levels, labels=labels, guide=guide, guidance=guidance,
        guided_sigma=guided_sigma, clip=clip, batch_size=batch_size, device=device,
    )  # fmt: skip


def dpmpp_2m(
    denoise: Denoise,
    shape: Sequence[int],
    seeds: Sequence[int],
    *,
    levels: Tensor | None = None,
    labels: Tensor | None = None,
    guide: Denoise | None = None,
    guidance: float = 1.0,
    guided_sigma: tuple[float, float] = EVERY_SIGMA,
    clip: bool = False,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw one sample per seed by DPM-Solver++(2M), the multistep solver of second order.

    x' = E + (σ'/σ)·(x - E), with E = D + (h/2h₋)·(D - D₋) extrapolated to the middle of the step; h = ln(σ/σ') and D₋,
    h₋ are of the step before. The first and the last step are of first order, E = D: before the first there is no D₋,
    and in the last h is infinite. Source: arXiv 2211.01095, algorithm 2.

    Args:
        denoise, shape, seeds, levels, labels, guide, guidance, guided_sigma, clip, batch_size, device: as for `heun`.

    Returns:
        [len(seeds), *shape] float32, on the CPU.

    Raises:
        ValueError: as for `heun`.
    """

    def solve(denoised: Guided, noise: Noise, sigmas: list[float]) -> Tensor:
        x = noise() * sigmas[0]
        before: tuple[Tensor, float] | None = None  # D and h of the step before
        for sigma, following in pairwise(sigmas):
            x0 = estimate = denoised(x, sigma)
            step = math.log(sigma / following) if following > 0.0 else math.inf
            if before is not None and following > 0.0:
                estimate = x0 + step / (2.0 * before[1]) * (x0 - before[0])
            x = estimate + following / sigma * (x - estimate)
            before = x0, step
        return x

    return solve_in_batches(
        solve, denoise, shape, seeds, levels=levels, labels=labels, guide=guide, guidance=guidance,
        guided_sigma=guided_sigma, clip=clip, batch_size=batch_size, device=device,
    )  # fmt: skip


SOLVERS: dict[str, Callable[..., Tensor]] = {"heun": heun, "euler": euler, "ddpm": ddpm, "dpmpp_2m": dpmpp_2m}
"""Solvers by name."""
