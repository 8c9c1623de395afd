"""Training on a GPU: no step waits for the device, and a resumed run is the same to the bit."""

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

from vadiff.trainer.training.checkpoint import load_checkpoint
from vadiff.trainer.training.distributed import Ranks
from vadiff.trainer.training.loop import _Trainer
from vadiff.training import Stopped, TrainConfig, edm_objective, train

# EDM2's network, as it needs nothing; unet needs diffusers.
CONFIG = TrainConfig(
    model="edm2", steps=6, batch_size=32, channels=(8, 16), log_every=2, held_out_images=20, tensorboard=False,
    device="cuda", flips=True, class_conditional=True, clip=1.0, checkpoint_every=100,
)  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"model": "unet"}, {"levels": "second_moment"}, {"weighting": "learned", "sigma_rel": (0.05, 0.1)}],
    ids=str,
)
def test_step_does_not_wait_for_the_device(precision: str, settings: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, precision=precision, levels_every=1, dropout=0.1, **settings)
    if config.model == "unet":
        pytest.importorskip("diffusers", reason="the model unet is diffusers' U-Net: pip install diffusers")
    trainer = _Trainer(config, edm_objective, None, torch.device("cuda", 0), Ranks())
    for step in range(3):  # kernels are built, the images' order is moved
        trainer._train_step(step)
    with waits_are_errors():
        for step in range(3, 6):
            trainer._train_step(step)


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
