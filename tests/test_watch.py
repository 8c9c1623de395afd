"""vadiff.watch: when a criterion warns of wrong noise levels and of a head that nobody trains."""

from __future__ import annotations

import copy
import functools
import importlib
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vadiff
from vadiff.errors import DiffusionLossWarning
from vadiff.ops.problem import Bins
from vadiff.watch import Watch

Draw = Callable[[int, torch.Generator], Tensor]  # number of samples → log-SNR


def uniform(n: int, g: torch.Generator) -> Tensor:
    """Times from 0 to 1: no log-SNR."""
    return torch.rand(n, generator=g)


def edm(n: int, g: torch.Generator) -> Tensor:
    return 2.4 + 2.4 * torch.randn(n, generator=g)


def call(criterion: vadiff.DiffusionLoss, draw: Draw, calls: int, batch: int = 32) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(batch, 3, requires_grad=True), torch.zeros(batch, 3)
    for _ in range(calls):
        criterion(prediction, target, draw(batch, generator))


def said(function: Callable[[], object]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function()
    return [warning for warning in found if warning.category is DiffusionLossWarning]


def test_a_criterion_warns_once_at_its_200th_call_where_the_user_called_it() -> None:
    criterion = vadiff.DiffusionLoss("constant")
    assert not said(lambda: call(criterion, uniform, 199))
    (warning,) = said(lambda: call(criterion, uniform, 1))
    assert "[0, 1]" in str(warning.message)
    assert warning.filename == __file__
    assert not said(lambda: call(criterion, uniform, 300))
    assert not said(criterion.summary)


def test_timesteps_in_place_of_log_snr_are_named_as_such() -> None:
    criterion = vadiff.DiffusionLoss.for_process("stable_diffusion", fine_tuning=True)

    def timesteps(n: int, g: torch.Generator) -> Tensor:
        return torch.randint(1000, (n,), generator=g).float()

    (warning,) = said(lambda: call(criterion, timesteps, 200, 4))
    assert "log_snr looks like timesteps" in str(warning.message)
    assert "log_snr_of(scheduler, timesteps)" in str(warning.message)


def test_reweight_and_weights_of_the_batch_s_losses_are_watched_too() -> None:
    for criterion in (vadiff.DiffusionLoss("constant"), vadiff.DiffusionLoss("loss_zscore")):
        generator = torch.Generator().manual_seed(0)

        def train(criterion: vadiff.DiffusionLoss = criterion, generator: torch.Generator = generator) -> None:
            for _ in range(200):
                criterion.reweight(torch.rand(32, requires_grad=True), uniform(32, generator))

        assert len(said(train)) == 1


def test_a_mistake_that_shows_later_is_found_later() -> None:
    criterion = vadiff.DiffusionLoss("constant", half_life=16.0)
    assert not said(lambda: call(criterion, edm, 300))
    assert len(said(lambda: call(criterion, uniform, 1400))) == 1


@pytest.mark.parametrize(
    "read", [lambda c: c.summary(), lambda c: c.log_to(lambda values, step: None, 0)], ids=["summary", "log_to"]
)
def test_a_read_warns_at_once(read: Callable[[vadiff.DiffusionLoss], object]) -> None:
    criterion = vadiff.DiffusionLoss("constant")
    call(criterion, uniform, 40)
    (warning,) = said(lambda: read(criterion))
    assert warning.filename == __file__
    assert not said(lambda: read(criterion))


def test_a_right_criterion_says_nothing() -> None:
    criterion = vadiff.DiffusionLoss.for_process("edm")
    assert not said(lambda: call(criterion, edm, 450))
    assert not said(criterion.summary)


def copies(criterion: vadiff.DiffusionLoss) -> tuple[vadiff.DiffusionLoss, vadiff.DiffusionLoss]:
    return copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))


def test_a_copy_watches_by_itself() -> None:
    criterion = vadiff.DiffusionLoss("constant")
    call(criterion, uniform, 150)
    for other in copies(criterion):
        assert other.state_dict().keys() == criterion.state_dict().keys()
        assert not said(functools.partial(call, other, uniform, 100))
        assert len(said(functools.partial(call, other, uniform, 100))) == 1


def test_a_copy_does_not_say_again_what_was_said() -> None:
    criterion = vadiff.DiffusionLoss("constant")
    assert said(lambda: call(criterion, uniform, 200))
    for other in copies(criterion):
        assert not said(functools.partial(call, other, uniform, 500))
        assert not said(other.summary)


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_warns(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    criterion = vadiff.DiffusionLoss("constant", sync=False)
    found = said(lambda: call(criterion, uniform, 210))
    monkeypatch.undo()
    assert len(found) == (1 if rank == 0 else 0)


def test_calls_without_recording_are_not_counted() -> None:
    criterion = vadiff.DiffusionLoss("constant")
    call(criterion, uniform, 150)
    with torch.no_grad():
        assert not said(lambda: call(criterion, uniform, 300))
    assert len(said(lambda: call(criterion, uniform, 50))) == 1


def test_weights_of_the_batch_s_losses_count_each_call_once() -> None:
    criterion = vadiff.DiffusionLoss("loss_zscore")
    assert not said(lambda: call(criterion, uniform, 199))
    assert len(said(lambda: call(criterion, uniform, 1))) == 1


def given_times(device: str) -> Any:
    """A stand-in for a criterion on that device that was given flow times as log-SNR."""
    count = torch.zeros(128, dtype=torch.float64)
    count[64:68] = 250.0
    statistics = SimpleNamespace(
        state=SimpleNamespace(device=torch.device(device)),
        count=count,
        outside=count.new_zeros(2),
        bins=Bins(128, -16.0, 16.0),
    )
    return SimpleNamespace(
        statistics=statistics, weighting=vadiff.weighting.Constant(), _last_log_snr=torch.tensor([0.05, 0.95])
    )


def test_a_device_without_streams_is_looked_at_too() -> None:
    criterion = given_times("mps")
    watch = Watch()

    def run() -> None:
        for _ in range(200):
            watch.left -= 1
            if watch.left == 0:
                watch.look(criterion)

    assert len(said(run)) == 1


def test_a_package_whose_name_begins_like_vadiff_s_is_the_user_s() -> None:
    watch = importlib.import_module("vadiff.watch")
    beside = str(Path(vadiff.__file__).parent) + "_trainer" + os.sep + "loop.py"
    assert not beside.startswith(watch._INTERNAL)
    assert str(Path(vadiff.__file__)).startswith(watch._INTERNAL)


def test_compiled_calls_are_judged_when_they_are_read() -> None:
    criterion = vadiff.DiffusionLoss("constant")
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(32, 3, requires_grad=True), torch.zeros(32, 3)

    def train() -> None:
        for _ in range(210):
            compiled(prediction, target, uniform(32, generator))

    assert not said(train)
    assert len(said(criterion.summary)) == 1


def test_a_gpu_is_looked_at_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a CUDA stream: the copy begins at the 200th call, and is judged once its event has come."""
    arrived = False
    event = SimpleNamespace(query=lambda: arrived)
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=lambda: event))
    criterion = given_times("cuda")
    watch = Watch()

    def calls(number: int) -> int:
        def run() -> None:
            for _ in range(number):
                watch.left -= 1
                if watch.left == 0:
                    watch.look(criterion)

        return len(said(run))

    assert calls(500) == 0  # all of them captured
    capturing = False
    assert calls(500) == 0  # the event does not come
    arrived = True
    assert calls(32) == 1


# The head of a learned weighting


def train_learned(calls: int, optimizer: Callable[..., Any] | None, **options: Any) -> list[warnings.WarningMessage]:
    criterion = vadiff.DiffusionLoss("learned")
    prediction, target = torch.randn(8, 3, requires_grad=True), torch.zeros(8, 3)
    made = optimizer(criterion.parameters(), **options) if optimizer else None
    generator = torch.Generator().manual_seed(0)

    def train() -> None:
        for _ in range(calls):
            criterion(prediction, target, edm(8, generator)).backward()
            if made is not None:
                made.step()

    return said(train)


def test_a_head_that_no_optimizer_trains_is_named() -> None:
    """Its gradient stays, as if it were accumulated: only after 1,000 calls nobody will use it."""
    assert not train_learned(990, None)
    (warning,) = train_learned(1050, None)
    assert "has not changed in 1,000 calls: no optimizer trains it" in str(warning.message)
    assert warning.filename == __file__


def test_a_head_whose_gradient_is_thrown_away_is_named_sooner() -> None:
    criterion = vadiff.DiffusionLoss("learned")
    prediction, target = torch.randn(8, 3, requires_grad=True), torch.zeros(8, 3)

    def train() -> None:
        for _ in range(200):
            criterion.zero_grad()
            criterion(prediction, target, torch.randn(8)).backward()

    (warning,) = said(train)
    assert "has not changed in 200 calls" in str(warning.message)


def test_a_head_is_not_named_for_calls_that_train_nothing() -> None:
    """Evaluation before the training, and gradients accumulated over 256 calls."""
    criterion = vadiff.DiffusionLoss("learned")
    optimizer = torch.optim.AdamW(criterion.parameters(), lr=1e-3)
    prediction, target = torch.randn(8, 3, requires_grad=True), torch.zeros(8, 3)

    def train() -> None:
        criterion.eval()
        for _ in range(210):
            criterion(prediction, target, torch.randn(8))
        criterion.train()
        with torch.no_grad():
            for _ in range(210):
                criterion(prediction, target, torch.randn(8))
        for call in range(1, 1100):
            criterion(prediction, target, torch.randn(8)).backward()
            if call % 256 == 0:
                optimizer.step()
                optimizer.zero_grad()

    assert not said(train)


@pytest.mark.parametrize("trained", [True, False])
def test_a_head_in_compiled_steps_is_judged_at_reads(trained: bool) -> None:
    criterion = vadiff.DiffusionLoss("learned", bins=8)  # as many samples as are remembered, after 1,000 calls
    optimizer = torch.optim.AdamW(criterion.parameters(), lr=1e-3)
    step = torch.compile(criterion, fullgraph=True, backend="eager")
    prediction, target = torch.randn(4, 3, requires_grad=True), torch.zeros(4, 3)

    def train() -> None:
        for call in range(1, 1201):
            step(prediction, target, torch.randn(4)).backward()
            if trained:
                optimizer.step()
            if call % 100 == 0:
                criterion.summary()

    found = said(train)
    assert len(found) == (0 if trained else 1)
    assert trained or "has not changed in 10 reads of the statistics" in str(found[0].message)


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_head_that_is_trained_is_not(options: dict[str, bool]) -> None:
    assert not train_learned(250, torch.optim.AdamW, lr=1e-6, **options)


def test_a_head_that_is_frozen_on_purpose_is_not() -> None:
    criterion = vadiff.DiffusionLoss("learned")
    criterion.requires_grad_(False)
    assert not said(lambda: call(criterion, edm, 250))
