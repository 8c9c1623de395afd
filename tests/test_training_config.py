"""vadiff.trainer.config: what fits, what does not, and what becomes of it."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

import vadiff
from vadiff.errors import RunError
from vadiff.trainer.training.assembly import build_criterion, build_denoiser, build_levels
from vadiff.trainer.training.optimisation import RunningAverage, decay_at, learning_rate_at
from vadiff.training import PRESETS, TrainConfig

TINY = TrainConfig(steps=5, batch_size=8, channels=(8, 16), device="cpu", backend="reference")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"batch_size": -1}, "batch_size is -1, expected at least 1"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan, expected above 0 and below inf"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0, expected at least 0 and below 1"),
        ({"weighting": "variance"}, "weighting is 'variance', expected one of .*constant"),
        ({"accumulate": 3}, "accumulate is 3, which does not divide batch_size = 8"),
        ({"steps": 2.5}, "steps is 2.5, expected a whole number"),
        ({"flips": 1}, "flips is 1, expected true or false"),
        ({"betas": (0.9,)}, r"betas is \(0.9,\), expected a list of 2 numbers"),
        ({"weighting_options": {"alpha": "x"}}, "weighting_options is .*, expected"),
        ({"weighting": "table"}, "table is None, but weighting or levels is 'table'"),
        ({"held_out_sigma": (2.0, 1.0)}, "held_out_sigma is .* expected a lower and a higher number"),
        ({"shift": 0.0}, "shift is 0.0, expected above 0 and below inf"),
        ({"shift": "sd2"}, "shift is 'sd2', expected a number or one of flux, rae, sd3"),
        ({"uniform_share": 1.0}, "uniform_share is 1.0, expected at least 0 and below 1"),
        ({"stratified_epoch": True, "antithetic": True}, "antithetic is true, but so is stratified_epoch"),
        ({"device": "toaster"}, "device is 'toaster', expected auto, cpu, cuda"),
    ],
)
def test_config_names_the_invalid_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **fields)


def test_device_that_is_not_here_is_named_when_it_is_needed() -> None:
    config = dataclasses.replace(TINY, device="cuda:99")  # a run of another machine can be opened
    with pytest.raises(ValueError, match="device is 'cuda:99', but torch sees"):
        config.torch_device()


def test_config_survives_yaml(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, weighting_options={"strength": 0.5}, clip=math.inf, learning_rate=1e-4)
    config.save(tmp_path / "config.yaml")
    assert TrainConfig.load(tmp_path / "config.yaml") == config.resolved()
    (tmp_path / "config.yaml").write_text("learning_rate: 1e-4\nchannels: [8, 16]\n")  # text, as YAML reads 1e-4
    assert TrainConfig.load(tmp_path / "config.yaml").learning_rate == 1e-4
    (tmp_path / "config.yaml").write_text("stepz: 4")
    with pytest.raises(RunError, match="stepz: no such field"):
        TrainConfig.load(tmp_path / "config.yaml")


def test_options_of_a_weighting_reach_it_or_are_refused() -> None:
    config = dataclasses.replace(TINY, weighting="cauchy", weighting_options={"alpha": 0.1})
    assert build_criterion(config).weighting == vadiff.weighting.Cauchy(alpha=0.1)
    with pytest.raises(ValueError, match=r"weighting_options is .*beta"):
        build_criterion(dataclasses.replace(config, weighting_options={"beta": 0.1}))
    with pytest.raises(ValueError, match=r"levels_options is .*beta"):
        build_levels(dataclasses.replace(TINY, levels_options={"beta": 0.1}))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
        ("inverse_sqrt", [0.5, 1.0, 1.0, math.sqrt(2 / 3)]),
    ],
)
def test_learning_rate_schedules(schedule: str, expected: list[float]) -> None:
    config = dataclasses.replace(TINY, steps=4, warmup=2, schedule=schedule, learning_rate=1.0, schedule_steps=2)
    assert [learning_rate_at(config, step) for step in range(4)] == pytest.approx(expected)


def test_warm_up_may_start_from_zero_as_edms() -> None:
    config = dataclasses.replace(TINY, steps=4, warmup=2, schedule="constant", learning_rate=1.0, warmup_from_zero=True)
    assert [learning_rate_at(config, step) for step in range(4)] == [0.0, 0.5, 1.0, 1.0]


def test_ramp_up_limits_the_half_life_of_the_running_average() -> None:
    """EDM: to a share of the images so far; at first the average is the network itself."""
    config = dataclasses.replace(TINY, ema_decay=0.5 ** (1 / 10), ema_rampup=0.05)
    decays = [decay_at(config, step) for step in (0, 20, 100, 200, 1000)]
    assert decays == pytest.approx([0.0, 0.5, 0.5 ** (1 / 5), 0.5 ** (1 / 10), 0.5 ** (1 / 10)])
    average, network = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    running, expected = RunningAverage(average, network, config), average.weight.detach().clone()
    for step in (0, 5, 30):
        with torch.no_grad():
            network.weight += 1.0
        running.prepare(step)
        running.update()
        expected = torch.lerp(network.weight.detach(), expected, decay_at(config, step))
        torch.testing.assert_close(average.weight.detach(), expected)


def test_ddpm_preset_is_the_papers() -> None:
    config = PRESETS["cifar10-ddpm"]
    assert (config.process, config.form().prediction, config.timesteps) == ("vp_linear", "epsilon", 1000)
    assert (config.ema_decay, config.learning_rate, config.dropout, config.flips) == (0.9999, 2e-4, 0.1, True)
    with torch.device("meta"):  # without memory
        network = build_denoiser(config, (3, 32, 32), 10)
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(35.7e6, rel=0.02)


def test_every_field_has_help_text() -> None:
    assert all(len(field.metadata["help"]) > 5 for field in dataclasses.fields(TrainConfig))


def test_paper_preset_is_the_papers_protocol() -> None:
    config = PRESETS["cifar10-paper"]
    assert (config.channels, config.steps, config.batch_size) == ((128, 256, 512), 60_000, 128)
    assert (config.optimizer, config.learning_rate, config.weight_decay, config.clip) == ("adamw", 2e-4, 0.0, 1.0)
    assert (config.ema_decay, config.p_mean, config.p_std, config.sigma_data) == (0.9995, -1.2, 1.2, 0.5)
    assert [learning_rate_at(config, step) for step in (0, 59_999)] == [2e-4, 2e-4]
    with torch.device("meta"):  # without memory
        network = build_denoiser(config, (3, 32, 32), 10)
    assert network.labels == 0
    assert 40e6 < sum(parameter.numel() for parameter in network.parameters()) < 90e6


def test_network_that_does_not_fit_the_images_is_refused() -> None:
    with pytest.raises(ValueError, match="images of 8 × 8 cannot be halved 4 times"):
        dataclasses.replace(TINY, channels=(8,) * 5)
    with pytest.raises(ValueError, match="expected multiples of norm_groups = 8"):
        build_denoiser(dataclasses.replace(TINY, channels=(12,)), (1, 8, 8), 0)
    with pytest.raises(ValueError, match=r"channels is \(\), expected one width per resolution"):
        dataclasses.replace(TINY, channels=())


@pytest.mark.parametrize("model", ["unet", "edm2"])
def test_attention_at_a_resolution_that_is_never_reached_is_refused_beside_one_that_is(model: str) -> None:
    message = "attention_resolutions has 16, 7, but with 2 widths images of height 8 have the resolutions 8, 4"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, model=model, attention_resolutions=(16, 4, 7))
    larger = dataclasses.replace(PRESETS["images"], model=model, image_size=64)
    with pytest.raises(ValueError, match=r"attention_resolutions has 16, but .* the resolutions 128, 64, 32"):
        dataclasses.replace(larger, image_size=128)
    with pytest.raises(ValueError, match="attention_resolutions has 4, but"):  # the images are of another size
        build_denoiser(dataclasses.replace(TINY, model=model, attention_resolutions=(4,)), (1, 16, 16), 0)
