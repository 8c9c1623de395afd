"""vadiff.optimal_loss.direct_gap: closed forms, the ideal denoiser, and the gap by subtraction."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from vadiff.optimal_loss import direct_gap, estimate, estimate_given_class, model_gap

SIGMAS = (0.1, 0.5, 2.0, 10.0)


class Ideal(nn.Module):
    """E[x0 | x_t] of a data set or, given labels, of their class; off by a number."""

    def __init__(self, data: Tensor, labels: Tensor | None = None, off: float = 0.0) -> None:
        super().__init__()
        self.data, self.labels, self.off = data.flatten(1).double(), labels, off
        self.modes: list[bool] = []

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        self.modes.append(self.training)
        distance = (noisy.flatten(1).double()[:, None] - self.data).square().sum(2)
        logits = -distance / (2 * sigma.double()[:, None] ** 2)
        if labels is not None and self.labels is not None:
            logits = logits.masked_fill(labels[:, None] != self.labels, -math.inf)
        return (logits.softmax(1) @ self.data + self.off).view_as(noisy).to(noisy.dtype)


def shrunk(noisy: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser that is not ideal."""
    return noisy / (1 + sigma.view(-1, *[1] * (noisy.dim() - 1)) ** 2)


@pytest.fixture(scope="module")
def digits() -> Tensor:
    from vadiff.trainer.data.digits import digits

    return digits().train[:400].float().div(127.5).sub(1.0)


@pytest.fixture(scope="module")
def classes() -> Tensor:
    from vadiff.trainer.data.digits import digits

    labels = digits().train_labels
    assert labels is not None
    return labels[:400].clamp(max=2)  # unequal classes


def test_the_ideal_denoiser_has_no_gap(digits: Tensor) -> None:
    found = direct_gap(Ideal(digits), digits, SIGMAS)
    assert (found.gap < 1e-9).all()
    assert found.per_image is not None
    assert found.per_image.shape == (4, 400)


def test_the_ideal_denoiser_of_each_class_has_no_gap_given_the_class(digits: Tensor, classes: Tensor) -> None:
    rows = torch.arange(0, 400, 3)
    found = direct_gap(Ideal(digits, classes), digits, SIGMAS, rows=rows, labels=classes, draws=8)
    assert (found.gap < 1e-9).all()
    expected = estimate_given_class(digits, classes, SIGMAS, limit=1024)
    difference = found.optimal - expected.loss / expected.elements
    assert (difference.abs() < 0.1 * expected.loss / expected.elements + 1e-4).all()


def test_a_constant_error_is_the_gap_of_every_image(digits: Tensor) -> None:
    found = direct_gap(Ideal(digits, off=0.5), digits, SIGMAS, draws=2)
    torch.testing.assert_close(found.gap, torch.full((4,), 0.25, dtype=torch.float64), rtol=1e-4, atol=0)
    assert (found.stderr < 1e-4).all()


def test_it_is_the_gap_by_subtraction_with_less_noise(digits: Tensor) -> None:
    rows = torch.arange(0, 400, 4)
    optimal = estimate(digits, SIGMAS, draws=4096)
    direct = direct_gap(shrunk, digits, SIGMAS, rows=rows)
    subtracted = model_gap(shrunk, digits[rows], optimal)
    error = (direct.stderr.square() + subtracted.stderr.square()).sqrt()
    assert ((direct.gap - subtracted.gap).abs() < 4 * error).all()
    assert (direct.stderr < torch.tensor([1.1, 1.1, 0.8, 0.5]) * subtracted.stderr).all()  # J* is large at the last two
    torch.testing.assert_close(direct.loss, direct.gap + direct.optimal)


def test_gaussian_data_have_the_gap_of_the_closed_form() -> None:
    data = 0.7 * torch.randn(20_000, 1, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.5, 1.0], dtype=torch.float64)
    found = direct_gap(shrunk, data, sigma, rows=torch.arange(4000))
    total = 0.49 + sigma.square()
    expected = (1 / (1 + sigma.square()) - 0.49 / total).square() * total
    torch.testing.assert_close(found.gap, expected, rtol=0.1, atol=0)
    torch.testing.assert_close(found.optimal, 0.49 * sigma.square() / total, rtol=0.05, atol=0)


def test_batches_and_chunks_do_not_matter_and_the_model_is_in_eval_mode(digits: Tensor) -> None:
    model = Ideal(digits, off=0.1)
    whole = direct_gap(model, digits[:128], SIGMAS, batch_size=128)
    assert model.training
    assert not any(model.modes)
    parts = direct_gap(model, digits[:128], SIGMAS, batch_size=32, chunk=50)
    torch.testing.assert_close(parts.gap, whole.gap, rtol=1e-4, atol=1e-9)


def test_equal_samples_count_as_often_as_they_are_there(digits: Tensor) -> None:
    data = torch.cat([digits[:100], digits[:20]])
    assert (direct_gap(Ideal(data), data, SIGMAS).gap < 1e-9).all()


def test_a_single_image_has_no_standard_error(digits: Tensor) -> None:
    assert direct_gap(shrunk, digits, SIGMAS, rows=torch.tensor([3])).stderr.isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": torch.zeros(1, 4)}, r"data has shape \(1, 4\), expected \(N, ...\) with at least two"),
        ({"rows": torch.tensor([0, 9])}, "rows has numbers from 0 to 9, expected 0 to 8"),
        ({"rows": torch.zeros(2)}, r"rows is \(2,\) torch.float32, expected int64"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels is \(3,\) torch.int64, expected int64 \(9,\)"),
        ({"sigmas": [0.0]}, r"sigmas is \[0.0\]"),
        ({"draws": 0}, "draws is 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"denoise": lambda x, s: x[:1]}, "denoise returned shape"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        direct_gap(**{"denoise": shrunk, "data": torch.zeros(9, 4), "sigmas": [1.0], **options})


def test_bytes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"data has dtype torch\.uint8"):
        direct_gap(shrunk, torch.zeros(9, 4, dtype=torch.uint8), [1.0])
