"""Posterior-mean targets in the trainer: `target` and `reference` of a config."""

from __future__ import annotations

import dataclasses
import math
import pickle
from pathlib import Path

import pytest
import torch
from ranks import join_two_ranks, leave_two_ranks, run_two_ranks

from vadiff.log_snr import from_sigma
from vadiff.pixels import normalised
from vadiff.targets import PosteriorMean, Recorded
from vadiff.trainer.training.assembly import build_criterion, build_levels
from vadiff.trainer.training.batches import Batches
from vadiff.trainer.training.checkpoint import load_checkpoint
from vadiff.trainer.training.data_set import load_images
from vadiff.trainer.training.distributed import Ranks
from vadiff.trainer.training.posterior_targets import moved, posterior_targets
from vadiff.trainer.training.streams import REFERENCES, Streams
from vadiff.training import PRESETS, TrainConfig, open_run, train

CONFIG = TrainConfig(
    model="edm2", steps=8, batch_size=16, channels=(8, 16), log_every=4, held_out_images=20, held_out_levels=2,
    tensorboard=False, device="cpu", checkpoint_every=100, deterministic=True, warmup=4, process="flow",
    levels="uniform_time", target="posterior_mean", reference=64, p_mean=0.5,
)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{}, {"flips": True}, {"class_conditional": True, "accumulate": 2}, {"reference": "all", "flips": True}],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(options, tmp_path: Path):
    config = dataclasses.replace(CONFIG, schedule="constant", **options)
    train(config, out=tmp_path / "whole", progress=False)
    train(dataclasses.replace(config, steps=4), out=tmp_path / "parts", progress=False)
    train(config, out=tmp_path / "parts", resume=True, progress=False)
    whole, parts = (load_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert "target.removed.sums" in whole["criterion"]
    for part in ("model", "ema", "criterion", "levels"):
        torch.testing.assert_close(parts[part], whole[part], rtol=0, atol=0, equal_nan=True)


def test_the_network_sees_the_same_and_is_told_something_less_random(tmp_path: Path):
    """Same weights, images, levels and noise: the first loss differs by what the targets take out."""
    config = dataclasses.replace(CONFIG, steps=3, batch_size=256, reference="all", log_every=1)
    plain = train(dataclasses.replace(config, target="data"), out=None, progress=False)
    posterior = train(config, out=None, progress=False)
    assert "target" not in plain.metrics[0]
    said = posterior.metrics[0]["target"]
    assert said["description"] == "posterior mean over 1,500 references"
    assert len(said["removed_x0_error"]) == config.bins
    assert posterior.metrics[0]["base_loss"] < 0.9 * plain.metrics[0]["base_loss"]
    before, after = (torch.cat([p.flatten() for p in run.denoiser.parameters()]) for run in (plain, posterior))
    assert not torch.equal(before, after)


def bias_z_scores(config: TrainConfig, ranks: Ranks, of_targets: TrainConfig | None = None) -> torch.Tensor:
    """Mean of (x0_hat - x0)·phi(x_t) in standard errors, for several phi and each pixel that varies; 0 if unbiased.

    A network's gradient differs from that of plain targets by such products, so that their mean is the same too.
    """
    config = config.resolved()
    device, images = torch.device("cpu"), load_images(config)
    streams, criterion = Streams(0, 0, device), build_criterion(config)
    batches = Batches(config, images, build_levels(config), streams, device, ranks)
    criterion.target = posterior_targets(of_targets or config, batches, images.classes)
    varies = normalised(images.train).std(0) > 0.3
    found = []
    for step in range(150):
        for part in batches.at(step):
            x0_hat, noise_hat = moved(criterion, part, streams.generators[REFERENCES])
            log_snr = from_sigma(part.sigma).view(-1, 1, 1, 1)
            alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
            noisy = alpha * part.x0 + sigma * part.eps
            torch.testing.assert_close(alpha * x0_hat + sigma * noise_hat, noisy, rtol=0, atol=1e-4)
            features = torch.cat([torch.ones_like(noisy), noisy, noisy.flip(-1), noisy.tanh() ** 3], 1)
            products = (x0_hat - part.x0) * features * (log_snr < 2)
            found.append(products.double().mean(0)[:, varies[0]])
    values = torch.stack(found)  # one of each call, as its draws share their references
    return values.mean(0) / values.std(0) * math.sqrt(len(values))


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({}, Ranks()),
        ({"flips": True}, Ranks()),
        ({"flips": True, "reference": "all"}, Ranks()),
        ({"class_conditional": True, "label_dropout": 0.3, "batch_size": 32, "accumulate": 2}, Ranks()),
        ({"flips": True, "batch_size": 32, "reference": 128}, Ranks(1, 2, 1)),
        ({"process": "vp_linear", "levels": "auto", "prediction": "v_prediction", "zero_terminal_snr": True}, Ranks()),
    ],
    ids=str,
)
def test_targets_are_unbiased_given_the_noisy_image(options, ranks):
    assert bias_z_scores(dataclasses.replace(CONFIG, **options), ranks).abs().max() < 4.5


def test_the_test_of_bias_sees_references_without_flips():
    config = dataclasses.replace(CONFIG, flips=True)
    assert bias_z_scores(config, Ranks(), dataclasses.replace(config, flips=False)).abs().max() > 6


def test_all_references_with_flips_take_a_batch_of_any_size_and_can_be_pickled():
    config = dataclasses.replace(CONFIG, flips=True, reference="all", batch_size=512, steps=2, log_every=1)
    trained = train(config, out=None, progress=False)
    assert all(entry["loss"] > 0 for entry in trained.metrics)
    assert torch.equal(pickle.loads(pickle.dumps(trained.criterion)).bin_centers, trained.criterion.bin_centers)


@pytest.mark.parametrize("process", ["edm", "vp_linear"])
def test_other_processes_train_too_pure_noise_included(process):
    options = {"prediction": "v_prediction", "zero_terminal_snr": True} if process == "vp_linear" else {}
    config = dataclasses.replace(CONFIG, process=process, levels="auto", steps=3, log_every=1, **options)
    trained = train(config, out=None, progress=False)
    assert all(entry["loss"] > 0 for entry in trained.metrics)
    assert isinstance(trained.criterion.target, PosteriorMean)


def test_a_finished_run_is_read_without_its_images(tmp_path: Path):
    config = dataclasses.replace(CONFIG, reference="all", batch_size=64, steps=12)
    trained = train(config, out=tmp_path / "run", progress=False)
    run = open_run(tmp_path / "run")
    criterion = run.criterion()
    assert isinstance(criterion.target, Recorded)
    at = criterion.bin_centers
    assert torch.equal(criterion.target.removed_error(at), trained.criterion.target.removed_error(at))
    assert "target: posterior mean over all training images" in str(run.diagnose())
    profile = run.profile()
    without = dataclasses.replace(config, target="data")
    plain = train(without, out=tmp_path / "plain", progress=False)
    assert plain.criterion.target is None
    level = torch.tensor([-2.0])
    assert float(profile.error_at(level)) == pytest.approx(
        float(open_run(tmp_path / "plain").profile().error_at(level)), rel=0.2
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "some"}, "reference is 'some', expected all, or a number of images of at least 2"),
        ({"reference": 1}, "reference is 1, expected all, or a number"),
        ({"reference": 63}, "reference is 63, expected at least 64: four times the 16 images of a step"),
        ({"target": "median"}, "target is 'median', expected one of data, posterior_mean"),
    ],
)
def test_bad_fields_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **options)


def test_more_references_than_images_are_refused():
    with pytest.raises(
        ValueError, match="reference is 4096, expected at most 1500: the number of training images; or all"
    ):
        train(dataclasses.replace(CONFIG, reference=4096), out=None, progress=False)


def rank_main(rank: int, folder: str, steps: int, resume: bool, name: str) -> None:
    join_two_ranks(rank, folder)
    config = dataclasses.replace(CONFIG, steps=steps, schedule="constant")
    train(config, out=Path(folder) / name, resume=resume, progress=False)
    leave_two_ranks()


def two_ranks(folder: Path, steps: int, resume: bool, name: str) -> None:
    (folder / "store").unlink(missing_ok=True)
    run_two_ranks(rank_main, str(folder), steps, resume, name)


def test_two_ranks_resume_to_the_bit(tmp_path: Path):
    two_ranks(tmp_path, 6, False, "whole")
    two_ranks(tmp_path, 3, False, "parts")
    two_ranks(tmp_path, 6, True, "parts")
    whole, parts = (load_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    for part in ("model", "criterion"):
        torch.testing.assert_close(parts[part], whole[part], rtol=0, atol=0, equal_nan=True)
    count = whole["criterion"]["target.removed.sums"].view(torch.float64)[0].sum()
    assert float(count) <= 6 * 16
    assert float(count) > 5 * 16  # of both ranks


def test_presets_keep_the_images_as_targets():
    assert all(config.target == "data" for config in PRESETS.values())
