"""The way of a call from `DiffusionLoss.forward` to a kernel, and the contract's types."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vadiff
from vadiff.ops import operators
from vadiff.ops.problem import Inputs, Problem, State, make_inputs
from vadiff.weighting import FixedWeighting, LearnedUncertainty, LossLevel, MinSNR

SHAPE = (6, 3, 5, 7)
Make = Callable[..., vadiff.DiffusionLoss]


def batch(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Prediction that requires grad, target, log-SNR."""
    prediction = torch.randn(SHAPE).to(device).requires_grad_()
    return prediction, torch.randn(SHAPE).to(device), (4 * torch.randn(SHAPE[0])).to(device)


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_call_through_the_dispatcher_computes_the_same_bits(
    make_criterion: Make, device: torch.device, dtype: torch.dtype, reduction: str
) -> None:
    criterion = make_criterion(loss="huber", huber_delta=0.7)
    other = copy.deepcopy(criterion)
    for upstream in (1.0, 0.3):
        prediction, target, log_snr = batch(device)
        prediction = prediction.detach().to(dtype).requires_grad_()
        results = []
        for one in (criterion, other):
            call = {"noise": target.flip(0), "coefficients": (1.0, torch.rand(6).to(device) * 0 + 0.5, -1.0)}
            if one is other:
                with Watching() as watching:
                    loss = one(prediction, target, log_snr, **call, reduction=reduction).sum()
                    (gradient,) = torch.autograd.grad(loss, prediction, torch.tensor(upstream, device=device))
                assert "vadiff.diffusion_loss.default" in watching.seen
            else:
                loss = one(prediction, target, log_snr, **call, reduction=reduction).sum()
                (gradient,) = torch.autograd.grad(loss, prediction, torch.tensor(upstream, device=device))
            results.append((loss, gradient, one.per_sample_loss, *one.statistics.buffers()))
        for mine, theirs in zip(*results, strict=True):
            assert torch.equal(mine, theirs)


def test_the_profiler_sees_the_operators() -> None:
    criterion, (prediction, target, log_snr) = vadiff.DiffusionLoss(), batch()
    with torch.profiler.profile() as profile:
        (2 * criterion(prediction, target, log_snr)).backward()
    assert {"vadiff::diffusion_loss", "vadiff::scale_gradient_"} <= {event.name for event in profile.events()}


def test_a_plain_call_does_not_pass_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(operators, "_flat", lambda *arguments: called.append(arguments))
    prediction, target, log_snr = batch()
    vadiff.DiffusionLoss()(prediction, target, log_snr).backward()
    assert prediction.grad is not None
    assert not called


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last, torch.channels_last_3d], ids=str)
def test_tensors_of_one_dense_layout_reach_the_kernels_without_a_copy(layout: torch.memory_format) -> None:
    shape = (2, 3, 4, 5, 6) if layout is torch.channels_last_3d else (2, 3, 4, 5)
    tensors = [torch.randn(shape).to(memory_format=layout) for _ in range(3)]
    inputs = make_inputs(tensors[0], tensors[1], torch.zeros(2), tensors[2], (1.0, 1.0, -1.0), None, None, "mean")
    found = operators.one_layout(inputs)
    assert [x is y for x, y in zip((found.prediction, found.target, found.noise), tensors, strict=True)] == [True] * 3


# Attributes that a call is made of


@dataclass
class Tabled(FixedWeighting):
    """One's own weighting that cannot be compared."""

    table: Tensor

    def __call__(self, log_snr: Tensor) -> Tensor:
        return self.table


def test_what_is_reassigned_takes_effect_at_the_next_call(make_criterion: Make, device: torch.device) -> None:
    criterion = make_criterion("constant", loss="huber", huber_delta=100.0, half_life=2.0).eval()
    prediction, target, log_snr = batch(device)
    huber = torch.nn.functional.huber_loss
    torch.testing.assert_close(criterion(prediction, target, log_snr), huber(prediction, target, delta=100.0))
    criterion.huber_delta = 0.25
    torch.testing.assert_close(criterion(prediction, target, log_snr), huber(prediction, target, delta=0.25))
    criterion.loss = "mse"
    mse = (prediction - target).square().flatten(1).mean(1)
    torch.testing.assert_close(criterion(prediction, target, log_snr), mse.mean())
    criterion.weighting = MinSNR()
    torch.testing.assert_close(criterion(prediction, target, log_snr), (MinSNR()(log_snr) * mse).mean())
    criterion.weighting = LearnedUncertainty(8)
    assert [name for name, _ in criterion.named_parameters()] == ["weighting.weight"]
    torch.testing.assert_close(criterion(prediction, target, log_snr), mse.mean())
    criterion.weighting = LossLevel(prior=1e-3)
    assert list(criterion.parameters()) == []
    criterion.train()(prediction, target, log_snr)
    assert criterion.weights.max() > criterion.weights.min()
    before = criterion.statistics.count.sum()
    criterion.weighting = Tabled(torch.ones(6, device=device))
    criterion.weighting = Tabled(torch.full((6,), 2.0, device=device))
    torch.testing.assert_close(criterion.eval()(prediction, target, log_snr), 2 * mse.mean())
    criterion.train().statistics.half_life = 1e-3
    criterion(prediction, target, log_snr)
    assert criterion.statistics.count.sum() < 0.6 * 2 * before


def test_weights_of_a_reassigned_weighting_are_there_before_the_next_call(
    make_criterion: Make, device: torch.device
) -> None:
    first, second = make_criterion("constant"), make_criterion("loss_level")
    prediction, target, log_snr = batch(device)
    for criterion in (first, second):
        for _ in range(3):
            criterion(prediction, target, log_snr)
    first.weighting = "loss_level"
    assert first.weights.max() > 1.01 * first.weights.min()
    torch.testing.assert_close(first.weights, second.weights)
    torch.testing.assert_close(first.eval()(prediction, target, log_snr), second.eval()(prediction, target, log_snr))


def test_a_backend_that_is_reassigned_runs_the_next_call() -> None:
    criterion, (prediction, target, log_snr) = vadiff.DiffusionLoss(backend="reference"), batch()
    criterion(prediction, target, log_snr)
    criterion.backend = "triton"
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this call"):
        criterion(prediction.double(), target, log_snr)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("backend", b"auto", "backend is b'auto', expected one of"),
        ("huber_delta", "wide", "huber_delta is 'wide', expected a positive finite number"),
        ("huber_delta", 0.0, "huber_delta is 0.0, expected a positive finite number"),
        ("weighting", "snr_min", "weighting is 'snr_min', expected one of"),
        ("loss", "l1", "loss is 'l1', expected one of mse, huber"),
    ],
)
def test_an_attribute_out_of_bounds_is_refused_where_it_is_assigned(
    attribute: str, value: object, message: str
) -> None:
    criterion = vadiff.DiffusionLoss(MinSNR(), loss="huber")
    before = repr(criterion)
    with pytest.raises(ValueError, match=message):
        setattr(criterion, attribute, value)
    assert repr(criterion) == before


def test_no_collective_runs_after_sync_was_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = []

    def all_gather(everyone: Tensor, batch: Tensor) -> None:
        gathered.append(batch.shape)
        everyone.copy_(batch.repeat(2))

    distributed = SimpleNamespace(all_gather_single=all_gather)
    monkeypatch.setattr(operators, "dist", distributed)
    monkeypatch.setattr(operators, "default_group", object)
    monkeypatch.setattr(operators, "number_of_ranks", lambda: 2)
    criterion, (prediction, target, log_snr) = vadiff.DiffusionLoss(bins=8), batch()
    criterion(prediction, target, log_snr)
    assert gathered == [(4 * 8 + 5,)]
    assert criterion.statistics.count.sum() == pytest.approx(12, rel=0.1)
    criterion.eval()(prediction, target, log_snr)
    criterion.train().sync = False
    criterion(prediction, target, log_snr)
    assert len(gathered) == 1


# Copies and other users of the same types


def test_a_copy_of_a_criterion_that_was_called_goes_on_by_itself(make_criterion: Make, device: torch.device) -> None:
    criterion = make_criterion()
    criterion(*batch(device))
    copies = [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    data = batch(device)
    expected = criterion(*data)
    for other in copies:
        assert other.per_sample_loss is None
        assert torch.equal(other(*data), expected)
        assert torch.equal(other.statistics.state, criterion.statistics.state)


def test_a_criterion_that_was_moved_takes_no_tensor_of_the_other_device_along() -> None:
    criterion = vadiff.DiffusionLoss("learned")
    criterion(*batch())
    moved = pickle.loads(pickle.dumps(copy.deepcopy(criterion).to("meta")))
    found = [*moved.__dict__.values(), *moved.statistics.__dict__.values()]
    tensors = [x for x in tree_leaves([*found, *moved.state_dict().values()]) if isinstance(x, Tensor)]
    assert {x.device.type for x in tensors} == {"meta"}


def test_the_contract_s_types_can_be_copied_and_pickled() -> None:
    criterion, (prediction, target, log_snr) = vadiff.DiffusionLoss(bins=8), batch()
    problem = criterion._current_problem(criterion.statistics)
    inputs = make_inputs(prediction.detach(), target, log_snr, None, None, None, torch.ones(6), "none")
    state = criterion.statistics.checked_state("prediction", prediction)
    for made, kind in ((problem, Problem), (inputs, Inputs), (state, State)):
        for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert type(other) is kind
            for mine, theirs in zip(made, other, strict=True):
                assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs


def test_threads_that_share_a_criterion_in_eval_mode_get_their_own_losses() -> None:
    criterion, found, expected = vadiff.DiffusionLoss(MinSNR()).eval(), {}, {}
    batches = {number: [x.detach() for x in batch()] for number in range(4)}
    for number, one in batches.items():
        expected[number] = criterion(*one)

    def run(number: int) -> None:
        for _ in range(20):
            found[number] = criterion(*batches[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], expected[number]) for number in batches)


# What a call is given by others


def test_a_weighting_of_one_s_own_is_checked_and_called_once(make_criterion: Make, device: torch.device) -> None:
    class Odd(FixedWeighting):
        called, size = 0, 6

        def __call__(self, log_snr: Tensor) -> Tensor:
            self.called += 1
            return torch.full((self.size,), 2.0, dtype=torch.float64, device=log_snr.device)

    weighting, (prediction, target, log_snr) = Odd(), batch(device)
    criterion = make_criterion(weighting)
    loss = criterion(prediction, target, log_snr)
    torch.testing.assert_close(loss, 2 * (prediction - target).square().mean())
    assert weighting.called == 1
    weighting.size = 2
    with pytest.raises(ValueError, match=r"weighting\(log_snr\) has shape"):
        criterion(prediction, target, log_snr)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", ["cast", "other bins", "short table", "other data", "no memory", "table elsewhere"])
def test_statistics_that_do_not_hold_the_bits_of_their_bins_are_refused(change: str, training: bool) -> None:
    criterion, (prediction, target, log_snr) = vadiff.DiffusionLoss(bins=8), batch()
    criterion(prediction, target, log_snr)
    if change == "other data":
        criterion.statistics.state.data = torch.zeros(3, dtype=torch.int64)
    elif change == "cast":
        criterion.type(torch.float64)
    elif change == "other bins":
        criterion.statistics.bins = criterion.statistics.bins._replace(size=1024)
    elif change == "short table":
        criterion.statistics.log_weights = torch.zeros(2, dtype=torch.int32)
    error: tuple[type[Exception], str] = (RuntimeError, "the criterion's statistics are torch")
    if change == "no memory":
        criterion.statistics.log_weights.untyped_storage().resize_(0)
        error = (TypeError, r"statistics.log_weights \(8,\) has no memory")
    elif change == "table elsewhere":
        criterion.statistics.log_weights = criterion.statistics.log_weights.to("meta")
        error = (ValueError, "prediction is on cpu, but the criterion is on meta. Use criterion.to")
    with pytest.raises(error[0], match=error[1]):
        criterion.train(training)(prediction, target, log_snr)


def test_coefficients_too_small_for_float32_are_not_zero(
    make_criterion: Make, device: torch.device, interpreted: bool
) -> None:
    prediction, target, log_snr = batch(device)
    criterion = make_criterion()
    with pytest.raises(ValueError, match="noise is None"):
        criterion(prediction, target, log_snr, coefficients=(1.0, -1.0, 1e-60))
    if interpreted:
        pytest.skip("Triton's interpreter keeps numbers in float64")
    infinite = torch.full(SHAPE, torch.inf, device=device)
    assert criterion(prediction, infinite, log_snr, coefficients=(1.0, 1e-60, 0.0)).isnan()  # 0 · inf in float32


class Stopping(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> None:
        return None


def test_no_upstream_gradient_gives_no_gradient(make_criterion: Make, device: torch.device) -> None:
    prediction, target, log_snr = batch(device)
    Stopping.apply(make_criterion()(prediction, target, log_snr)).backward()
    assert prediction.grad is None


def test_an_upstream_gradient_without_memory_is_zero() -> None:
    prediction, target, log_snr = batch()
    loss = vadiff.DiffusionLoss()(prediction, target, log_snr)
    (gradient,) = torch.autograd.grad(loss, prediction, torch._efficientzerotensor(()))
    assert torch.equal(gradient, torch.zeros(SHAPE))


def test_a_gradient_that_a_hook_on_saved_tensors_has_cast_is_scaled_as_it_is(
    make_criterion: Make, device: torch.device
) -> None:
    prediction, target, log_snr = batch(device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.bfloat16(), lambda x: x):
        loss = make_criterion("constant")(prediction, target, log_snr)
    (gradient,) = torch.autograd.grad(loss, prediction, torch.tensor(2.0, device=device))
    expected = 4 * (prediction - target).detach() / prediction.numel()
    torch.testing.assert_close(gradient, expected, rtol=2**-7, atol=0)


def test_per_sample_losses_that_were_read_stay_as_they_were(make_criterion: Make, device: torch.device) -> None:
    criterion, (prediction, target, log_snr) = make_criterion(), batch(device)
    assert criterion.per_sample_loss is None
    criterion(prediction, target, log_snr)
    read = criterion.per_sample_loss
    assert read is not None
    torch.testing.assert_close(read, (prediction - target).square().flatten(1).mean(1).detach())
    before = read.clone()
    criterion(prediction * 2, target, log_snr)
    assert torch.equal(read, before)
    read.zero_()
    again = criterion.per_sample_loss
    assert again is not None
    assert again.min() > 0
