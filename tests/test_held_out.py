"""vadiff.trainer.training.held_out: the loss per noise level, on fixed noise."""

import math

import pytest
import torch
from torch import Tensor

from vadiff.models import Denoiser
from vadiff.trainer.data.digits import SIGMA_DATA
from vadiff.training import held_out_loss


class Unhelpful(Denoiser):
    """A denoiser that returns what it was given."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(1, 1), SIGMA_DATA)

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return noisy


def test_held_out_loss_of_a_denoiser_that_leaves_the_noise_in() -> None:
    images = torch.zeros(50, 1, 8, 8)
    loss = held_out_loss(Unhelpful(), images, log_snr_levels=(-2.0, 4.0), draws=8)
    sigma = torch.tensor([math.e, math.exp(-2.0)])
    expected = sigma**2 * (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    assert loss.per_image.shape == (2, 50)
    assert torch.allclose(loss.mean, expected, rtol=0.03)


def test_ratio_of_held_out_losses_carries_the_error_of_the_paired_difference() -> None:
    loss = held_out_loss(Unhelpful(), torch.zeros(50, 1, 8, 8), draws=1)
    twice = loss._replace(per_image=2.0 * loss.per_image)
    ratio, error = twice.ratio_to(loss)
    assert torch.allclose(ratio, torch.full_like(ratio, 2.0))
    assert torch.allclose(error, torch.zeros_like(error), atol=1e-6)


def test_held_out_loss_does_not_depend_on_the_batch_size() -> None:
    torch.manual_seed(0)
    images = torch.randn(7, 1, 8, 8)
    whole, parted = (held_out_loss(Unhelpful(), images, batch_size=size) for size in (7, 3))
    assert torch.allclose(whole.per_image, parted.per_image, rtol=1e-6)


@pytest.mark.parametrize("side", [8, 5, 3])
def test_noise_of_an_image_does_not_depend_on_how_many_there_are(side: int) -> None:
    images = torch.zeros(7, 1, side, side)
    whole, first = (held_out_loss(Unhelpful(), images[:number], draws=2).per_image for number in (7, 3))
    assert torch.equal(whole[:, :3], first)
