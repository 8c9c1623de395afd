"""Calls that look alike are checked once: which calls those are, and that every other one is checked."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import warnings
import weakref
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import vadiff
from vadiff.ops import _torch, backends, reference
from vadiff.ops import plan as plans
from vadiff.ops.problem import make_inputs
from vadiff.weighting import FixedWeighting

SHAPE = (4, 3, 5, 6)
Make = Callable[..., vadiff.DiffusionLoss]


def arguments(device: torch.device | str = "cpu") -> dict[str, Any]:
    """All that `DiffusionLoss.forward` takes."""
    return {
        "prediction": torch.randn(SHAPE, device=device).requires_grad_(),
        "target": torch.randn(SHAPE, device=device),
        "log_snr": torch.randn(4, device=device),
        "noise": torch.randn(SHAPE, device=device),
        "coefficients": (1.0, torch.rand(4, device=device), -0.5),
        "base_weight": torch.rand(4, device=device) + 0.5,
        "sample_weight": torch.rand(4, device=device) + 0.5,
        "reduction": "mean",
    }


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each call whose arguments were checked."""
    made: list[int] = []
    make_inputs = plans.make_inputs

    def counted(*given: Any) -> Any:
        made.append(1)
        return make_inputs(*given)

    monkeypatch.setattr(plans, "make_inputs", counted)
    return made


CHANGES: dict[str, dict[str, Callable[[Any], Any]]] = {
    "nothing": {},
    "prediction of another dtype": {"prediction": lambda x: x.detach().bfloat16().requires_grad_()},
    "prediction without gradient": {"prediction": lambda x: x.detach()},
    "all channels_last": dict.fromkeys(
        ("prediction", "target", "noise"), lambda x: x.detach().to(memory_format=torch.channels_last)
    ),
    "target of another dtype": {"target": lambda x: x.half()},
    "target with gaps": {"target": lambda x: x.repeat_interleave(2, dim=3)[..., ::2]},
    "no noise": {"noise": lambda x: None, "coefficients": lambda x: None},
    "other numbers": {"coefficients": lambda x: (0.5, x[1], 2.0)},
    "numbers in place of tensors": {"coefficients": lambda x: (1.0, -2.0, -0.5)},
    "tensors in place of numbers": {"coefficients": lambda x: (x[1], 3.0, x[1] + 1)},
    "log_snr of another dtype": {"log_snr": lambda x: x.double()},
    "no base_weight": {"base_weight": lambda x: None},
    "base_weight with gradient": {"base_weight": lambda x: x.clone().requires_grad_()},
    "base_weight with gaps": {"base_weight": lambda x: x.repeat_interleave(2)[::2]},
    "no sample_weight": {"sample_weight": lambda x: None},
    "no reduction": {"reduction": lambda x: "none"},
    "fewer samples": {
        **dict.fromkeys(("target", "log_snr", "noise", "base_weight", "sample_weight"), lambda x: x[:3]),
        "prediction": lambda x: x[:3].detach().requires_grad_(),
        "coefficients": lambda x: (x[0], x[1][:3], x[2]),
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_after_one_that_looked_otherwise_is_as_the_first(
    make_criterion: Make, device: torch.device, interpreted: bool, change: str
) -> None:
    """Calls of one criterion, twice each way, against criteria with the same statistics that check every call."""
    criterion = make_criterion()
    for changes in [CHANGES[change]] * 2 if interpreted else ({}, {}, CHANGES[change], CHANGES[change], {}):
        given = arguments(device)
        for name, change_of in changes.items():
            given[name] = change_of(given[name])
        fresh = copy.deepcopy(criterion)
        fresh.__dict__["_plans"] = SimpleNamespace(inputs=lambda problem, state, *others: make_inputs(*others))
        results = []
        for one in (criterion, fresh):
            loss = one(**given)
            leaves = [given[name] for name in ("prediction", "base_weight") if getattr(given[name], "requires_grad", 0)]
            results.append([loss, *(torch.autograd.grad(loss.sum(), leaves) if leaves else [])])
            results[-1] += [one.per_sample_loss, *one.statistics.buffers()]
        for mine, theirs in zip(*results, strict=True):
            assert torch.equal(mine, theirs)


def test_only_the_first_of_calls_that_look_alike_is_checked(make_criterion: Make, checked: list[int]) -> None:
    criterion = make_criterion()
    for _ in range(3):
        criterion(**arguments(criterion.statistics.state.device))
    assert len(checked) == 1
    for coefficients in ((0.5, 2.0, 2.0), (0.25, -2, 1.0), [0.5, -1.0, -3.0]):
        criterion(**{**arguments(criterion.statistics.state.device), "coefficients": coefficients})
    assert len(checked) == 2
    criterion(**arguments(criterion.statistics.state.device))
    assert len(checked) == 2


def test_each_of_many_kinds_of_calls_is_checked_once(checked: list[int]) -> None:
    criterion = vadiff.DiffusionLoss(bins=8)
    for _ in range(2):
        for samples in range(1, 65):
            criterion(torch.randn(samples, 2), torch.randn(samples, 2), torch.randn(samples))
    assert len(checked) == 64


def test_a_torch_that_cannot_compare_tensors_gets_every_call_checked(
    make_criterion: Make, checked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, unplanned = make_criterion(), make_criterion()
    given = [arguments(planned.statistics.state.device) for _ in range(3)]
    losses = [planned(**each) for each in given]
    assert len(checked) == 1

    def other(*tensors: Tensor) -> None:  # without the keywords of today's function
        raise AssertionError("not called")

    for substitute in (other, _torch._private("_no_such_name", lambda *_, **__: None)):
        monkeypatch.setattr(_torch, "_guards", substitute)
        del checked[:]
        unplanned.statistics.reset()
        for each, loss in zip(given, losses, strict=True):
            assert torch.equal(unplanned(**each), loss)
        assert len(checked) == 3
        assert not unplanned._plans._plans
    for mine, theirs in zip(planned.statistics.buffers(), unplanned.statistics.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_call_with_one_tensor_twice_is_checked_each_time(make_criterion: Make, checked: list[int]) -> None:
    criterion = make_criterion()
    for _ in range(3):
        given, other = arguments(criterion.statistics.state.device), copy.deepcopy(criterion)
        weight = given["base_weight"]
        loss = criterion(**{**given, "sample_weight": weight})
        assert torch.equal(loss, other(**{**given, "sample_weight": weight.clone()}))
    assert not criterion._plans._plans
    assert len(checked) == 6


def test_data_of_ever_other_shapes_leave_no_more_than_some_plans() -> None:
    criterion = vadiff.DiffusionLoss(bins=8)
    for samples in range(1, 200):
        criterion(torch.randn(samples, 2), torch.randn(samples, 2), torch.randn(samples))
    assert 0 < len(criterion._plans._plans) <= 64


def nested(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in prototype stage"
        return torch.nested.nested_tensor(list(tensor.detach()))


BAD: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "prediction is no tensor": ("prediction", lambda x: x.tolist(), "prediction is a list"),
    "prediction is integer": ("prediction", lambda x: x.detach().long(), "prediction has dtype"),
    "target is sparse": ("target", lambda x: x.to_sparse(), "target has layout"),
    "prediction is nested": ("prediction", nested, "prediction has layout nested"),
    "target is nested": ("target", nested, "target has layout nested"),
    "noise is nested": ("noise", nested, "noise has layout nested"),
    "a coefficient is nested": ("coefficients", lambda x: (1.0, nested(x[1]), -0.5), "b has layout nested"),
    "sample_weight is nested": ("sample_weight", nested, "sample_weight has layout nested"),
    "target on meta": ("target", lambda x: x.to("meta"), "target is on meta"),
    "target with gradient": ("target", lambda x: x.requires_grad_(), "target requires grad"),
    "target of another shape": ("target", lambda x: x[:, :2], "target has shape"),
    "log_snr of another shape": ("log_snr", lambda x: x[:, None], "log_snr has shape"),
    "log_snr is a number": ("log_snr", lambda x: 1.0, "log_snr is a float"),
    "noise is missing": ("noise", lambda x: None, "noise is None"),
    "coefficients are none": ("coefficients", lambda x: (), "coefficients is 0 values"),
    "coefficients are two": ("coefficients", lambda x: x[:2], "coefficients is 2 values"),
    "a coefficient is a bool": ("coefficients", lambda x: (True, *x[1:]), "coefficients a is a bool"),
    "coefficients are one tensor": ("coefficients", lambda x: x[1], "coefficients is Tensor"),
    "base_weight of another shape": ("base_weight", lambda x: x[:1], "base_weight has shape"),
    "sample_weight with gradient": ("sample_weight", lambda x: x.requires_grad_(), "sample_weight requires grad"),
    "unknown reduction": ("reduction", lambda x: "sum", "reduction is 'sum'"),
    "reduction is no name": ("reduction", lambda x: ["mean"], "reduction is \\['mean'\\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_call_after_good_ones_is_refused(case: str) -> None:
    name, spoil, message = BAD[case]
    criterion = vadiff.DiffusionLoss(bins=8)
    for _ in range(2):
        criterion(**arguments())
        criterion(*list(arguments().values())[:3])
    before = criterion.statistics.state.clone()
    given = arguments()
    if case == "coefficients are none":
        given = {"prediction": given["prediction"], "target": given["target"], "log_snr": given["log_snr"]}
    with pytest.raises((TypeError, ValueError), match=message):
        criterion(**{**given, name: spoil(given.get(name))})
    assert torch.equal(criterion.statistics.state, before)
    criterion(**arguments())


def test_whether_a_number_is_0_is_looked_at_in_each_call(make_criterion: Make) -> None:
    criterion = make_criterion().eval()
    given = arguments(criterion.statistics.state.device)
    for _ in range(2):
        criterion(**{**given, "coefficients": (1.0, -1.0, -0.5)})
        criterion(**{**given, "coefficients": (1.0, -1.0, 0.0), "noise": None})
    nothing = {**given, "coefficients": (1.0, -1.0, 0.0), "noise": torch.full_like(given["noise"], torch.nan)}
    assert criterion(**nothing).isfinite()  # what has the coefficient 0 is not read
    with pytest.raises(ValueError, match="noise is None"):
        criterion(**{**given, "coefficients": (1.0, -1.0, -0.5), "noise": None})


def test_tensors_that_kernels_cannot_read_as_they_are_are_found_after_others(make_criterion: Make) -> None:
    criterion = make_criterion()
    device = criterion.statistics.state.device
    given = arguments(device)
    criterion(**given)

    class Subclass(Tensor):
        pass

    negated = torch._neg_view(-given["target"])
    assert negated.is_neg()
    criterion.eval()
    expected = criterion(**given)
    for lazy in (negated, given["target"].as_subclass(Subclass)):
        assert torch.equal(torch.as_tensor(criterion(**{**given, "target": lazy})).as_subclass(Tensor), expected)
    zero = torch.zeros(SHAPE, device=device)
    expected = criterion(**{**given, "target": zero})
    assert torch.equal(criterion(**{**given, "target": torch._efficientzerotensor(SHAPE, device=device)}), expected)


def test_an_observer_that_comes_later_sees_the_operators() -> None:
    criterion = vadiff.DiffusionLoss(bins=8)
    for _ in range(2):
        criterion(**arguments()).backward()
    with torch.profiler.profile() as profile:
        loss = criterion(**arguments())
    assert "vadiff::diffusion_loss" in {event.name for event in profile.events()}
    loss.backward()
    given = arguments()
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda x: criterion(**{**given, "prediction": x}))(torch.randn(SHAPE))
    with torch.inference_mode():
        criterion.eval()(**{**arguments(), "base_weight": None})
    given = {**arguments(), "base_weight": torch.ones(4).requires_grad_(), "prediction": torch.randn(SHAPE)}
    criterion.train()(**given).backward()  # what was prepared in inference mode takes part in no graph
    assert given["base_weight"].grad is not None


@pytest.mark.filterwarnings("ignore::UserWarning")  # of what the criterion keeps of its last call
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_the_operator_after_eager_calls_too(strict: bool) -> None:
    class Trained(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.criterion = torch.nn.Linear(6, 6), vadiff.DiffusionLoss(bins=8)

        def forward(self, x: Tensor, target: Tensor, log_snr: Tensor) -> Tensor:
            loss: Tensor = self.criterion(self.linear(x), target, log_snr)
            return loss

    trained, given = Trained(), (torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(4))
    for _ in range(2):
        trained(*given)
    exported = torch.export.export(trained, given, strict=strict)
    graphs = [each.graph for each in exported.graph_module.modules() if isinstance(each, torch.fx.GraphModule)]
    assert torch.ops.vadiff.diffusion_loss.default in [node.target for graph in graphs for node in graph.nodes]


def test_a_backward_in_a_mode_of_fake_tensors_reads_no_number() -> None:
    criterion = vadiff.DiffusionLoss(bins=8)
    for _ in range(2):
        criterion(**arguments()).backward()
    real = arguments()
    loss = criterion(**real)
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = arguments()
        criterion(**given).backward()
        criterion(**arguments()).backward(torch.tensor(1.0))
        loss.backward(torch.tensor(1.0))
    assert given["prediction"].grad.shape == SHAPE


def test_a_traced_backward_has_the_operator() -> None:
    criterion = vadiff.DiffusionLoss(bins=8)
    for _ in range(2):
        criterion(**arguments()).backward()
    criterion.eval()

    def gradient(x: Tensor, target: Tensor, log_snr: Tensor, upstream: Tensor) -> Tensor:
        return torch.autograd.grad(criterion(x, target, log_snr), x, upstream)[0]

    given = list(arguments().values())[:3]
    traced = make_fx(gradient, tracing_mode="real")(*given, torch.tensor(1.0))
    assert torch.ops.vadiff.scale_gradient_.default in [node.target for node in traced.graph.nodes]
    torch.testing.assert_close(traced(*given, torch.tensor(2.0)), 2 * traced(*given, torch.tensor(1.0)))


def test_a_criterion_keeps_no_argument_and_copies_take_no_plan() -> None:
    criterion = vadiff.DiffusionLoss(bins=8)
    given = arguments()
    gone = [weakref.ref(given[name]) for name in ("prediction", "target", "noise", "base_weight", "sample_weight")]
    criterion(**given).backward()
    assert criterion._plans._plans
    del given
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert not other._plans._plans
        other(**arguments())


def test_what_is_reassigned_is_not_hidden_by_the_plan(make_criterion: Make) -> None:
    class Own(FixedWeighting):
        def __call__(self, log_snr: Tensor) -> Tensor:
            return torch._neg_view(torch.full_like(log_snr, -3.0))

    criterion = make_criterion("constant").eval()
    given = arguments(criterion.statistics.state.device)
    expected = criterion(**given)
    criterion.weighting = Own()
    torch.testing.assert_close(criterion(**given), 3 * expected)
    criterion.weighting = "constant"
    criterion.loss, criterion.huber_delta = "huber", 1e3
    torch.testing.assert_close(criterion(**given), expected / 2)
    criterion.backend = "reference"
    torch.testing.assert_close(criterion(**given), expected / 2)


def test_the_environment_variable_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = vadiff.DiffusionLoss(bins=8)
    monkeypatch.delenv("VADIFF_BACKEND", raising=False)
    used: list[str] = []

    def select(backend: str, tensor: Tensor) -> Any:
        used.append(os.environ.get("VADIFF_BACKEND", backend))
        return reference

    monkeypatch.setattr(backends, "select", select)
    for value in ("", "native", "reference", ""):
        monkeypatch.setenv("VADIFF_BACKEND", value) if value else monkeypatch.delenv("VADIFF_BACKEND", raising=False)
        for _ in range(2):
            criterion(**arguments())
    assert used == ["auto", "native", "reference"]  # each once, and the first again without asking


@pytest.mark.parametrize("form", [numpy.float64, numpy.float32, Fraction])
def test_numbers_of_other_types_are_read_at_each_call(form: Any) -> None:
    criterion, given = vadiff.DiffusionLoss(bins=8).eval(), arguments()
    for c in (0.0, -0.5, 0.0, 1.0):
        expected = criterion(**{**given, "coefficients": (1.0, -1.0, c)})
        assert torch.equal(criterion(**{**given, "coefficients": (form(1), form(-1), form(c))}), expected)
