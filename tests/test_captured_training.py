"""Training with captured steps equals training without, with a stand-in for CUDA graphs on the CPU."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graph_stand_in import Captures, Tape, captures  # noqa: F401 (a fixture)

from vadiff.errors import TrainingError
from vadiff.targets import PosteriorMean
from vadiff.trainer.training import captured
from vadiff.trainer.training.checkpoint import load_checkpoint
from vadiff.trainer.training.optimisation import LateReading
from vadiff.trainer.training.step import compile_mode
from vadiff.trainer.training.streams import ShuffledIndices
from vadiff.training import PRESETS, TrainConfig, edm_objective, train

STEPS = captured.WARM_UP + 5
CONFIG = TrainConfig(
    model="edm2", steps=STEPS, batch_size=16, channels=(8, 16), log_every=2, held_out_images=20, held_out_levels=2,
    tensorboard=False, device="cpu", checkpoint_every=100, deterministic=True, warmup=4,
)  # fmt: skip
PARTS = ("model", "ema", "criterion", "levels", "totals")


def flat(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {}
    for part in PARTS:
        values = state[part] if isinstance(state[part], dict) else {"": state[part]}
        found.update({f"{part}.{name}": value for name, value in values.items()})
    for index, values in state["optimizer"]["state"].items():
        found.update({f"optimizer.{index}.{name}": value for name, value in values.items()})
    return found


def assert_same_runs(one: Path, other: Path) -> None:
    first, second = load_checkpoint(one), load_checkpoint(other)
    assert first["step"] == second["step"]
    assert first["optimizer"]["param_groups"] == second["optimizer"]["param_groups"]
    torch.testing.assert_close(flat(first), flat(second), rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model": "unet", "norm_groups": 4, "flips": True, "class_conditional": True, "clip": 0.5},
        {"accumulate": 2, "stratified": True, "antithetic": True},
        {"process": "vp_linear", "prediction": "v_prediction", "zero_terminal_snr": True, "ema_rampup": 0.05},
        {"dropout": 0.2, "weighting": "learned", "sigma_rel": (0.05, 0.1)},
        {"levels": "second_moment", "levels_every": 1, "schedule": "cosine"},
        {"levels": "information", "levels_every": 1, "stratified_epoch": True, "accumulate": 2, "shift": 2.0},
        {"levels": "beta", "uniform_share": 0.2, "process": "flow", "gradient_checkpointing": True},
        {"process": "flow", "precision": "bf16", "optimizer": "adamw", "weight_decay": 0.01},
        {"process": "flow", "target": "posterior_mean", "reference": 64, "flips": True},
        {"target": "posterior_mean", "reference": "all", "class_conditional": True, "levels": "information"},
    ],
    ids=str,
)
def test_captured_steps_are_the_eager_ones_to_the_bit(
    options: dict[str, Any],
    tmp_path: Path,
    captures: Captures,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PosteriorMean, "_skips", lambda *_: False)  # as on a GPU: all draws, and nothing is read
    if options.get("model") == "unet":
        pytest.importorskip("diffusers", reason="the model unet is diffusers' U-Net: pip install diffusers")
    config = dataclasses.replace(CONFIG, **options)
    eager = train(config, out=tmp_path / "eager", progress=False)
    assert captures.captured == 0
    replayed = train(dataclasses.replace(config, graph=True, compile=False), out=tmp_path / "graph", progress=False)
    assert (captures.captured, captures.replayed) == (1, STEPS - captured.WARM_UP)
    assert_same_runs(tmp_path / "eager", tmp_path / "graph")
    volatile = {"images_per_second", "seconds", "memory_bytes"}
    for one, other in zip(eager.metrics, replayed.metrics, strict=True):
        assert {k: v for k, v in one.items() if k not in volatile} == {
            k: v for k, v in other.items() if k not in volatile
        }


@pytest.mark.parametrize("graph_first", [True, False])
def test_a_run_of_one_mode_resumes_in_the_other(graph_first: bool, tmp_path: Path, captures: Captures) -> None:  # noqa: F811
    config = dataclasses.replace(CONFIG, schedule="constant", levels="second_moment")
    half = captured.WARM_UP + 2
    train(dataclasses.replace(config, steps=2 * half), out=tmp_path / "whole", progress=False)
    train(dataclasses.replace(config, steps=half, graph=graph_first), out=tmp_path / "parts", progress=False)
    other = dataclasses.replace(config, steps=2 * half, graph=not graph_first)
    train(other, out=tmp_path / "parts", resume=True, progress=False)
    assert captures.captured == 1
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x + torch.tensor(2.0),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu().numpy(),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), x),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.unique_consecutive(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.manual_seed(int(x.shape[0]) + torch.initial_seed() % 1000),
    ],
    ids=lambda work: inspect.getsource(work).strip(),
)
def test_the_stand_in_refuses_what_makes_the_host_wait(work: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.random.fork_rng(), Tape([]):
        work(torch.ones(3))


def test_the_stand_in_refuses_unknown_generators_and_new_seeds() -> None:
    known = torch.Generator().manual_seed(1)
    with pytest.raises(RuntimeError, match="generator that the graph does not know"), Tape([known]):
        torch.rand(3, generator=torch.Generator().manual_seed(1))
    with pytest.raises(RuntimeError, match="a new seed cannot be captured"), Tape([known]):
        torch.rand(3, generator=known.manual_seed(2))


def test_the_stand_in_keeps_of_the_last_replay_what_is_held() -> None:
    """Memory that nobody holds is somebody else's between replays; memory from before the graph must stay."""
    given, total, held = torch.ones(3), torch.zeros(3), []
    tape = Tape([])
    with tape:
        total += given * 2.0
        held.append(given + total)
        untouched = torch.empty(3)
        ctypes.memset(untouched.data_ptr(), 0, 12)  # unseen by the tape: whatever was in that memory, even NaN
        total += untouched.clamp(0.0, 0.0)
    del untouched
    assert torch.equal(held[0], torch.full((3,), 3.0))
    tape.replay()
    assert torch.equal(held[0], torch.full((3,), 5.0))
    assert total.isnan().all()  # what was in `untouched`
    del given
    with pytest.raises(RuntimeError, match="memory that was there before it and has been freed"):
        tape.replay()


def test_a_replay_reads_new_inputs_and_seeds() -> None:
    generator, inputs, total = torch.Generator(), torch.ones(4), torch.zeros(4)
    tape = Tape([generator])
    generator.manual_seed(1)
    with tape:
        total += (inputs.view(2, 2) * 2).flatten() + torch.rand(4, generator=generator)
    inputs.fill_(3.0)
    generator.manual_seed(2)
    tape.replay()
    expected = 8.0 + sum(torch.rand(4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    torch.testing.assert_close(total, expected)


def reading(*arguments: Any) -> torch.Tensor:
    """An objective that no graph can hold."""
    loss = edm_objective(*arguments)
    return loss / max(1.0, loss.item())


def test_steps_that_wait_for_the_device_stay_eager_and_it_is_said(
    tmp_path: Path,
    captures: Captures,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(CONFIG, reading, out=tmp_path / "eager", progress=False)
    train(dataclasses.replace(CONFIG, graph=True), reading, out=tmp_path / "graph", progress=False)
    assert captures.captured == 0
    assert_same_runs(tmp_path / "eager", tmp_path / "graph")
    said = "The steps are not captured in a CUDA graph: a step waits for the device, at _local_scalar_dense.\n"
    assert capsys.readouterr().err.count(said) == 1


def test_watched_work_is_done_once_and_its_other_warnings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    calls: list[str] = []

    def work() -> None:
        calls.append("once")
        warnings.warn("something else", UserWarning, stacklevel=1)

    def waiting() -> None:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at …)", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="something else"):
        assert captured.first_wait(work) is None
    line = inspect.getsourcelines(waiting)[1] + 1
    assert captured.first_wait(waiting) == f"{__file__}, line {line}"
    assert (calls, modes) == (["once"], ["warn", 0, "warn", 0])


def test_a_failed_capture_names_its_cause_and_the_remedy(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """torch ends the capture while an error is on its way, which raises another."""

    def failing(*_: object) -> None:
        try:
            raise ValueError("the cause")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(captured, "capture", failing)
    with pytest.raises(TrainingError, match=r"could not be captured in a CUDA graph: the cause\. .* with --no-graph"):
        train(dataclasses.replace(CONFIG, graph=True), progress=False)


@pytest.mark.parametrize("weighting", ["variance_aware", "learned"])
def test_a_finished_run_holds_no_memory_of_its_graph(weighting: str, captures: Captures) -> None:  # noqa: F811
    """Without the collector of reference cycles, and though the criterion knows the last losses."""
    config = dataclasses.replace(CONFIG, weighting=weighting)
    eager = train(config, progress=False).criterion
    gc.collect()
    gc.disable()
    try:
        criterion = train(dataclasses.replace(config, graph=True), progress=False).criterion
        assert (captures.captured, captures.allocated()) == (1, 0)
    finally:
        gc.enable()
    torch.testing.assert_close(criterion.per_sample_loss, eager.per_sample_loss, rtol=0.0, atol=0.0)
    torch.testing.assert_close(criterion.base_loss, eager.base_loss, rtol=0.0, atol=0.0)


def test_a_late_reading_is_that_of_the_call_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the event that says when the device has copied a number; a CPU is read at once."""
    number = torch.zeros((), dtype=torch.float64)
    at_once, late = LateReading(number), LateReading(number)
    log: list[object] = []
    late._copied = SimpleNamespace(synchronize=lambda: log.append("wait"), record=log.append)  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"record on {device}")
    found = []
    for step, value in ((25, 3.0), (50, 28.0), (75, 53.0)):
        number.fill_(value)
        assert at_once(step) == (value, step)
        found.append(late(step))
    assert found == [(0.0, 0), (3.0, 25), (28.0, 50)]
    assert log == ["wait", "record on cpu"] * 3


def test_a_pass_over_the_images_is_moved_to_a_gpu_without_waiting() -> None:
    moves: list[object] = []

    class Order:
        def pin_memory(self) -> Order:
            moves.append("pin")
            return self

        def to(self, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
            moves.append((device.type, non_blocking))
            return torch.arange(10)

    indices = ShuffledIndices(lambda *_: Order(), 10, 4, torch.device("cuda"))
    assert [indices.at(step).tolist() for step in (0, 1)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert moves == ["pin", ("cuda", True)]


@pytest.mark.parametrize(
    ("device", "in_graph", "accumulate", "mode"),
    [
        ("cpu", False, 1, None),
        ("cuda", True, 1, None),
        ("cuda", False, 1, "reduce-overhead"),
        ("cuda", False, 2, None),
    ],
)
def test_a_compiler_makes_graphs_where_the_step_is_in_none(
    device: str, in_graph: bool, accumulate: int, mode: str | None
) -> None:
    config = dataclasses.replace(CONFIG, accumulate=accumulate)
    assert compile_mode(config, torch.device(device), captured=in_graph) == mode


@pytest.mark.parametrize(
    ("options", "ranks", "device", "reason"),
    [
        ({}, 1, "cuda", None),
        ({"dropout": 0.1}, 1, "cuda", None),
        ({"accumulate": 2}, 1, "cuda", None),
        ({"dropout": 0.1, "accumulate": 2}, 1, "cuda", "dropout is seeded by the host"),
        ({"gradient_checkpointing": True}, 1, "cuda", None),
        ({"dropout": 0.1, "gradient_checkpointing": True}, 1, "cuda", "state of dropout's random numbers"),
        ({"precision": "fp16"}, 1, "cuda", "precision is fp16"),
        ({}, 2, "cuda", "2 processes"),
        ({}, 1, "cpu", "the device is cpu"),
    ],
)
def test_what_does_not_fit_in_a_graph_is_said(
    options: dict[str, Any], ranks: int, device: str, reason: str | None
) -> None:
    found = captured.why_not_captured(dataclasses.replace(CONFIG, **options), torch.device(device), ranks)
    assert found is None if reason is None else reason in str(found)


def test_presets_for_gpus_ask_for_graphs_and_run_eagerly_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU neither a graph nor, unless it is asked for, a compiler."""
    for name, preset in PRESETS.items():
        assert preset.graph == name.startswith(("cifar", "im")), name
    compiled: list[object] = []

    def not_compiled(network: torch.nn.Module, **_: object) -> torch.nn.Module:
        compiled.append(network)
        return network

    monkeypatch.setattr(torch, "compile", not_compiled)
    monkeypatch.setattr(captured, "capture", lambda *_: pytest.fail("captured on a CPU"))
    config = dataclasses.replace(CONFIG, graph=True)
    train(config, progress=False)
    assert not compiled
    train(dataclasses.replace(config, steps=1, compile=True), progress=False)
    assert len(compiled) == 1
