"""Training on a GPU: no step waits for the device, a resumed run is the same to the bit, a captured one is the same."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from waits import waits_are_errors

from vadiff.trainer.training.captured import WARM_UP
from vadiff.trainer.training.checkpoint import load_checkpoint
from vadiff.trainer.training.distributed import Ranks
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
    [{}, {"model": "unet"}, {"levels": "second_moment"}, {"weighting": "learned", "sigma_rel": (0.05, 0.1)}],
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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model": "unet", "norm_groups": 4, "precision": "bf16"},
        {"dropout": 0.1, "weighting": "learned", "sigma_rel": (0.05, 0.1), "precision": "bf16"},
        {"levels": "second_moment", "levels_every": 1, "accumulate": 2, "stratified": True},
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


def test_a_compiled_network_can_be_captured() -> None:
    trained = train(dataclasses.replace(CONFIG, graph=True, steps=WARM_UP + 3, precision="bf16"), progress=False)
    assert torch.isfinite(torch.tensor(trained.metrics[-1]["loss"]))


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
