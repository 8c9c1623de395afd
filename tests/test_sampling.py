"""vadiff.sampling: EDM's deterministic sampler."""

import math

import pytest
import torch
from torch import Tensor

from vadiff.sampling import heun, noise_levels

SIGMA_DATA = 0.5


def gaussian_denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """The best denoiser there is for data ~ N(0, SIGMA_DATA²)."""
    shrink = SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma**2)
    return x * shrink.view(-1, *[1] * (x.dim() - 1))


def exact_samples(seeds: range, shape: tuple[int, ...]) -> Tensor:
    """Where the exact flow of `gaussian_denoiser` takes each seed's noise: it keeps x / √(σ² + SIGMA_DATA²)."""
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return 80.0 * noise * SIGMA_DATA / math.sqrt(80.0**2 + SIGMA_DATA**2)


def test_samples_follow_the_exact_flow_of_gaussian_data() -> None:
    samples = heun(gaussian_denoiser, (2, 3), range(50), levels=noise_levels(steps=64))
    assert torch.allclose(samples, exact_samples(range(50), (2, 3)), rtol=0.01)


def test_error_falls_with_the_square_of_the_number_of_steps() -> None:
    exact = exact_samples(range(10), (4,))
    errors = [
        (heun(gaussian_denoiser, (4,), range(10), levels=noise_levels(steps)) - exact).abs().max().item()
        for steps in (32, 64)
    ]
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.25)


def test_sample_of_a_seed_does_not_depend_on_the_batch() -> None:
    together = heun(gaussian_denoiser, (1, 8, 8), [3, 1, 4, 1, 5])
    in_pairs = heun(gaussian_denoiser, (1, 8, 8), [3, 1, 4, 1, 5], batch_size=2)
    alone = heun(gaussian_denoiser, (1, 8, 8), [4])
    assert torch.equal(together, in_pairs)
    assert torch.equal(together[2:3], alone)
    assert torch.equal(together[1], together[3])
    assert not torch.equal(together[0], together[1])


def test_network_is_called_twice_per_step_but_once_in_the_last() -> None:
    seen: list[float] = []

    def record(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.dtype == sigma.dtype == torch.float32
        assert sigma.shape == (2,)
        seen.append(sigma[0].item())
        return gaussian_denoiser(x, sigma)

    heun(record, (1,), [0, 1], levels=torch.tensor([2.0, 1.0, 0.5, 0.0]))
    assert seen == [2.0, 1.0, 1.0, 0.5, 0.5]


def test_no_gradient_is_recorded() -> None:
    scale = torch.ones((), requires_grad=True)
    assert not heun(lambda x, sigma: scale * x, (1,), [0]).requires_grad


def test_no_seeds_give_no_samples() -> None:
    assert heun(gaussian_denoiser, (1, 8, 8), []).shape == (0, 1, 8, 8)


def test_noise_levels_are_the_papers() -> None:
    levels = noise_levels(steps=5, sigma_min=0.01, sigma_max=10.0, rho=7.0)
    roots = [10.0 ** (1 / 7) + i / 4 * (0.01 ** (1 / 7) - 10.0 ** (1 / 7)) for i in range(5)]
    assert levels.tolist() == pytest.approx([root**7 for root in roots] + [0.0])


def test_noise_levels_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="sigma_min is 2 and sigma_max 1, expected 0 < sigma_min < sigma_max"):
        noise_levels(sigma_min=2, sigma_max=1)
    with pytest.raises(ValueError, match="steps is 1, expected at least 2"):
        noise_levels(steps=1)
