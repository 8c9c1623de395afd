"""PowerFunctionEMA of the trainable parameters only: adapters are averaged, frozen weights neither kept nor written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from vadiff.ema import PowerFunctionEMA, reconstruct


def adapted() -> nn.Module:
    """A frozen layer of 2,500 weights, its buffers, and a trainable one of 100."""
    module = nn.Sequential(nn.Linear(50, 50), nn.BatchNorm1d(50), nn.Linear(50, 2, bias=False))
    module[:2].requires_grad_(False)
    return module


def wander(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


def test_averages_of_trainable_parameters_are_those_of_all(tmp_path: Path) -> None:
    module = adapted()
    everything, trainable = PowerFunctionEMA(module), PowerFunctionEMA(module, trainable_only=True)
    for time in range(1, 41):
        wander(module)
        for averages in (everything, trainable):
            averages.update(time)
            if time % 5 == 0:
                averages.save(tmp_path / str(averages is trainable), "fp32")
    assert list(trainable.module_state(0.1)) == ["2.weight"]
    assert torch.equal(trainable.module_state(0.1)["2.weight"], everything.module_state(0.1)["2.weight"])
    small, whole = reconstruct(tmp_path / "True", [0.15])[0.15], reconstruct(tmp_path / "False", [0.15])[0.15]
    assert list(small) == ["2.weight"]
    assert torch.equal(small["2.weight"], whole["2.weight"])
    fresh = adapted()
    fresh.load_state_dict(module.state_dict())
    result = fresh.load_state_dict(small, strict=False)
    assert not result.unexpected_keys
    assert torch.equal(fresh[2].weight, small["2.weight"])
    assert torch.equal(fresh[0].weight, module[0].weight)


def test_frozen_weights_cost_neither_memory_nor_disk(tmp_path: Path) -> None:
    sizes = []
    for trainable_only in (False, True):
        averages = PowerFunctionEMA(adapted(), trainable_only=trainable_only)
        averages.update(1)
        stored = sum(value.numel() for each in averages.state_dict()["averages"] for value in each.values())
        sizes.append((stored, averages.save(tmp_path / str(trainable_only)).stat().st_size))
    assert sizes[1][0] == 2 * 100
    assert sizes[1][1] < 0.3 * sizes[0][1]


def test_averages_of_trainable_parameters_resume() -> None:
    module = adapted()
    averages = PowerFunctionEMA(module, trainable_only=True)
    wander(module)
    averages.update(1)
    resumed = PowerFunctionEMA(module, trainable_only=True)
    resumed.load_state_dict(averages.state_dict())
    wander(module)
    averages.update(2)
    resumed.update(2)
    assert torch.equal(averages.module_state(0.05)["2.weight"], resumed.module_state(0.05)["2.weight"])
    with pytest.raises(ValueError, match="the state is of a module with other parameters"):
        PowerFunctionEMA(module).load_state_dict(averages.state_dict())


def test_a_module_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trainable_only is true, but no parameter .* requires a gradient"):
        PowerFunctionEMA(adapted()[:2], trainable_only=True)
