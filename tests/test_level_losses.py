"""vadiff.validation.LevelLosses: errors, ratios, table, CSV, picture, tracker."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import vadiff
from vadiff.optimal_loss import OptimalLoss
from vadiff.process import loss_ratio
from vadiff.validation import LevelLosses, Records, mean_log_ratio


def of(losses: Tensor) -> LevelLosses:
    """A result of every level of each sample, from losses [N, L]."""
    number, size = losses.shape
    records = Records(torch.arange(number).repeat_interleave(size), torch.arange(size).repeat(number), losses.flatten())
    return LevelLosses.of(torch.arange(size).double(), records, "a test", "20 samples")


def test_standard_error_is_that_of_the_mean() -> None:
    random = torch.Generator().manual_seed(0)
    losses = 2.0 + 0.5 * torch.randn(
        400, 1000, dtype=torch.float64, generator=random
    )  # a thousand levels of 400 samples
    result = of(losses)
    assert result.loss.std().item() == pytest.approx(0.025, rel=0.1)
    assert result.stderr.mean().item() == pytest.approx(0.025, rel=0.01)
    assert result.stderr[0].item() == pytest.approx(np.std(losses[:, 0].numpy(), ddof=1) / 20.0)
    assert of(losses[:1]).stderr.isnan().all()


def test_standard_errors_of_ratio_and_mean_log_ratio_are_those_of_paired_samples() -> None:
    random = torch.Generator().manual_seed(0)
    found: list[tuple[float, float, float, float]] = []
    for _ in range(300):
        hardness = torch.rand(60, 1, dtype=torch.float64, generator=random).add(0.5)  # common to both runs
        noise = 1.0 + 0.1 * torch.randn(60, 1, dtype=torch.float64, generator=random)  # common to a sample's levels
        scale = torch.tensor([1.0, 30.0], dtype=torch.float64)
        one, other = of(0.9 * scale * hardness * noise), of(scale * hardness)
        ratio, error = one.ratio_to(other)
        found.append((ratio[1].item(), error[1].item(), one.mean_log_ratio(other), one.mean_log_ratio_stderr(other)))
    ratios, errors, means, mean_errors = np.array(found).T
    assert ratios.mean() == pytest.approx(0.9, abs=0.003)
    assert errors.mean() == pytest.approx(ratios.std(), rel=0.1)
    assert means.mean() == pytest.approx(math.log(0.9), abs=0.003)
    assert mean_errors.mean() == pytest.approx(means.std(), rel=0.1)


def test_mean_log_ratio_is_the_same_in_every_form_of_the_loss() -> None:
    a, b, log_snr = torch.tensor([[1.0, 2.0, 3.0], [1.5, 1.0, 4.0], [-3.0, 1.0, 5.0]], dtype=torch.float64)
    expected = np.log([1 / 1.5, 2.0, 0.75]).mean()
    for form in vadiff.process.PREDICTION_TYPES:
        k = loss_ratio(form, log_snr)
        assert mean_log_ratio(k * a, k * b).item() == pytest.approx(expected, rel=1e-9)


def test_gap_on_training_images_is_loss_minus_optimal_loss_in_x0_form() -> None:
    sigma = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    curve = OptimalLoss(
        sigma, torch.tensor([3.2, 8.0, 12.8]).double(), torch.zeros(3).double(), torch.ones(3).int(), 16, 16.0, 50
    )
    level = -2.0 * sigma.log()
    records = Records(
        torch.arange(6), torch.arange(3).repeat(2), (level.exp() * torch.tensor([0.3, 0.6, 0.9])).repeat(2)
    )
    gap = LevelLosses.of(level, records, "a test").training_gap(curve, "epsilon")
    torch.testing.assert_close(gap.optimal, torch.tensor([0.2, 0.5, 0.8]).double())
    torch.testing.assert_close(gap.gap, torch.tensor([0.1, 0.1, 0.1]).double(), rtol=1e-6, atol=0)


def test_table_has_a_line_per_level_and_the_one_number() -> None:
    losses = torch.tensor([[1.0, 40.0], [3.0, 60.0]]).double()
    lines = str(of(losses).compared_with(of(2.0 * losses))).splitlines()
    assert lines[0] == "loss by noise level (a test)"
    assert lines[2].split() == ["0.00", "1", "2", "2", "±", "1", "0.5000", "±", "0.0000"]
    assert lines[3].split()[:6] == ["1.00", "0.6065", "2", "50", "±", "10"]
    assert lines[4] == "mean over levels of ln(loss / reference): -0.6931 ± 0.0000 (-50.00%)"
    assert len(lines) == 5


def test_csv_gives_back_the_numbers_to_the_bit(tmp_path: Path) -> None:
    result = of(torch.rand(20, 3, dtype=torch.float64))
    result.save(tmp_path / "result.csv")
    loaded = LevelLosses.load(tmp_path / "result.csv")
    for name in ("log_snr", "loss", "stderr", "samples", "non_finite"):
        assert torch.equal(getattr(loaded, name), getattr(result, name)), name
    assert (loaded.draws, loaded.data) == ("a test", "20 samples")
    with (tmp_path / "result.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["sigma"]) for row in rows] == pytest.approx([1.0, math.exp(-0.5), math.exp(-1.0)])
    assert [path.name for path in tmp_path.iterdir()] == ["result.csv"]


def test_plot_draws_loss_and_reference() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    result = of(torch.rand(20, 3, dtype=torch.float64) + 1.0)
    axes = result.compared_with(result).plot()
    assert [line.get_label() for line in axes.get_lines()][-1] == "reference"
    assert axes.get_lines()[0].get_ydata().tolist() == result.loss.tolist()
    assert axes.get_yscale() == "log"
    assert result.plot(axes) is axes


def test_tracker_gets_a_number_per_level_and_the_mean_log_ratio() -> None:
    result, seen = of(torch.ones(4, 2).double()), []
    result.compared_with(of(2.0 * torch.ones(4, 2).double())).log_to(
        lambda values, step: seen.append((step, values)), 7
    )
    names = ["loss/log_snr_0", "loss/log_snr_1", "mean_log_ratio", "non_finite"]
    values = dict(zip(names, (1.0, 1.0, -math.log(2.0), 0.0), strict=True))
    assert seen == [(7, {f"vadiff/validation/{name}": value for name, value in values.items()})]
    with pytest.raises(TypeError, match=r"step is 0\.5, expected an integer"):
        result.log_to(print, 0.5)


@pytest.mark.parametrize("content", [b"step,loss\n1,2\n", b"", bytes(range(256)), b"log_snr\n\0\n"])
def test_file_that_is_no_result_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "levels.csv").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"levels.csv is not the result of a validation, expected CSV with the columns"
    ):
        LevelLosses.load(tmp_path / "levels.csv")


def test_missing_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LevelLosses.load(tmp_path / "missing.csv")


def test_path_is_no_reference() -> None:
    with pytest.raises(TypeError, match=r"reference is a str, expected a LevelLosses; LevelLosses.load\(path\) reads"):
        of(torch.ones(2, 2).double()).mean_log_ratio("levels.csv")
