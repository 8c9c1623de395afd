"""What all solvers share: the guided denoiser, the noise of each seed, and batches.

All noise of an image comes from its own generator with its own seed, so that the image does not depend on the batch
size, on the other seeds, on the number of devices or (up to rounding) on the device.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .steps import noise_levels

Denoise = Callable[..., Tensor]
"""D(x, sigma) or D(x, sigma, labels) → estimate of x0; x [B, *shape] float32 = x0 + sigma·eps, sigma [B] float32,
labels [B] int64."""


EVERY_SIGMA = (0.0, math.inf)


class Guided(NamedTuple):
    """D for a whole batch at one noise level, in float64, with labels, guidance and clipping."""

    denoise: Denoise
    labels: Tensor | None
    guide: Denoise | None
    guidance: float
    guided_sigma: tuple[float, float]
    clip: bool

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The estimate of x0, [B, *shape] float64, for x [B, *shape] float64 at noise level sigma."""
        arguments = (x.float(), torch.full((len(x),), sigma, dtype=torch.float32, device=x.device))
        classes = () if self.labels is None else (self.labels,)
        x0 = self.denoise(*arguments, *classes).double()
        lowest, highest = self.guided_sigma
        if self.guidance != 1.0 and lowest < sigma <= highest:
            weaker = self.denoise(*arguments) if self.guide is None else self.guide(*arguments, *classes)
            x0 = weaker.double() + self.guidance * (x0 - weaker.double())
        return x0.clamp(-1.0, 1.0) if self.clip else x0


class Noise:
    """The noise of a batch from one generator per image; every call returns the next [B, *shape] float64."""

    def __init__(self, shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> None:
        self.shape, self.device = tuple(shape), device
        # On the CPU, so that a seed means the same image on every device.
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        noise = [torch.randn(self.shape, generator=stream) for stream in self.streams]
        return torch.stack(noise).to(self.device).double()


Solve = Callable[[Guided, Noise, list[float]], Tensor]
"""A solver for one batch: (denoiser, noise, levels) → [B, *shape] float64 at the last level."""


@torch.no_grad()
def solve_in_batches(
    solve: Solve,
    denoise: Denoise,
    shape: Sequence[int],
    seeds: Sequence[int],
    *,
    levels: Tensor | None,
    labels: Tensor | None,
    guide: Denoise | None,
    guidance: float,
    guided_sigma: tuple[float, float],
    clip: bool,
    batch_size: int,
    device: torch.device | str,
) -> Tensor:
    """One sample per seed by `solve`; the arguments are those of the public solvers, see `heun`.

    Returns:
        [len(seeds), *shape] float32, on the CPU.

    Raises:
        ValueError: levels that do not fall to 0, labels of another shape, guidance without labels or guide, or a
            guided_sigma that is no interval.
    """
    device = torch.device(device)
    steps = _checked(noise_levels() if levels is None else levels)
    if labels is not None and labels.shape != (len(seeds),):
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected ({len(seeds)},): one class per seed.")
    if labels is None and guide is None and guidance != 1.0:
        raise ValueError(
            f"guidance is {guidance} without labels: there is no class to guide to. Pass labels, or a guide."
        )
    if not 0.0 <= guided_sigma[0] < guided_sigma[1]:
        raise ValueError(f"guided_sigma is {guided_sigma}, expected a lower and a higher noise level.")
    samples = []
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        classes = None if labels is None else labels[part].to(device)
        noise = Noise(shape, seeds[part], device)
        samples.append(solve(Guided(denoise, classes, guide, guidance, guided_sigma, clip), noise, steps).float().cpu())
    return torch.cat(samples) if samples else torch.empty(0, *shape)


def _checked(levels: Tensor) -> list[float]:
    falling = levels.dim() == 1 and len(levels) > 1 and bool((levels.diff() < 0.0).all())
    if not falling or levels[-1] != 0.0 or not levels.isfinite().all():
        raise ValueError(f"levels is {levels.tolist()}, expected finite noise levels [N + 1] that fall and end in 0.")
    values: list[float] = levels.tolist()
    return values
