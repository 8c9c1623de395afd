"""Profiles of x0 errors: conversions from every form of the loss, interpolation, and the gate's pivot."""

import math
from types import SimpleNamespace

import pytest
import torch

import vadiff
from vadiff.information import BaseWeight, Profile, gate
from vadiff.log_snr import from_sigma
from vadiff.process import PREDICTION_TYPES, loss_ratio


def gaussian(spread: float = 1.0, low: float = 0.01, high: float = 100.0, levels: int = 161) -> Profile:
    """Data N(0, spread²) and its optimal denoiser: error s²σ²/(s² + σ²)."""
    sigma = torch.logspace(math.log10(low), math.log10(high), levels, dtype=torch.float64)
    return Profile(from_sigma(sigma), spread**2 * sigma**2 / (spread**2 + sigma**2))


def test_levels_are_sorted_by_log_snr() -> None:
    profile = Profile(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0.1, 0.9, 0.4]))
    assert profile.log_snr.tolist() == [-1.0, 0.5, 2.0]
    assert profile.x0_error.tolist() == pytest.approx([0.9, 0.4, 0.1])


@pytest.mark.parametrize(
    ("log_snr", "x0_error", "message"),
    [
        (torch.zeros(3, 1), torch.ones(3), r"log_snr has shape \(3, 1\), expected \(T,\)"),
        (torch.zeros(1), torch.ones(1), "at least 2 noise levels"),
        (torch.arange(3.0), torch.ones(2), "x0_error has 2 entries, expected 3"),
        (torch.zeros(2), torch.ones(2), "one twice"),
        (torch.arange(2.0), torch.tensor([1.0, -1.0]), "x0_error is -1 at log-SNR 1"),
        (torch.arange(2.0), torch.tensor([math.nan, 1.0]), "x0_error is nan at log-SNR 0"),
    ],
)
def test_a_profile_names_what_is_wrong(log_snr: torch.Tensor, x0_error: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Profile(log_snr, x0_error)


def test_a_profile_takes_tensors_only() -> None:
    with pytest.raises(TypeError, match="log_snr is a list"):
        Profile([0.0, 1.0], torch.ones(2))


def test_rate_of_gaussian_data_between_and_beyond_its_levels() -> None:
    profile = gaussian(2.0)
    sigma = torch.tensor([0.003, 0.5, 2.0, 7.0, 1000.0], dtype=torch.float64)
    expected = 4.0 / (4.0 + sigma**2)
    assert torch.allclose(profile.rate_at(from_sigma(sigma)), expected, rtol=2e-3)
    assert torch.allclose(profile.error_at(from_sigma(sigma)), expected * sigma**2, rtol=2e-3)


def test_a_network_worse_than_its_input_has_a_rate_of_one() -> None:
    profile = Profile(torch.tensor([0.0, 8.0]), torch.tensor([0.5, 0.5]))
    assert profile.rate_at(torch.tensor([8.0, 20.0])).tolist() == [1.0, 1.0]


def test_pivot_of_gaussian_data_is_its_standard_deviation_whatever_the_scale() -> None:
    for spread in (0.1, 1.0, 10.0):
        pivot = gaussian(spread, low=0.01 * spread, high=100.0 * spread).pivot
        assert pivot == pytest.approx(spread, rel=0.06)  # a level's distance


def test_pivot_does_not_depend_on_the_lowest_level() -> None:
    assert gaussian(low=2e-3).pivot == pytest.approx(gaussian(low=2e-4).pivot, rel=0.08)


def test_no_pivot_where_the_error_stays_at_the_noise() -> None:
    """An untrained network that predicts eps = 0 returns its noisy input: error σ²."""
    sigma = torch.logspace(-2, 2, 30, dtype=torch.float64)
    assert Profile(from_sigma(sigma), sigma**2).pivot is None


def test_no_pivot_for_a_point_mass_whose_error_is_nowhere_near_the_noise() -> None:
    sigma = torch.logspace(-2, 2, 30, dtype=torch.float64)
    assert Profile(from_sigma(sigma), 1e-9 * sigma**2).pivot is None


def test_gate_is_one_half_at_its_pivot_and_closes_with_the_third_power() -> None:
    c = torch.tensor(math.log(0.3))
    at = torch.tensor([0.3, 0.03, 3.0]).log()
    assert gate(at, c).tolist() == pytest.approx([0.5, 1 / 1001, 1000 / 1001], rel=1e-5)


def recorded(prediction_type: str, base_weight: BaseWeight | None = None) -> vadiff.DiffusionLoss:
    """A criterion that has seen Gaussian data's x0 error in the form of a prediction type."""
    criterion = vadiff.DiffusionLoss("constant", bins=64, log_snr_range=(-8, 8), half_life=float("inf"))
    log_snr = torch.linspace(-7.9, 7.9, 64 * 40)
    sigma = (-0.5 * log_snr).exp()
    error = sigma**2 / (1 + sigma**2)
    weight = 1.0 if base_weight is None else base_weight(log_snr)
    criterion.reweight(error * loss_ratio(prediction_type, log_snr, sigma_data=0.7) * weight, log_snr)
    return criterion


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_form_of_the_loss_gives_the_same_errors(prediction_type: str) -> None:
    profile = Profile.of_criterion(recorded(prediction_type), prediction_type, sigma_data=0.7)
    sigma = profile.sigma
    inner = (profile.log_snr > -7) & (profile.log_snr < 7)
    assert torch.allclose((profile.x0_error / (sigma**2 / (1 + sigma**2)))[inner], torch.ones(1).double(), rtol=0.04)


def test_base_weight_is_divided_out() -> None:
    def weight(log_snr: torch.Tensor) -> torch.Tensor:
        return (0.3 * log_snr).exp()

    criterion = recorded("epsilon", weight)
    profile = Profile.of_criterion(criterion, "epsilon", base_weight=weight)
    plain = Profile.of_criterion(recorded("epsilon"), "epsilon")
    assert torch.allclose(profile.x0_error, plain.x0_error, rtol=0.02)


def test_base_weights_that_are_no_weights_are_named() -> None:
    criterion = recorded("epsilon")
    with pytest.raises(ValueError, match=r"base_weight gave of shape \(\), expected|base_weight gave of shape"):
        Profile.of_criterion(criterion, "epsilon", base_weight=lambda log_snr: log_snr.sum())
    with pytest.raises(ValueError, match="not positive and finite"):
        Profile.of_criterion(criterion, "epsilon", base_weight=lambda log_snr: 0 * log_snr)


def test_a_criterion_without_samples_or_with_another_loss_has_no_profile() -> None:
    with pytest.raises(ValueError, match="0 samples and 0 bins"):
        Profile.of_criterion(vadiff.DiffusionLoss("constant"), "epsilon")
    with pytest.raises(ValueError, match="loss is 'huber', expected 'mse'"):
        Profile.of_criterion(vadiff.DiffusionLoss("constant", loss="huber"), "epsilon")


def test_losses_of_a_validation_give_the_same_profile() -> None:
    log_snr = torch.linspace(-6, 6, 12)
    error = 1 / (1 + log_snr.exp())
    losses = SimpleNamespace(log_snr=log_snr, loss=error * loss_ratio("flow", log_snr))
    assert torch.allclose(Profile.of_losses(losses, "flow").x0_error, error.double(), rtol=1e-5)


def test_saved_and_read_again(tmp_path: object) -> None:
    path = f"{tmp_path}/profile.csv"
    profile = gaussian()
    profile.save(path)
    assert torch.equal(Profile.load(path).x0_error, profile.x0_error)
    with open(path, "w") as file:
        file.write("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected CSV with the columns log_snr,x0_error"):
        Profile.load(path)


def test_bounded_errors_are_those_of_a_network_that_is_no_worse_than_the_mean() -> None:
    """An eps network with error .01 at every level has an x0 error of .01·σ², above the data's variance from σ 5."""
    sigma = torch.logspace(-2, 2, 41, dtype=torch.float64)
    profile = Profile(from_sigma(sigma), 0.01 * sigma**2)
    bounded = profile.bounded(0.5)
    below, above = torch.tensor([0.1, 1.0, 3.0]), torch.tensor([10.0, 50.0, 1000.0])
    assert torch.allclose(bounded.rate_at(from_sigma(below)), profile.rate_at(from_sigma(below)))
    assert torch.allclose(bounded.rate_at(from_sigma(above)), 0.25 / above.double() ** 2, rtol=1e-6)
    with pytest.raises(ValueError, match="sigma_data is 0, expected"):
        profile.bounded(0)
