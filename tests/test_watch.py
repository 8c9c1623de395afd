"""vadiff.watch: when a criterion warns of wrong noise levels and of a head that nobody trains."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
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


def test_a_copy_watches_by_itself() -> None:
    criterion = vadiff.DiffusionLoss("constant")
    call(criterion, uniform, 150)
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert other.state_dict().keys() == criterion.state_dict().keys()
        assert not said(functools.partial(call, other, uniform, 100))
        assert len(said(functools.partial(call, other, uniform, 100))) == 1


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
    count = torch.zeros(128, dtype=torch.float64)
    count[64:68] = 250.0
    statistics = SimpleNamespace(
        state=SimpleNamespace(device=torch.device("cuda")),
        count=count,
        outside=count.new_zeros(2),
        bins=Bins(128, -16.0, 16.0),
    )
    criterion: Any = SimpleNamespace(
        statistics=statistics, weighting=vadiff.weighting.Constant(), _last_log_snr=torch.tensor([0.05, 0.95])
    )
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
    (warning,) = train_learned(450, None)
    assert "has not changed in 200 calls: no optimizer trains it" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_head_that_is_trained_is_not(options: dict[str, bool]) -> None:
    assert not train_learned(250, torch.optim.AdamW, lr=1e-6, **options)


def test_a_head_that_is_frozen_on_purpose_is_not() -> None:
    criterion = vadiff.DiffusionLoss("learned")
    criterion.requires_grad_(False)
    assert not said(lambda: call(criterion, edm, 250))
