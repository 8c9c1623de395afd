"""vadiff.training: paired seeds, what a step does, what is logged and saved, held-out loss."""

import copy
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import usable
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import vadiff
from vadiff.errors import DataError, RunError, TrainingError
from vadiff.extras import MissingExtraError, install_command
from vadiff.models import Denoiser
from vadiff.process import edm_preconditioning
from vadiff.trainer.data import Images
from vadiff.trainer.data.digits import SIGMA_DATA
from vadiff.trainer.training.batches import Batch, Batches
from vadiff.trainer.training.checkpoint import load_checkpoint
from vadiff.trainer.training.distributed import Ranks
from vadiff.trainer.training.metrics import MetricsLog
from vadiff.trainer.training.optimisation import learning_rate_at
from vadiff.trainer.training.streams import ShuffledIndices, Streams
from vadiff.training import (
    PRESETS,
    Objective,
    TrainConfig,
    TrainedRun,
    edm_objective,
    flow_objective,
    open_run,
    train,
)

TINY = TrainConfig(
    steps=5, batch_size=8, channels=(8, 16), log_every=2, held_out_images=20, held_out_levels=3, tensorboard=False,
    device="cpu", backend="reference",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "tiny"


@pytest.fixture(scope="module")
def run(folder: Path) -> TrainedRun:
    return train(TINY, out=folder, progress=False)


@pytest.fixture
def recorded() -> tuple[list[tuple[Tensor, ...]], Objective]:
    """A list, and an objective that puts (F, x0, eps, sigma) of every step into it."""
    steps: list[tuple[Tensor, ...]] = []

    def objective(
        criterion: vadiff.DiffusionLoss, output: Tensor, x0: Tensor, eps: Tensor, sigma: Tensor, *rest: Any
    ) -> Tensor:
        steps.append(tuple(value.detach().clone() for value in (output, x0, eps, sigma)))
        return edm_objective(criterion, output, x0, eps, sigma, *rest)

    return steps, objective


def parameters(denoiser: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in denoiser.parameters()])


@pytest.mark.parametrize("stratified", [False, True])
def test_antithetic_levels_come_in_pairs(
    recorded: tuple[list[tuple[Tensor, ...]], Objective], stratified: bool
) -> None:
    steps, objective = recorded
    config = dataclasses.replace(TINY, steps=1, accumulate=2, antithetic=True, stratified=stratified)
    train(config, objective, progress=False)
    z = (torch.cat([step[3] for step in steps]).log() - config.p_mean).sort().values
    assert len(z) == config.batch_size
    assert torch.allclose(z, -z.flip(0), atol=1e-5)
    assert z.abs().min() > 0


def test_same_seed_gives_the_same_run_to_the_bit(run: TrainedRun) -> None:
    again = train(TINY, progress=False)
    assert torch.equal(parameters(run.denoiser), parameters(again.denoiser))
    assert [entry["loss"] for entry in run.metrics] == [entry["loss"] for entry in again.metrics]
    assert torch.equal(run.criterion.statistics.state, again.criterion.statistics.state)
    assert torch.equal(run.held_out.per_image, again.held_out.per_image)


def test_runs_that_differ_in_the_weighting_see_the_same_noise(recorded) -> None:
    steps, objective = recorded
    for weighting in ("constant", "variance_aware"):
        train(dataclasses.replace(TINY, weighting=weighting), objective, progress=False)
    first, second = steps[: TINY.steps], steps[TINY.steps :]
    assert torch.equal(first[0][0], second[0][0])  # F of the first step: the same initial weights
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))


def test_data_seed_changes_the_data_and_nothing_else(recorded) -> None:
    steps, objective = recorded
    short = dataclasses.replace(TINY, steps=1)
    for data_seed in (None, 0, 1):
        train(dataclasses.replace(short, data_seed=data_seed), objective, progress=False)
    same, explicit, other = steps
    assert torch.equal(same[1], explicit[1])
    assert not any(torch.equal(a, b) for a, b in zip(same[1:], other[1:], strict=True))
    one, two = (
        parameters(train(dataclasses.replace(short, learning_rate=1e-30, data_seed=s), progress=False).denoiser)
        for s in (0, 1)
    )
    assert torch.allclose(one, two, rtol=0, atol=1e-20)


def test_training_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    train(dataclasses.replace(TINY, steps=1), progress=False)
    assert torch.equal(before, torch.get_rng_state())


def test_every_pass_sees_every_image_once() -> None:
    def order(epoch: int, size: int) -> Tensor:
        return torch.randperm(size, generator=torch.Generator().manual_seed(epoch))

    indices = ShuffledIndices(order, size=10, batch_size=4, device=torch.device("cpu"))
    seen = torch.cat([indices.at(step) for step in range(5)])
    assert seen[:10].sort().values.tolist() == seen[10:].sort().values.tolist() == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    large = ShuffledIndices(order, size=10, batch_size=25, device=torch.device("cpu"))
    assert sorted(large.at(0)[:20].tolist()) == sorted(list(range(10)) * 2)


def test_training_lowers_the_loss() -> None:
    config = dataclasses.replace(TINY, steps=60, learning_rate=1e-2, weighting="constant", log_every=10)
    losses = [entry["loss"] for entry in train(config, progress=False).metrics]
    assert losses[-1] < 0.9 * losses[0]


def test_edm_objective_is_the_weighted_squared_error_of_the_denoiser() -> None:
    random = torch.Generator().manual_seed(0)
    output, x0, eps = torch.randn(3, 16, 1, 8, 8, generator=random, dtype=torch.float64)
    sigma = (1.2 * torch.randn(16, generator=random, dtype=torch.float64) - 1.2).exp()
    c_skip, c_out, _, _ = (factor.view(-1, 1, 1, 1) for factor in edm_preconditioning(sigma, SIGMA_DATA))
    denoised = c_skip * (x0 + sigma.view(-1, 1, 1, 1) * eps) + c_out * output
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    expected = (weight * (denoised - x0).square().flatten(1).mean(1)).mean()
    criterion = vadiff.DiffusionLoss("constant", backend="reference")
    loss = edm_objective(criterion, output, x0, eps, sigma, SIGMA_DATA)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_min_snr_by_name_is_that_of_edms_objective() -> None:
    criterion = train(dataclasses.replace(TINY, steps=1, weighting="min_snr"), progress=False).criterion
    log_snr = torch.tensor([-3.0, 0.0, 3.0])
    snr = log_snr.exp()
    expected = snr.clamp(max=5.0) / (snr + 1 / SIGMA_DATA**2)
    assert torch.allclose(criterion.weight_at(log_snr), expected, rtol=1e-5)


def test_flow_objective_is_the_squared_error_of_the_velocity() -> None:
    random = torch.Generator().manual_seed(0)
    output, x0, eps = torch.randn(3, 16, 1, 8, 8, generator=random, dtype=torch.float64)
    sigma = torch.rand(16, generator=random, dtype=torch.float64) + 0.1
    criterion = vadiff.DiffusionLoss("constant", backend="reference")
    loss = flow_objective(criterion, output, x0, eps, sigma, 0.5)
    assert loss.item() == pytest.approx((output - (eps - x0)).square().mean().item(), rel=1e-6)


def test_flow_denoiser_knows_the_data_from_the_right_velocity() -> None:
    x0, eps = torch.randn(2, 16, 1, 8, 8)
    sigma = torch.rand(16) * 5 + 0.01

    class Velocity(torch.nn.Module):
        def forward(self, x_t: Tensor, c_noise: Tensor) -> Tensor:
            t = (sigma / (1 + sigma)).view(-1, 1, 1, 1)
            assert torch.allclose(x_t, (1 - t) * x0 + t * eps, atol=1e-5)
            return eps - x0

    denoiser = Denoiser(Velocity(), sigma_data=0.5, process="flow")
    assert torch.allclose(denoiser(x0 + sigma.view(-1, 1, 1, 1) * eps, sigma), x0, atol=1e-5)


def test_metrics_have_a_line_every_few_steps_and_the_last(run: TrainedRun, folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == run.metrics
    assert [(line["step"], line["images"]) for line in lines] == [(2, 16), (4, 32), (5, 40)]
    for line in lines:
        assert line["base_loss"] > 0
        assert line["loss"] > 0
        assert line["grad_norm"] > 0
        assert line["images_per_second"] > 0
        assert line["memory_bytes"] > 1e6
        assert (line["skipped_samples"], line["skipped_steps"], line["clipped_share"]) == (0, 0, 0.0)
        assert {name: len(values) for name, values in line["statistics"].items()} == dict.fromkeys(
            ("count", "mean", "variance", "mass"), TINY.bins
        )
        assert None in line["statistics"]["mean"]  # an empty bin has no mean, and JSON no NaN
    assert lines[-1]["weights"] == run.criterion.weights.tolist()
    assert [("held_out" in line) for line in lines] == [False, False, True]
    assert lines[-1]["held_out"]["loss_ema"] == run.held_out.mean.tolist()
    assert lines[-1]["learning_rate"] == learning_rate_at(TINY, TINY.steps - 1)


def test_loss_of_a_line_is_the_mean_since_the_last() -> None:
    losses = []

    def counting(*arguments: Any) -> Tensor:
        losses.append(edm_objective(*arguments))
        return losses[-1]

    lines = train(TINY, counting, progress=False).metrics
    assert lines[1]["loss"] == pytest.approx(((losses[2] + losses[3]) / 2).item())
    assert lines[2]["loss"] == pytest.approx(losses[4].item())


def test_opened_run_gives_what_was_trained(run: TrainedRun, folder: Path) -> None:
    opened = open_run(folder)
    assert opened.config == TINY.resolved()
    assert opened.checkpoints() == [TINY.steps]
    assert opened.metrics() == run.metrics
    averaged = opened.denoiser()
    assert not averaged.training
    assert (averaged.image_shape, averaged.labels, averaged.sigma_data) == ((1, 8, 8), 0, SIGMA_DATA)
    assert torch.equal(parameters(averaged), parameters(run.denoiser))
    assert not torch.equal(parameters(opened.denoiser("raw")), parameters(averaged))
    assert torch.equal(opened.criterion().statistics.state, run.criterion.statistics.state)
    assert opened.images().train.shape == (1500, 1, 8, 8)


def test_what_is_not_a_run_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not a run directory: it has no config\.yaml"):
        open_run(tmp_path)
    with pytest.raises(RunError, match="is not a run directory: it is not a folder"):
        open_run(tmp_path / "nowhere")
    (tmp_path / "config.yaml").write_text("steps: many")
    with pytest.raises(RunError, match=r"config\.yaml: steps is 'many', expected a whole number"):
        open_run(tmp_path)


def test_run_directory_is_not_overwritten_unless_told(tmp_path: Path) -> None:
    train(TINY, out=tmp_path, progress=False)
    with pytest.raises(RunError, match="holds a run already: go on with --resume"):
        train(TINY, out=tmp_path, progress=False)
    (tmp_path / "notes.txt").write_text("mine")
    train(dataclasses.replace(TINY, steps=1), out=tmp_path, overwrite=True, progress=False)
    assert open_run(tmp_path).checkpoints() == [1]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_invalid_config_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be halved 4 times"):
        train(dataclasses.replace(TINY, channels=(8,) * 5), out=tmp_path / "run", progress=False)
    with pytest.raises(DataError, match="which does not exist"):
        train(dataclasses.replace(TINY, dataset="cifar10", data=str(tmp_path / "no")), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_non_finite_steps_are_skipped_and_counted(tmp_path: Path) -> None:
    calls = 0

    def non_finite(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return edm_objective(*arguments) * (math.nan if calls in (2, 3) else 1.0)

    config = dataclasses.replace(TINY, steps=3, log_every=1, ema_decay=0.0, clip=1.0, checkpoint_every=1)
    lines = train(config, non_finite, out=tmp_path, progress=False).metrics
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2]
    assert [line["loss"] is None for line in lines] == [False, True, True]
    run = open_run(tmp_path)
    first, last = parameters(run.denoiser("raw", step=1)), parameters(run.denoiser("raw", step=3))
    assert torch.equal(first, last)
    assert torch.isfinite(last).all()


def huber_of_torch(criterion: vadiff.DiffusionLoss, output: Tensor, x0: Tensor, *rest: Any) -> Tensor:
    """Infinite for an infinite output, with a finite gradient."""
    return torch.nn.functional.huber_loss(output.float(), x0)


def huber_of_vadiff(criterion: vadiff.DiffusionLoss, *rest: Any) -> Tensor:
    criterion.loss = "huber"
    return edm_objective(criterion, *rest)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("objective", [edm_objective, huber_of_vadiff, huber_of_torch])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_step_with_a_non_finite_prediction_is_skipped(
    tmp_path: Path, value: float, objective: Objective, precision: str
) -> None:
    """With a gradient scaler (fp16) and without. One number of one part of the batch is not finite, in two steps."""
    calls = 0

    def non_finite(criterion: vadiff.DiffusionLoss, output: Tensor, *rest: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls in (4, 5):
            output = output.clone()
            output[0, 0, 0, 0] = value
        return objective(criterion, output, *rest)

    config = dataclasses.replace(
        TINY, steps=3, log_every=1, ema_decay=0.0, checkpoint_every=1, accumulate=2, precision=precision
    )
    lines = train(config, non_finite, out=tmp_path, progress=False).metrics
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2]
    run = open_run(tmp_path)
    first, last = parameters(run.denoiser("raw", step=1)), parameters(run.denoiser("raw", step=3))
    assert torch.equal(first, last)
    assert last.isfinite().all()
    if precision == "fp16":
        scales = [load_checkpoint(tmp_path, step)["scaler"]["scale"] for step in (1, 3)]
        assert scales[1] == scales[0] / 4


def test_too_many_non_finite_steps_in_a_row_end_the_run() -> None:
    config = dataclasses.replace(TINY, max_skipped_steps=3, log_every=1)
    calls = 0

    def non_finite(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return edm_objective(*arguments) * (1.0 if calls == 2 else math.nan)

    with pytest.raises(TrainingError, match="3 steps in a row had a non-finite gradient, the last up to step 5"):
        train(config, non_finite, progress=False)


def test_accumulation_changes_neither_the_data_nor_the_result(recorded) -> None:
    steps, objective = recorded
    short = dataclasses.replace(TINY, steps=2, weighting="constant")
    whole = train(short, objective, progress=False)
    parted = train(dataclasses.replace(short, accumulate=4), objective, progress=False)
    for step in range(2):
        parts = steps[2 + 4 * step : 6 + 4 * step]
        for index in (1, 2, 3):
            assert torch.equal(torch.cat([part[index] for part in parts]), steps[step][index])
    assert torch.allclose(parameters(whole.denoiser), parameters(parted.denoiser), atol=2e-3)
    assert parted.metrics[-1]["loss"] == pytest.approx(whole.metrics[-1]["loss"], rel=1e-4)


def copies_of(shape: torch.Size, call: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What a call returns, and how many tensors of a shape are copied or converted in it, by the profiler."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        result = call()
    copies = [event for event in recorded.events() if event.name == "aten::copy_"]
    return result, sum(event.input_shapes[:1] == [list(shape)] for event in copies)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_criterion_copies_neither_images_nor_noise(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """diffusers' U-Net returns channels_last, in which the trainer makes its batches from the second step on."""
    usable("native")
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    images = Images(pixels, None, pixels[:2], None, held_out_is_test=False)
    monkeypatch.setattr("vadiff.trainer.training.loop.load_images", lambda config: images)
    preset = dataclasses.replace(
        PRESETS["cifar10-mini"], steps=3, batch_size=4, channels=(32, 32, 32), precision=precision, device="cpu",
        backend="native", tensorboard=False, held_out_images=2, held_out_levels=2,
    )  # fmt: skip
    assert preset.model == "unet"
    handed: list[tuple[Tensor, ...]] = []
    copies: list[int] = []

    def objective(criterion: vadiff.DiffusionLoss, output: Tensor, x0: Tensor, eps: Tensor, *rest: Any) -> Tensor:
        handed.append((output, x0, eps))
        call = functools.partial(edm_objective, copy.deepcopy(criterion), output)
        _, of_others = copies_of(output.shape, lambda: call(x0.contiguous(), eps, *rest))
        assert of_others > 0, "this would not be seen"
        loss, found = copies_of(output.shape, lambda: edm_objective(criterion, output, x0, eps, *rest))
        copies.append(found)
        return loss

    made: list[Batch] = []
    draw = Batches.draw

    def recording(self: Batches) -> list[Batch]:
        made.extend(batches := draw(self))
        return batches

    monkeypatch.setattr(Batches, "draw", recording)
    train(preset, objective, progress=False)
    assert handed[0][0].is_contiguous(memory_format=torch.channels_last)
    assert not handed[0][0].is_contiguous()
    assert all(output.stride() == x0.stride() == eps.stride() for output, x0, eps in handed)
    assert copies == [0, 0, 0]
    assert [batch.eps is eps for batch, (_, _, eps) in zip(made, handed, strict=True)] == [False, True, True]
    assert [batch.x0 is x0 for batch, (_, x0, _) in zip(made, handed, strict=True)] == [False, True, True]


def test_memory_format_changes_neither_images_nor_noise() -> None:
    pixels = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    images = Images(pixels, None, pixels[:2], None, held_out_is_test=False)
    config = dataclasses.replace(TINY, flips=True, accumulate=2)
    device = torch.device("cpu")
    batches = Batches(config, images, vadiff.levels.LogNormal(), Streams(0, 0, device), device, Ranks())
    plain = batches.at(3)
    batches.memory_format = torch.channels_last
    for one, other in zip(plain, batches.at(3), strict=True):
        assert one.x0.is_contiguous()
        assert one.eps.is_contiguous()
        assert other.x0.stride() == other.eps.stride() == (192, 1, 24, 3)
        assert torch.equal(one.x0, other.x0)
        assert torch.equal(one.eps, other.eps)
        assert torch.equal(one.sigma, other.sigma)


def test_clipping_bounds_the_step_and_is_counted() -> None:
    config = dataclasses.replace(TINY, clip=1e-3)
    assert [line["clipped_share"] for line in train(config, progress=False).metrics] == [1.0, 1.0, 1.0]


def test_line_that_cannot_be_written_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    log = MetricsLog(tmp_path, tensorboard=False)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written: .* go on with --resume"):
        log.add({"step": 1})


def test_flips_mirror_about_half_of_the_images_and_nothing_else(recorded) -> None:
    steps, objective = recorded
    config = dataclasses.replace(TINY, steps=1, batch_size=64)
    for flips in (False, True):
        train(dataclasses.replace(config, flips=flips), objective, progress=False)
    (_, plain, *noise), (_, flipped, *same_noise) = steps
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(1)
    kept = (flipped == plain).flatten(1).all(1)
    assert (mirrored | kept).all()
    assert 16 < mirrored.sum() < 48
    assert all(torch.equal(a, b) for a, b in zip(noise, same_noise, strict=True))


def test_network_is_told_the_class_but_for_the_share_withheld(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    plain = Denoiser.training_output

    def watched(
        self: Denoiser, x0: Tensor, eps: Tensor, sigma: Tensor, labels: Tensor | None = None, **rest: Any
    ) -> Tensor:
        if self.training and labels is not None:
            seen.append(labels)
        return plain(self, x0, eps, sigma, labels, **rest)

    monkeypatch.setattr(Denoiser, "training_output", watched)
    config = dataclasses.replace(TINY, class_conditional=True, label_dropout=0.5, batch_size=64)
    denoiser = train(config, progress=False).denoiser
    labels = torch.cat(seen)
    assert labels.max() == 10  # none given
    assert 0.4 < (labels == 10).float().mean() < 0.6
    assert set(labels.tolist()) == set(range(11))
    noisy, sigma = torch.randn(2, 1, 8, 8), torch.ones(2)
    told = denoiser(noisy, sigma, torch.tensor([3, 3]))
    assert not torch.equal(told, denoiser(noisy, sigma))
    assert torch.equal(denoiser(noisy, sigma), denoiser(noisy, sigma, torch.tensor([10, 10])))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_close_to_full(precision: str) -> None:
    config = dataclasses.replace(TINY, weighting="constant", learning_rate=1e-3)
    full, low = (
        train(dataclasses.replace(config, precision=name), progress=False).metrics[-1]["loss"]
        for name in ("fp32", precision)
    )
    assert low == pytest.approx(full, rel=0.02)
    assert low != full


def test_tables_of_another_run_weigh_or_draw_the_levels(folder: Path, run: TrainedRun, tmp_path: Path) -> None:
    weighed = dataclasses.replace(TINY, weighting="table", table=str(folder))
    static = train(weighed, out=tmp_path / "static", progress=False)
    assert torch.allclose(static.criterion.weights, run.criterion.weights, rtol=1e-5)
    drawn = dataclasses.replace(TINY, weighting="constant", levels="table", table=str(folder))
    train(drawn, out=tmp_path / "drawn", progress=False)
    opened = open_run(tmp_path / "static")
    (folder / "metrics.jsonl").rename(folder / "hidden")  # a run stands on its own
    try:
        assert torch.allclose(opened.criterion().weights, run.criterion.weights, rtol=1e-5)
        with pytest.raises(RunError, match="no weight table can be read from"):
            train(drawn, out=tmp_path / "new", progress=False)
    finally:
        (folder / "hidden").rename(folder / "metrics.jsonl")


def test_sample_grid_and_tensorboard_files_are_written(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, steps=2, samples_every=2, sample_count=5, tensorboard=True, log_rms=True)
    lines = train(config, out=tmp_path, progress=False).metrics
    with Image.open(tmp_path / "samples" / "step-2.png") as picture:
        assert picture.size == (26, 17)  # 3 x 2 images of 8 x 8 pixels, a line between them
    assert list((tmp_path / "tensorboard").glob("events*"))
    rms = lines[-1]["rms"]
    assert rms["weights"].keys() == rms["activations"].keys()
    assert all(value > 0 for value in rms["activations"].values())


def test_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=f"sklearn cannot be imported .*{re.escape(install_command('train'))}"):
        train(TINY, progress=False)
