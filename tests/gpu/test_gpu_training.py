"""Training on a GPU: no step waits for the device, a resumed run is the same to the bit, a captured one is the same."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from waits import waits_are_errors

from vadiff.errors import TrainingError
from vadiff.trainer.training.captured import WARM_UP
from vadiff.trainer.training.checkpoint import load_checkpoint
from vadiff.trainer.training.distributed import Ranks
from vadiff.trainer.training.held_out import HeldOutLoss
from vadiff.trainer.training.loop import _Trainer
from vadiff.training import Stopped, TrainConfig, edm_objective, train

# EDM2's network, as it needs nothing; unet needs diffusers.
CONFIG = TrainConfig(
    model="edm2", steps=6, batch_size=32, channels=(8, 16), log_every=2, held_out_images=20, tensorboard=False,
    device="cuda", flips=True, class_conditional=True, clip=1.0, checkpoint_every=100,
)  # fmt: skip


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model": "unet"},
        {"levels": "second_moment"},
        {"weighting": "learned", "sigma_rel": (0.05, 0.1)},
        {"levels": "information", "shift": 2.0, "uniform_share": 0.1, "stratified_epoch": True},
        {"levels": "beta", "uniform_share": 0.1},
        {"target": "posterior_mean", "reference": 256},
        {"target": "posterior_mean", "reference": "all", "flips": False, "levels": "information"},
        {"augment": 0.5},
        {"cache": "host", "workers": 1},
    ],
    ids=str,
)
def test_step_does_not_wait_for_the_device(graph: bool, precision: str, settings: dict[str, Any]) -> None:
    config = dataclasses.replace(
        CONFIG, precision=precision, levels_every=1, dropout=0.1, graph=graph, compile=False, **settings
    )
    if config.model == "unet":
        pytest.importorskip("diffusers", reason="the model unet is diffusers' U-Net: pip install diffusers")
    trainer = _Trainer(config, edm_objective, None, torch.device("cuda", 0), Ranks())
    for step in range(WARM_UP + 1):  # kernels are built, the images' order is moved, the step is captured
        trainer.train_step(step)
    with waits_are_errors():
        for step in range(WARM_UP + 1, WARM_UP + 4):
            trainer.train_step(step)


@pytest.mark.parametrize("graph", [False, True])
def test_the_loop_does_not_wait_for_the_device_between_lines(graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """New passes over the images and looks for rows of skipped steps included."""
    config = dataclasses.replace(
        CONFIG, graph=graph, compile=False, steps=40, log_every=1000, max_skipped_steps=2, batch_size=512
    )
    trainer = _Trainer(config, edm_objective, None, torch.device("cuda", 0), Ranks())
    assert len(trainer.images.train) < 20 * config.batch_size  # several passes
    trainer.open_log()
    for trainer.step in range(WARM_UP + 1):
        trainer.train_step(trainer.step)
    trainer.step += 1
    at_the_end = HeldOutLoss(torch.zeros(1), torch.zeros(1, 1), config.sigma_data)
    monkeypatch.setattr(trainer, "_write_line", lambda *_: at_the_end)
    with waits_are_errors():
        trainer.run(progress=False)
    assert trainer.step == 40


def test_a_row_of_non_finite_steps_ends_the_run_one_look_later() -> None:
    calls = 0

    def non_finite(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return edm_objective(*arguments) * (1.0 if calls < 4 else float("nan"))

    config = dataclasses.replace(CONFIG, steps=40, log_every=30, max_skipped_steps=5)
    with pytest.raises(TrainingError, match="7 steps in a row had a non-finite gradient, the last up to step 10"):
        train(config, non_finite, progress=False)
    assert calls == 15


def test_steps_that_wait_for_the_device_stay_eager_and_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def reading(*arguments: Any) -> Tensor:
        loss = edm_objective(*arguments)
        return loss / max(1.0, loss.item())

    config = dataclasses.replace(CONFIG, deterministic=True, steps=8, log_every=8, compile=False)
    eager = train(config, reading, progress=False)
    graph = train(dataclasses.replace(config, graph=True), reading, progress=False)
    assert graph.metrics[-1]["loss"] == eager.metrics[-1]["loss"]
    assert f"a step waits for the device, at {__file__}, line" in capsys.readouterr().err
    train(dataclasses.replace(config, graph=True), progress=False)
    assert "waits for the device" not in capsys.readouterr().err


def test_a_finished_run_holds_no_memory_of_its_graph() -> None:
    gc.collect()
    gc.disable()
    try:
        trained = train(dataclasses.replace(CONFIG, graph=True, compile=False, steps=8), progress=False)
        torch.cuda.empty_cache()
        pools = {tuple(segment["segment_pool_id"]) for segment in torch.cuda.memory_snapshot()}
    finally:
        gc.enable()
    assert pools == {(0, 0)}
    assert trained.criterion.per_sample_loss is not None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model": "unet", "norm_groups": 4, "precision": "bf16"},
        {"dropout": 0.1, "weighting": "learned", "sigma_rel": (0.05, 0.1), "precision": "bf16"},
        {"levels": "second_moment", "levels_every": 1, "accumulate": 2, "stratified": True},
        {"levels": "information", "levels_every": 1, "accumulate": 2, "stratified_epoch": True},
        {"target": "posterior_mean", "reference": 256, "process": "flow"},
        {"target": "posterior_mean", "reference": "all", "flips": False, "accumulate": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("deterministic", [True, False])
def test_captured_steps_are_the_eager_ones(tmp_path: Path, deterministic: bool, settings: dict[str, Any]) -> None:
    """To the bit with deterministic algorithms; else the loss differs by no more than a thousandth after 20 steps."""
    if settings.get("model") == "unet":
        pytest.importorskip("diffusers", reason="the model unet is diffusers' U-Net: pip install diffusers")
    config = dataclasses.replace(CONFIG, deterministic=deterministic, steps=20, log_every=20, compile=False, **settings)
    eager = train(config, out=tmp_path / "eager", progress=False)
    captured = train(dataclasses.replace(config, graph=True), out=tmp_path / "graph", progress=False)
    assert captured.metrics[-1]["loss"] == pytest.approx(eager.metrics[-1]["loss"], rel=1e-3)
    if deterministic:
        one, other = load_checkpoint(tmp_path / "eager"), load_checkpoint(tmp_path / "graph")
        for part in ("model", "ema", "criterion"):
            assert all(torch.equal(one[part][name], other[part][name]) for name in one[part]), part


@pytest.mark.parametrize("graph_first", [True, False])
def test_a_run_of_one_mode_resumes_in_the_other(tmp_path: Path, graph_first: bool) -> None:
    config = dataclasses.replace(CONFIG, deterministic=True, schedule="constant", compile=False, steps=12)
    train(config, out=tmp_path / "whole", progress=False)
    train(dataclasses.replace(config, steps=6, graph=graph_first), out=tmp_path / "parts", progress=False)
    train(dataclasses.replace(config, graph=not graph_first), out=tmp_path / "parts", resume=True, progress=False)
    whole, parts = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "parts")
    for part in ("model", "ema", "criterion"):
        assert all(torch.equal(whole[part][name], parts[part][name]) for name in whole[part]), part


@pytest.mark.parametrize("settings", [{"precision": "bf16", "dropout": 0.1}, {"accumulate": 2}], ids=str)
def test_captured_steps_of_a_compiled_network_are_the_eager_ones(settings: dict[str, Any]) -> None:
    """Not to the bit: the compiler measures which of its kernels to take, for each mode anew."""
    config = dataclasses.replace(CONFIG, steps=20, log_every=20, compile=True, **settings)
    eager = train(config, progress=False)
    captured = train(dataclasses.replace(config, graph=True), progress=False)
    assert captured.metrics[-1]["loss"] == pytest.approx(eager.metrics[-1]["loss"], rel=1e-3)


@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"dropout": 0.1, "accumulate": 2}], ids=str)
def test_a_compiled_network_trains_as_an_eager_one(settings: dict[str, Any]) -> None:
    """In graphs of the compiler where the step is not captured and a batch is of one part."""
    config = dataclasses.replace(CONFIG, steps=20, log_every=20, **settings)
    eager = train(dataclasses.replace(config, compile=False), progress=False)
    compiled = train(dataclasses.replace(config, compile=True), progress=False)
    tolerance = 0.1 if "dropout" in settings else 0.01  # the compiler drops other activations
    assert compiled.metrics[-1]["loss"] == pytest.approx(eager.metrics[-1]["loss"], rel=tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resumed_run_is_the_same_to_the_bit(tmp_path: Path, precision: str) -> None:
    config = dataclasses.replace(CONFIG, precision=precision, deterministic=True)
    calls = 0

    def stopping(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return edm_objective(*arguments)

    train(config, out=tmp_path / "whole", progress=False)
    with pytest.raises(Stopped):
        train(config, stopping, out=tmp_path / "parted", progress=False)
    train(config, out=tmp_path / "parted", resume=True, progress=False)
    whole, parted = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "parted")
    for part in ("model", "ema", "criterion"):
        assert all(torch.equal(whole[part][name], parted[part][name]) for name in whole[part])


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_on_while_a_run_trains(tf32: bool) -> None:
    seen = []

    def looking(*arguments: Any) -> Tensor:
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return edm_objective(*arguments)

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    train(dataclasses.replace(CONFIG, tf32=tf32, steps=1), looking, progress=False)
    assert seen == [("high", True) if tf32 else ("highest", False)]
    assert before == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)


@pytest.mark.parametrize("graph", [False, True])
def test_images_that_are_read_ahead_are_those_in_memory(tmp_path: Path, graph: bool) -> None:
    image = pytest.importorskip("PIL.Image", reason="pictures are read by Pillow: pip install pillow")
    generator = torch.Generator().manual_seed(0)
    for number in range(200):
        pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        image.fromarray(pixels.numpy()).save(tmp_path / f"{number:03d}.png")
    config = dataclasses.replace(
        CONFIG, dataset="images", data=str(tmp_path), image_size=8, class_conditional=False, graph=graph, compile=False,
        steps=12, workers=2, deterministic=True,
    )  # fmt: skip
    losses = [
        [line["loss"] for line in train(dataclasses.replace(config, cache=cache), progress=False).metrics]
        for cache in ("device", "host", "none")
    ]
    assert losses[0] == losses[1] == losses[2]
