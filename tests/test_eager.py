"""The short way of a training step: what takes it, and that nothing else depends on it."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import usable
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import vadiff
from vadiff import eager

pytestmark = pytest.mark.skipif(not usable("native"), reason="the native kernels are not built")

SHAPE = (6, 3, 5, 7)
# what a call is given beside prediction, target and log-SNR
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "edm": {"coefficients": (torch.rand(6), torch.rand(6), 0.0), "base_weight": torch.rand(6)},
    "flow": {"coefficients": (1, 1.0, -1.0), "noise": torch.randn(SHAPE)},
    "target not read": {"coefficients": (1.0, 0.0, torch.rand(6)), "noise": torch.randn(SHAPE)},
    "noise not read": {"coefficients": (2.0, -1.0, 0), "noise": torch.full(SHAPE, torch.nan)},
    "sample left out": {"sample_weight": torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 3.0])},
    "mixed dtypes": {"coefficients": (1.0, 1.0, -1.0), "noise": torch.randn(SHAPE, dtype=torch.bfloat16)},
    "poisoned": {"base_weight": torch.tensor([1.0, 2.0, torch.inf, 1.0, 0.5, 3.0])},
}
WEIGHTINGS = ["variance_aware", "loss_level", "constant", "min_snr"]


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    prediction = torch.randn(SHAPE, dtype=dtype, requires_grad=True)
    return prediction, torch.randn(SHAPE), 4 * torch.randn(SHAPE[0])


def of_a_network(prediction: Tensor) -> Tensor:
    return prediction * 1.0


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call that asked for the short way, whether it was taken."""
    ways: list[bool] = []
    step = eager.step

    def watched(*arguments: Any) -> Any:
        found = step(*arguments)
        ways.append(found is not None)
        return found

    monkeypatch.setattr(eager, "step", watched)
    return ways


@pytest.fixture(params=["exchange", "attributes"])
def asked(request: pytest.FixtureRequest) -> Iterator[str]:
    """How the compiled module learns of a tensor: from DLPack's functions, or, with an older torch, its attributes."""
    native = eager._native()
    assert native is not None
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None) if request.param == "exchange" else None
    if request.param == "exchange" and table is None:
        pytest.skip("this torch has no DLPack exchange API")
    by_exchange = eager.introduce(native._native, native.settings_of, 0, lambda device: False, lambda device: 0, table)
    assert by_exchange == (request.param == "exchange")
    yield request.param
    eager._native.cache_clear()
    eager._native()


@pytest.mark.parametrize("kernels", ["native", "native-cuda"], indirect=True)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_both_ways_compute_the_same_bits(
    options: dict[str, Any],
    dtype: torch.dtype,
    weighting: str,
    make_criterion: Callable[..., vadiff.DiffusionLoss],
    device: torch.device,
    taken: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = make_criterion(weighting, bins=8, loss="huber", huber_delta=0.7)
    long = copy.deepcopy(short)
    options = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, options)
    for upstream in (1.0, 0.3):
        prediction, target, log_snr = (x.detach().to(device) for x in batch(dtype))
        prediction.requires_grad_()
        results = []
        for criterion in (short, long):
            with monkeypatch.context() as patched:
                if criterion is long:
                    patched.setattr(eager, "_native", lambda: None)
                loss = criterion(of_a_network(prediction), target, log_snr, **options)
            (gradient,) = torch.autograd.grad(loss, prediction, torch.tensor(upstream, device=device))
            assert criterion.per_sample_loss is not None
            results.append((loss, gradient, criterion.per_sample_loss, *criterion.statistics.buffers()))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert taken == [True, False, True, False]


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return function(*arguments, **(options or {}))


class Marked(Tensor):
    """A subclass, with rules of its own."""


def strided(x: Tensor) -> Tensor:
    return x.transpose(1, 3).contiguous().transpose(1, 3)


def negated(x: Tensor) -> Tensor:
    """x, as a lazy negation."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


OTHERWISE: dict[str, Callable[[dict[str, Any]], None]] = {
    "prediction without gradient": lambda call: call.update(prediction=call["prediction"].detach()),
    "prediction with strides": lambda call: call.update(prediction=strided(call["prediction"])),
    "prediction in float64": lambda call: call.update(prediction=call["prediction"].double()),
    "prediction in float16": lambda call: call.update(prediction=call["prediction"].half()),
    "prediction of a subclass": lambda call: call.update(prediction=call["prediction"].as_subclass(Marked)),
    "target with strides": lambda call: call.update(target=strided(call["target"])),
    "target lazily negated": lambda call: call.update(target=negated(call["target"])),
    "log-SNR in float64": lambda call: call.update(log_snr=call["log_snr"].double()),
    "log-SNR with strides": lambda call: call.update(log_snr=torch.stack([call["log_snr"]] * 2, 1)[:, 0]),
    "base weight with gradient": lambda call: call.update(base_weight=torch.ones(6, requires_grad=True)),
    "sample weight in bfloat16": lambda call: call.update(sample_weight=torch.ones(6, dtype=torch.bfloat16)),
    "coefficient a NumPy number": lambda call: call.update(coefficients=(torch.ones(()).numpy()[()], -1.0, 0.0)),
    "coefficients in a list": lambda call: call.update(coefficients=[1.0, -1.0, 0.0]),
    "seventeen dimensions": lambda call: call.update(
        prediction=call["prediction"].view(6, *[1] * 15, -1), target=call["target"].view(6, *[1] * 15, -1)
    ),
}


@pytest.mark.parametrize("change", OTHERWISE.values(), ids=OTHERWISE)
def test_what_is_not_plain_takes_the_long_way(
    change: Callable[[dict[str, Any]], None], asked: str, taken: list[bool]
) -> None:
    prediction, target, log_snr = batch()
    plain: dict[str, Any] = {"prediction": of_a_network(prediction), "target": target, "log_snr": log_snr}
    other = dict(plain)
    change(other)
    losses = [vadiff.DiffusionLoss()(**call) for call in (plain, other)]
    assert taken == [True, False]
    torch.testing.assert_close(losses[1].float().as_subclass(Tensor), losses[0], rtol=2e-3, atol=0)


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_tensors_say_the_same_whichever_way_they_are_asked(
    options: dict[str, Any], asked: str, taken: list[bool]
) -> None:
    criterion = vadiff.DiffusionLoss("constant")
    prediction, target, log_snr = batch()
    found = criterion(of_a_network(prediction), target, log_snr, **options)
    (gradient,) = torch.autograd.grad(found, prediction, torch.tensor(0.3))
    assert taken == [True]
    reference = vadiff.DiffusionLoss("constant", backend="reference")
    expected = reference(of_a_network(prediction), target, log_snr, **options)
    torch.testing.assert_close(found, expected, equal_nan=True)
    (expected,) = torch.autograd.grad(expected, prediction, torch.tensor(0.3))
    torch.testing.assert_close(gradient, expected, equal_nan=True)


@pytest.mark.parametrize("device", ["meta", "sparse"])
def test_what_has_no_memory_to_read_gets_the_long_way_s_error(device: str, asked: str) -> None:
    prediction, target, log_snr = batch()
    target = target.to_sparse() if device == "sparse" else target.to(device)
    with pytest.raises((TypeError, ValueError), match=r"^target "):
        vadiff.DiffusionLoss()(of_a_network(prediction), target, log_snr)


class Replacing(TorchFunctionMode):
    """Makes something else of what is allocated."""

    def __init__(self, replace: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.replace = replace

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        found = function(*arguments, **(options or {}))
        return self.replace(found) if function is torch.empty_like else found


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "subclass": lambda x: x.as_subclass(Marked), "meta": lambda x: x.to("meta"), "float64": lambda x: x.double(),
    "too short": lambda x: x.flatten()[:1], "strides": lambda x: strided(x) if x.dim() else x,
}  # fmt: skip


@pytest.mark.parametrize("replace", MADE.values(), ids=MADE)
def test_memory_that_is_not_what_was_asked_for_is_not_written_to(
    replace: Callable[[Tensor], Tensor], asked: str, taken: list[bool]
) -> None:
    prediction, target, log_snr = batch()
    criterion = vadiff.DiffusionLoss()
    with Replacing(replace), contextlib.suppress(RuntimeError):  # the long way may fail on it, as any code of torch
        criterion(of_a_network(prediction), target, log_snr)
    assert taken == [False]


def test_the_table_of_this_torch_is_used() -> None:
    native = eager._native()
    assert native is not None
    assert eager.introduce(native._native, native.settings_of, 0, lambda device: False, lambda device: 0) == hasattr(
        Tensor, "__dlpack_c_exchange_api__"
    )
    eager._native.cache_clear()


def test_who_watches_sees_the_operators(taken: list[bool]) -> None:
    criterion, (prediction, target, log_snr) = vadiff.DiffusionLoss(), batch()
    with Watching():
        criterion(of_a_network(prediction), target, log_snr)
    loss = criterion(of_a_network(prediction), target, log_snr)
    with torch.profiler.profile() as profile:
        criterion(of_a_network(prediction), target, log_snr)
        loss.backward()
    assert taken == [False, True, False]
    assert {"vadiff::diffusion_loss", "vadiff::scale_gradient_"} <= {event.name for event in profile.events()}


@pytest.mark.parametrize("variable", ["", "auto", "native", "reference"])
@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_the_backend_that_was_asked_for_runs(
    variable: str, backend: str, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VADIFF_BACKEND", variable)
    prediction, target, log_snr = batch()
    vadiff.DiffusionLoss(backend=backend)(of_a_network(prediction), target, log_snr)
    assert taken == [backend == "native" or (backend == "auto" and variable != "reference")]


def test_a_step_that_records_nothing_takes_the_long_way(taken: list[bool]) -> None:
    criterion, (prediction, target, log_snr) = vadiff.DiffusionLoss(), batch()
    criterion.eval()(of_a_network(prediction), target, log_snr).backward()
    with torch.no_grad():
        criterion.train()(prediction, target, log_snr)
    assert not any(taken)
    assert criterion.statistics.count.sum() == 0


def test_a_backward_that_may_be_followed_by_another_leaves_the_gradient_alone(taken: list[bool]) -> None:
    prediction, target, log_snr = batch()
    loss = vadiff.DiffusionLoss()(of_a_network(prediction), target, log_snr)
    gradients = [
        torch.autograd.grad(loss, prediction, torch.tensor(upstream), retain_graph=True)[0] for upstream in (3.0, 1.0)
    ]
    torch.testing.assert_close(gradients[0], 3 * gradients[1], rtol=1e-6, atol=0)
    (again,) = torch.autograd.grad(loss, prediction, create_graph=True)
    torch.testing.assert_close(again, gradients[1], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        again.square().sum().backward()
    assert taken == [True]


def test_a_weighting_of_ones_own_is_looked_at_before_it_is_believed(taken: list[bool]) -> None:
    class Odd(vadiff.weighting.FixedWeighting):
        def __call__(self, log_snr: Tensor) -> Tensor:
            return torch.ones(2)

    prediction, target, log_snr = batch()
    with pytest.raises(ValueError, match=r"weighting\(log_snr\) has shape"):
        vadiff.DiffusionLoss(Odd())(of_a_network(prediction), target, log_snr)
    assert not taken


def test_settings_that_change_between_steps_are_seen(taken: list[bool]) -> None:
    short, long = vadiff.DiffusionLoss(half_life=2.0), vadiff.DiffusionLoss(half_life=2.0, backend="reference")
    for half_life, weighting in ((2.0, "variance_aware"), (0.5, "variance_aware"), (0.5, "loss_level")):
        for criterion in (short, long):
            criterion.statistics.half_life = half_life
            criterion.weighting = vadiff.weighting.from_name(weighting)
        for _ in range(2):
            prediction, target, log_snr = batch()
            losses = [criterion(of_a_network(prediction), target, log_snr) for criterion in (short, long)]
            torch.testing.assert_close(*losses)
    assert taken == 6 * [True, False]
    torch.testing.assert_close(short.weights, long.weights)


def test_an_interface_called_with_other_arguments_says_so() -> None:
    native = eager._native()
    assert native is not None
    with pytest.raises(TypeError, match="expected 16 arguments"):
        native._native.direct_step(1, 2)


@pytest.mark.parametrize(
    ("attribute", "value", "error", "message"),
    [
        ("backend", b"auto", ValueError, "backend is b'auto', expected one of"),
        ("huber_delta", "wide", TypeError, "must be real number, not str"),
    ],
)
def test_an_attribute_of_the_wrong_type_is_an_error(
    attribute: str, value: object, error: type[Exception], message: str
) -> None:
    criterion, (prediction, target, log_snr) = vadiff.DiffusionLoss(loss="huber"), batch()
    setattr(criterion, attribute, value)
    with pytest.raises(error, match=message):
        criterion(of_a_network(prediction), target, log_snr)
    assert criterion.statistics.count.sum() == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", ["cast", "other bins", "short table"])
def test_statistics_that_do_not_hold_the_bits_of_their_bins_are_refused(change: str, training: bool) -> None:
    criterion, (prediction, target, log_snr) = vadiff.DiffusionLoss(bins=8), batch()
    if change == "cast":
        criterion.type(torch.float64)
    elif change == "other bins":
        criterion.statistics.bins = criterion.statistics.bins._replace(size=1024)
    else:
        criterion.statistics.log_weights = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="the criterion's statistics are torch"):
        criterion.train(training)(of_a_network(prediction), target, log_snr)


def test_a_weighting_is_asked_once_whichever_way_is_taken(taken: list[bool]) -> None:
    class Counting(vadiff.weighting.FixedWeighting):
        asked = 0

        def __call__(self, log_snr: Tensor) -> Tensor:
            self.asked += 1
            return torch.ones_like(log_snr)

    weighting = Counting()
    criterion, (prediction, target, log_snr) = vadiff.DiffusionLoss(weighting), batch()
    criterion(of_a_network(prediction), target, log_snr)
    criterion(of_a_network(prediction).double(), target, log_snr)
    assert taken == [True, False]
    assert weighting.asked == 2


def test_coefficients_too_small_for_float32_are_not_zero() -> None:
    prediction, target, log_snr = batch()
    with pytest.raises(ValueError, match="noise is None"):
        vadiff.DiffusionLoss()(of_a_network(prediction), target, log_snr, coefficients=(1.0, -1.0, 1e-60))
    infinite = torch.full(SHAPE, torch.inf)
    loss = vadiff.DiffusionLoss()(of_a_network(prediction), infinite, log_snr, coefficients=(1.0, 1e-60, 0.0))
    assert loss.isnan()


class Stopping(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> None:
        return None


def test_no_gradient_of_the_loss_is_none_of_the_prediction(taken: list[bool]) -> None:
    prediction, target, log_snr = batch()
    Stopping.apply(vadiff.DiffusionLoss()(of_a_network(prediction), target, log_snr)).backward()
    assert taken == [True]
    assert prediction.grad is None


def test_an_upstream_gradient_without_memory_is_zero() -> None:
    prediction, target, log_snr = batch()
    loss = vadiff.DiffusionLoss()(of_a_network(prediction), target, log_snr)
    (gradient,) = torch.autograd.grad(loss, prediction, torch._efficientzerotensor(()))
    assert torch.equal(gradient, torch.zeros(SHAPE))


def test_what_a_hook_on_saved_tensors_gives_back_is_looked_at() -> None:
    prediction, target, log_snr = batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.bfloat16(), lambda x: x):
        loss = vadiff.DiffusionLoss("constant")(of_a_network(prediction), target, log_snr)
    (gradient,) = torch.autograd.grad(loss, prediction, torch.tensor(2.0))
    expected = 4 * (prediction - target).detach() / prediction.numel()
    torch.testing.assert_close(gradient, expected, rtol=2**-7, atol=0)


def test_per_sample_losses_that_were_read_stay_as_they_were(taken: list[bool]) -> None:
    criterion, (prediction, target, log_snr) = vadiff.DiffusionLoss(), batch()
    criterion(of_a_network(prediction), target, log_snr)
    read = criterion.per_sample_loss
    assert read is not None
    torch.testing.assert_close(read, (prediction - target).square().flatten(1).mean(1).detach())
    before = read.clone()
    criterion(of_a_network(prediction) * 2, target, log_snr)
    assert torch.equal(read, before)
    read.zero_()
    again = criterion.per_sample_loss
    assert again is not None
    assert again.min() > 0
    criterion(of_a_network(prediction[:2]), target[:2], log_snr[:2])
    shorter = criterion.per_sample_loss
    assert shorter is not None
    assert shorter.shape == (2,)
    assert copy.deepcopy(criterion).per_sample_loss is None
    assert taken == [True] * 3


def test_threads_may_call_one_criterion_with_batches_that_grow() -> None:
    """Their statistics mix; memory does not."""

    def train(criterion: vadiff.DiffusionLoss, samples: int, read: list[Tensor]) -> None:
        size = float(samples % 2 + 1)
        for part in range(samples // 4, samples, samples // 40):
            prediction = torch.full((part, 4), size, requires_grad=True)
            criterion(prediction * 1.0, torch.zeros(part, 4), torch.zeros(part)).backward()
            found = criterion.per_sample_loss
            assert found is not None
            read.append(found)

    for _ in range(10):
        criterion, read = vadiff.DiffusionLoss("min_snr"), list[Tensor]()
        threads = [threading.Thread(target=train, args=(criterion, samples, read)) for samples in (3000, 30_001)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(found.unique().tolist() in ([1.0], [4.0]) for found in read)


def test_what_is_read_is_a_tensor_like_any_other(taken: list[bool]) -> None:
    criterion, (prediction, target, log_snr) = vadiff.DiffusionLoss(), batch()
    criterion(of_a_network(prediction), target, log_snr)
    with torch.inference_mode():
        read = criterion.per_sample_loss
    assert read is not None
    assert read is criterion.per_sample_loss
    assert not read.is_inference()
    criterion.per_sample_loss = None
    criterion(of_a_network(prediction), target, log_snr)
    contents = copy.deepcopy(criterion.__dict__)
    assert contents["_last"] is not criterion._last
    assert taken == [True, True]


def test_a_weighting_in_float64_is_converted_and_asked_once(taken: list[bool]) -> None:
    class Doubles(vadiff.weighting.FixedWeighting):
        asked = 0

        def __call__(self, log_snr: Tensor) -> Tensor:
            self.asked += 1
            return torch.full_like(log_snr, 2.0, dtype=torch.float64)

    weighting, (prediction, target, log_snr) = Doubles(), batch()
    loss = vadiff.DiffusionLoss(weighting)(of_a_network(prediction), target, log_snr)
    torch.testing.assert_close(loss, 2 * (prediction - target).square().mean())
    assert (weighting.asked, taken) == (1, [True])


@pytest.mark.parametrize("keeps", [True, False])
def test_a_hook_that_makes_saved_tensors_double_is_refused(keeps: bool) -> None:
    prediction, target, log_snr = batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.double(), lambda x: x):
        loss = vadiff.DiffusionLoss()(of_a_network(prediction), target, log_snr)
    with pytest.raises(TypeError, match=r"float32.* expected dense torch\.float64"):
        torch.autograd.grad(loss, prediction, torch.tensor(2.0), retain_graph=keeps)


def test_a_process_group_is_seen_wherever_torch_keeps_it(taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    class World:
        default_pg = "a group"

    criterion, (prediction, target, log_snr) = vadiff.DiffusionLoss(), batch()
    criterion(of_a_network(prediction), target, log_snr)
    with monkeypatch.context() as patched:
        patched.setattr(torch.distributed.distributed_c10d, "_world", World())
        patched.setattr(torch.distributed, "get_world_size", lambda: 1)
        criterion(of_a_network(prediction), target, log_snr)
    with monkeypatch.context() as patched:
        patched.setattr(eager, "_c10d", SimpleNamespace(_world=eager._NoWorld()))
        criterion(of_a_network(prediction), target, log_snr)
        patched.setattr(torch.distributed, "is_initialized", lambda: True)
        patched.setattr(torch.distributed, "get_world_size", lambda: 1)
        criterion(of_a_network(prediction), target, log_snr)
    assert taken == [True, False, True, False]


def test_a_subclass_decides_what_is_recorded() -> None:
    class Still(vadiff.DiffusionLoss):
        def _records(self) -> bool:
            return False

    criterion, (prediction, target, log_snr) = Still(), batch()
    criterion(of_a_network(prediction), target, log_snr)
    assert criterion.statistics.count.sum() == 0
