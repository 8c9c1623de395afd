"""What `benchmarks/gpu.sh --part 3` measures of training, on a small network."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import training_loop

from vadiff.training import PRESETS


def test_modes_are_timed_one_after_the_other_under_the_settings_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loop.training_loop, "load_images", training_loop.random_images)
    before, config = torch.backends.cudnn.allow_tf32, dataclasses.replace(PRESETS["digits-edm2"], device="cuda")
    modes = training_loop.speeds_of_modes(config, ["eager", "captured"], steps=2, rounds=2)
    with training_loop.settings_of(config):
        found = {}
        for mode, of_mode in modes:
            found[mode] = of_mode
            assert torch.backends.cudnn.benchmark
            assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cudnn.allow_tf32 is before
    assert found["captured"]["times_eager"] > 0
    assert "criterion_percent" in found["captured"]
