"""Initial weights from another run (`--transfer`): which, and that everything else starts anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from vadiff.errors import RunError
from vadiff.trainer.config import TrainConfig
from vadiff.trainer.training.checkpoint import load_checkpoint
from vadiff.training import open_run, train


def config_of(source: Path, **changes: object) -> TrainConfig:
    """The source run's config, two steps with a rate that is too low to change a weight."""
    options: dict[str, object] = {
        "transfer": str(source), "steps": 2, "samples_every": 0, "held_out_every": 0, "learning_rate": 1e-30,
        "schedule": "constant", "seed": 1, "checkpoint_every": 1,
    }  # fmt: skip
    return dataclasses.replace(open_run(source).config, **(options | changes))


def test_a_run_starts_from_the_averaged_weights_of_another_with_fresh_statistics_and_steps(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(trained_run)
    train(config, out=tmp_path / "run")
    assert f"Weights: averages of step 4 of {trained_run}, " in capsys.readouterr().err
    source, state = load_checkpoint(trained_run), load_checkpoint(tmp_path / "run", 2)
    for weights in ("model", "ema"):
        assert all(torch.equal(state[weights][name], value) for name, value in source["ema"].items())
    assert state["step"] == 2
    assert open_run(tmp_path / "run").criterion().statistics.count.sum() < 2 * config.batch_size + 1
    # A resumed run has its own weights: the other run is not read any more.
    gone = dataclasses.replace(config, transfer=str(tmp_path / "gone"), steps=3)
    with pytest.raises(RunError, match="transfer was"):
        train(gone, out=tmp_path / "run", resume=True, progress=False)
    trained_run_moved = tmp_path / "moved"
    trained_run_moved.symlink_to(trained_run)
    config = dataclasses.replace(config, transfer=str(trained_run_moved))
    train(config, out=tmp_path / "other", progress=False)
    trained_run_moved.unlink()
    resumed = train(dataclasses.replace(config, steps=3), out=tmp_path / "other", resume=True, progress=False)
    assert resumed.metrics[-1]["step"] == 3


def test_tensors_of_another_shape_start_as_without_and_are_named(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(trained_run, class_conditional=False, layers_per_block=2)
    train(config, out=tmp_path / "run")
    told = capsys.readouterr().err
    assert "; initialised anew: network." in told
    plain = train(dataclasses.replace(config, transfer=None), progress=False).denoiser.state_dict()
    source, state = load_checkpoint(trained_run)["ema"], load_checkpoint(tmp_path / "run")["ema"]
    copied = [name for name, value in state.items() if name in source and source[name].shape == value.shape]
    assert 0 < len(copied) < len(state)
    assert f"{len(copied)} of {len(state)} tensors" in told
    for name, value in state.items():
        expected = source[name] if name in copied else plain[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-20)  # a bias of 0 moves even by so low a rate


def test_a_run_of_another_kind_or_none_is_refused(trained_run: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"process": "flow", "prediction": "auto"}, r"whose process is edm, expected flow.*--process edm"),
        ({"model": "edm2"}, "whose model is unet, expected edm2"),
        ({"transfer": str(tmp_path)}, "is not a run directory"),
    ):
        with pytest.raises(RunError, match=message):
            train(config_of(trained_run, **changes), progress=False)
