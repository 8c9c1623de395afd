"""vadiff.trainer.training.held_out: the loss per noise level, on fixed noise."""

import math

import pytest
import torch
from torch import Tensor

from vadiff.models import Denoiser
from vadiff.trainer.data.digits import SIGMA_DATA
from vadiff.trainer.report import held_out_table
from vadiff.trainer.training.held_out import level_mean
from vadiff.training import HeldOutLoss, held_out_loss


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


def test_mean_over_levels_counts_every_level_alike_in_x0_form() -> None:
    x0_loss, log_snr = torch.tensor([1.0, 100.0]), torch.tensor([-3.0, 5.0])
    edm_loss = x0_loss * (log_snr.exp() + 1 / 0.5**2)
    assert level_mean(edm_loss, log_snr, sigma_data=0.5).item() == pytest.approx(10.0)
    several = HeldOutLoss(log_snr, edm_loss[:, None].expand(2, 4), 0.5)
    assert several.level_mean == pytest.approx(10.0)


def test_ratio_of_means_over_levels_is_that_of_every_form() -> None:
    log_snr = torch.tensor([-3.0, 1.0, 5.0])
    one, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 1.0, 4.0])
    ratios = [
        level_mean(one, log_snr, sigma_data=sigma_data) / level_mean(other, log_snr, sigma_data=sigma_data)
        for sigma_data in (0.5, 2.0)
    ]
    assert ratios[0].item() == pytest.approx(ratios[1].item())
    assert ratios[0].item() == pytest.approx((one / other).log().mean().exp().item())


def test_table_has_the_mean_over_levels_and_its_ratio() -> None:
    log_snr = torch.tensor([-3.0, 5.0])
    weight = log_snr.exp() + 1 / 0.5**2
    first = HeldOutLoss(log_snr, (torch.tensor([1.0, 100.0]) * weight)[:, None].expand(2, 4), 0.5)
    second = first._replace(per_image=first.per_image * torch.tensor([[2.0], [0.125]]))
    last = held_out_table({"first": first, "second": second}).splitlines()[-1]
    assert last.split() == ["x0,", "all", "levels", "10.00000", "5.00000", "0.500"]


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


def test_each_draw_has_noise_of_its_own() -> None:
    images = torch.zeros(50, 1, 8, 8)
    one, two = (held_out_loss(Unhelpful(), images, log_snr_levels=(0.0,), draws=draws) for draws in (1, 2))
    second = 2.0 * two.per_image - one.per_image
    assert abs(torch.corrcoef(torch.cat([one.per_image, second]))[0, 1]) < 0.5
    assert two.per_image.std() < 0.85 * one.per_image.std()


def test_loss_in_the_unit_of_another_run() -> None:
    loss = held_out_loss(Unhelpful(), torch.zeros(5, 1, 8, 8), draws=1)
    other = loss.with_sigma_data(2.0)
    assert other.level_mean == pytest.approx(loss.level_mean, rel=1e-6)
    assert other.sigma_data == 2.0
