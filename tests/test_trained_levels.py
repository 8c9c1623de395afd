"""Noise levels of a training run: shift, share of uniform times, strata of an epoch, information and its profile."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from vadiff import levels
from vadiff.errors import RunError
from vadiff.information import Profile
from vadiff.process import DiscreteVP
from vadiff.trainer.cli import main
from vadiff.trainer.data import Images
from vadiff.trainer.training.assembly import build_levels
from vadiff.trainer.training.batches import Batches
from vadiff.trainer.training.distributed import Ranks
from vadiff.trainer.training.level_profile import read_profile
from vadiff.trainer.training.streams import Streams
from vadiff.training import TrainConfig, open_run, train

TINY = TrainConfig(
    steps=6, batch_size=32, channels=(8, 16), bins=16, log_every=2, held_out_images=20, held_out_levels=3,
    tensorboard=False, device="cpu", backend="reference", levels_every=1,
)  # fmt: skip
INFORMATION = dataclasses.replace(
    TINY, levels="information", levels_options={"gate": 0.0, "prior": 0.1, "half_life": 0.1}
)
U = (torch.arange(400, dtype=torch.float64) + 0.5) / 400


@pytest.mark.parametrize(
    ("fields", "alpha"),
    [
        ({"shift": "3"}, 3.0),  # of a flag
        ({"shift": 3}, 3.0),  # of YAML or TOML
        ({"shift": "sd3"}, 1.0 / 32.0),  # digits have 8 x 8 pixels
        ({"shift": "rae"}, 1.0 / 8.0),
        ({"shift": "sd3", "dataset": "images", "image_size": 512}, 2.0),
        ({"shift": "rae", "dataset": "images", "image_size": 64}, math.sqrt(3.0)),
        ({"shift": "flux", "dataset": "images", "image_size": 1024}, math.exp(1.15)),
    ],
    ids=str,
)
def test_shift_is_a_number_or_a_rule_by_the_size_of_the_images(fields: dict[str, object], alpha: float) -> None:
    assert dataclasses.replace(TINY, **fields).shift_alpha == pytest.approx(alpha)


def test_shift_survives_yaml_as_number_and_as_rule(tmp_path: Path) -> None:
    for shift in (3.0, "sd3"):
        dataclasses.replace(TINY, shift=shift).save(tmp_path / "config.yaml")
        assert TrainConfig.load(tmp_path / "config.yaml").shift == shift


@pytest.mark.parametrize("name", ["log_normal", "beta", "log_logistic", "logit_normal", "uniform_time"])
def test_fixed_levels_are_shifted(name: str) -> None:
    plain = build_levels(dataclasses.replace(TINY, levels=name))
    shifted = build_levels(dataclasses.replace(TINY, levels=name, shift=2.0))
    torch.testing.assert_close(shifted(U).sigma, 2.0 * plain(U).sigma)


@pytest.mark.parametrize("name", ["second_moment", "loss_spread", "information"])
def test_adaptive_levels_start_from_the_shifted_base_with_its_share_of_uniform_times(name: str) -> None:
    sampler = build_levels(dataclasses.replace(TINY, levels=name, shift=2.0, uniform_share=0.25))
    expected = levels.Mixture(levels.LogNormal(-1.2 + math.log(2.0), 1.2), share=0.25)
    at = torch.linspace(-8.0, 8.0, 17, dtype=torch.float64)
    torch.testing.assert_close(sampler.log_density(at), expected.log_density(at))


def test_shifted_timesteps_stay_within_those_of_the_process() -> None:
    """Without a limit, a shift by 3 would draw the last timestep for 12 % of the images."""
    config = dataclasses.replace(TINY, process="vp_linear", shift=3.0)
    sampler, process = build_levels(config), DiscreteVP.linear(1000)
    counts = process.timestep(sampler((torch.arange(4000) + 0.5).double() / 4000).log_snr).bincount(minlength=1000)
    assert counts.max() < 20
    assert counts[500:].sum() > 1.4 * counts[:500].sum()


def test_share_of_uniform_times_is_that_of_the_process() -> None:
    config = dataclasses.replace(
        TINY, process="vp_linear", timesteps=40, levels="laplace", uniform_share=0.5, levels_options={"mean": 2.0}
    )
    process = DiscreteVP.linear(40)
    expected = (
        0.5 * levels.Laplace(2.0).log_density(U).exp() + 0.5 * levels.UniformTimesteps(process).log_density(U).exp()
    )
    torch.testing.assert_close(build_levels(config).log_density(U).exp(), expected)


@pytest.mark.parametrize("size", [1, 2])
def test_an_epoch_fills_its_strata_once_over_steps_parts_and_ranks(size: int) -> None:
    config = dataclasses.replace(TINY, batch_size=8, accumulate=2, stratified_epoch=True)
    images = Images(torch.zeros(47, 1, 8, 8, dtype=torch.uint8), None, torch.zeros(1, 1, 8, 8), None, False)
    sampler, device = levels.LogNormal(), torch.device("cpu")
    ranks = [Batches(config, images, sampler, Streams(0, 0, device), device, Ranks(rank, size)) for rank in range(size)]
    drawn = [-2.0 * part.sigma.log() for step in (7, 5, 6, 9, 8) for each in ranks for part in each.at(step)]
    u = sampler.cdf(torch.cat(drawn))  # of the second epoch of 47 // 8 batches
    assert (u * 40).floor().sort().values.tolist() == list(range(40))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "information"
    train(INFORMATION, out=path, progress=False)
    return path


def test_each_line_says_where_the_levels_are(run: Path) -> None:
    lines = open_run(run).metrics()
    assert all(line["levels"]["state"] for line in lines)
    assert lines[-1]["levels"]["moved"] > 0.02
    assert lines[-1]["levels"]["state"] == open_run(run).levels().state


def test_lines_of_other_levels_say_nothing_of_them(trained_run: Path) -> None:
    assert "levels" not in open_run(trained_run).metrics()[-1]


def test_diagnose_and_the_end_of_training_say_where_the_levels_are(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = f"Noise levels: {open_run(run).levels().state}.\n"
    assert main(["diagnose", str(run)]) == 0
    assert capsys.readouterr().out.endswith(f"\n\n{state}")
    shutil.copytree(run, tmp_path / "again")
    assert main(["train", "--resume", "--out", str(tmp_path / "again")]) == 0
    assert f"\n\n{state}\nWritten to {tmp_path / 'again'}\n" in capsys.readouterr().out


def test_levels_are_placed_by_a_run_from_the_first_step(run: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(run, source)
    config = dataclasses.replace(
        TINY, levels="information", profile=str(source), levels_options={"gate": 0.0}, schedule="constant"
    )
    train(dataclasses.replace(config, steps=4), out=tmp_path / "placed", progress=False)
    placed = open_run(tmp_path / "placed")
    expected = Profile.of_criterion(open_run(source).criterion(), "edm", sigma_data=TINY.sigma_data)
    expected = expected.bounded(TINY.sigma_data)  # no network of eps needs to be worse than the mean image
    profile = read_profile(placed.config, placed.path)
    assert profile is not None
    assert torch.equal(profile.log_snr, expected.log_snr)
    assert torch.equal(profile.x0_error, expected.x0_error)
    assert build_levels(config, profile=profile).moved > 0.02
    shutil.rmtree(source)  # the run has a copy
    resumed = train(dataclasses.replace(config, steps=6), out=tmp_path / "placed", resume=True, progress=False)
    assert resumed.metrics[-1]["step"] == 6
    assert main(["diagnose", str(tmp_path / "placed")]) == 0


def test_levels_are_placed_by_the_losses_of_a_validation(run: Path, tmp_path: Path) -> None:
    csv = tmp_path / "losses.csv"
    assert main(["validate", str(run), "--levels", "4", "--csv", str(csv)]) == 0
    config = dataclasses.replace(INFORMATION, profile=str(csv))
    profile = read_profile(config, None)
    assert profile is not None
    sigma = profile.sigma
    assert sigma.tolist() == pytest.approx([20.0, 2.0, 0.2, 0.02])
    assert (profile.x0_error <= 1.5).all()  # of pixels between -1 and 1
    profile.save(tmp_path / "errors.csv")
    again = read_profile(dataclasses.replace(config, profile=str(tmp_path / "errors.csv")), None)
    assert again is not None
    assert torch.equal(again.x0_error, profile.x0_error)
    with pytest.raises(ValueError, match="expected none with levels log_normal: information reads it"):
        dataclasses.replace(config, levels="log_normal")


@pytest.mark.parametrize("content", [None, "", "nothing", "log_snr,x0_error\n1.0,-1.0\n0.0,1.0\n"])
def test_a_file_without_errors_is_named(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "errors.csv"
    if content is not None:
        path.write_text(content)
    config = dataclasses.replace(INFORMATION, profile=str(path))
    with pytest.raises(RunError, match=re.escape(f"profile is {path}, of which no x0 errors can be read: ")):
        train(config, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_losses_of_an_unknown_form_are_named(run: Path, tmp_path: Path) -> None:
    csv = tmp_path / "losses.csv"
    assert main(["validate", str(run), "--levels", "2", "--csv", str(csv)]) == 0
    csv.write_text(re.sub(r", sigma_data [0-9.]+", "", csv.read_text()))
    with pytest.raises(RunError, match=r"not those of a run, .* give log_snr,x0_error"):
        read_profile(dataclasses.replace(INFORMATION, profile=str(csv)), None)


def test_a_run_with_too_few_samples_is_named(tmp_path: Path) -> None:
    train(dataclasses.replace(TINY, steps=1, batch_size=2), out=tmp_path / "short", progress=False)
    with pytest.raises(RunError, match=r"the criterion has 2 samples .*train for some hundred steps first"):
        read_profile(dataclasses.replace(INFORMATION, profile=str(tmp_path / "short")), None)
