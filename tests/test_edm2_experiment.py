"""benchmarks/experiments/edm2.py: what is chosen by is not what is reported, and both networks are chosen alike."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import edm2
import edm2_figures
import pytest
import torch
from PIL import Image

from vadiff.trainer.data.digits import SIGMA_DATA
from vadiff.trainer.training.assembly import build_denoiser
from vadiff.trainer.training.data_set import load_images
from vadiff.trainer.training.held_out import held_out_loss_of_run
from vadiff.training import HeldOutLoss


def job(network: str = "edm2", rate: float = 0.04, seed: int = 0) -> edm2.Job:
    return edm2.Job(network, rate, seed, 20, edm2.WIDTHS, Path("runs"))


def losses(value: float) -> dict[object, HeldOutLoss]:
    found = HeldOutLoss(torch.tensor([0.0, 2.0]), torch.tensor([[value / 2, value / 2], [value * 2, value * 2]]), 1.0)
    return {**dict.fromkeys(edm2.WIDTHS, found), "ema": found, "raw": found}


def test_validation_and_test_images_differ_and_training_measures_the_test_images() -> None:
    config = dataclasses.replace(job().config, held_out_levels=2)
    images = load_images(config)
    validation, reported = edm2.halves(images)
    assert len(validation.held_out) == len(reported.held_out) == config.held_out_images == 148
    same = (validation.held_out[:, None] == reported.held_out[None]).flatten(2).all(2)
    assert not same.any()
    denoiser = build_denoiser(config, images.shape, images.classes).eval()
    by_training, by_hand = (held_out_loss_of_run(config, part, denoiser) for part in (images, reported))
    assert torch.equal(by_training.per_image, by_hand.per_image)


def test_both_networks_train_alike_except_for_their_own_fields() -> None:
    one, other = (job(network).config.as_dict() for network in edm2.NETWORKS)
    differing = {name for name in one if one[name] != other[name]}
    assert differing == {"model", "schedule", "schedule_steps"}
    assert {job(seed=seed).config.weighting for seed in (0, edm2.CHOOSING_SEED)} == {"learned"}


def test_rate_is_chosen_on_the_validation_images_and_the_end_of_the_range_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tried = {}
    for network in edm2.NETWORKS:
        for place, rate in enumerate((1.0, 2.0, 3.0)):
            best = 1 if network == "classic" else 2
            tried[job(network, rate)] = edm2.Measured(losses(1.0 + abs(place - best)), losses(9.0 - place))
    rates, scores = edm2.chosen_rates(tried)
    assert rates == {"classic": 2.0, "edm2": 3.0}
    unit = math.sqrt((1 + math.e**0.0) * (1 + math.e**2.0))  # EDM's weight, geometric mean over the two levels
    assert scores["edm2"] == pytest.approx({1.0: 3.0 / unit, 2.0: 2.0 / unit, 3.0: 1.0 / unit})
    printed = capsys.readouterr().out
    assert "edm2 is best at 3, the end of the rates tried" in printed
    assert "classic is best" not in printed


def test_ratio_is_paired_by_seed() -> None:
    figures = {
        "classic": {"held_out_by_seed": [{"0.1": 1.0 + seed} for seed in range(5)]},
        "edm2": {"held_out_by_seed": [{"0.2": 1.1 * (1.0 + seed)} for seed in range(5)]},
    }
    found = edm2.ratio_of(figures, {"classic": "0.1", "edm2": "0.2"})
    assert found == pytest.approx(dict.fromkeys(("ratio", "low_95", "high_95"), 1.1))
    one_seed = {name: {"held_out_by_seed": values["held_out_by_seed"][:1]} for name, values in figures.items()}
    assert edm2.ratio_of(one_seed, {"classic": "0.1", "edm2": "0.2"})["low_95"] is None


def test_learning_curves_have_a_line_and_a_band_for_each_network(tmp_path: Path) -> None:
    lines = {
        name: [
            [{"images": 64 * n, "held_out": {"log_snr": [0.0, 2.0], "loss_ema": [level * n, level]}} for n in (1, 2)]
            for level in (1.0, 3.0)
        ]
        for name in edm2.NETWORKS
    }
    figure = edm2_figures.curves_figure(lines)
    (panel,) = figure.axes
    unit = math.sqrt((1 + 1 / SIGMA_DATA**2) * (math.e**2 + 1 / SIGMA_DATA**2))
    assert list(panel.lines[0].get_ydata()) == pytest.approx([2.0 / unit, 2.0 * math.sqrt(2) / unit])
    assert len(panel.lines) == len(panel.collections) == 2
    edm2_figures.save(figure, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size < 150_000
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 500
