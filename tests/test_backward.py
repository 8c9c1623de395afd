"""Both backward modes: any upstream gradient, graphs kept and not, learned base weights, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
dtypes = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["float32", "bfloat16", "float16"])
reductions = pytest.mark.parametrize("reduction", ["mean", "none"])


def numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def batch(device: torch.device, dtype: torch.dtype = FP32, shape: tuple[int, ...] = (4, 3, 5)):
    prediction = torch.randn(shape).to(device, dtype).requires_grad_()
    return prediction, torch.randn(shape).to(device, dtype), torch.randn(shape[0]).to(device)


@dtypes
@reductions
@pytest.mark.parametrize("upstream", [1.0, 0.0, 3.0, 65536.0])
def test_gradient_is_as_exact_as_eager_at_any_loss_scale(make_criterion, device, dtype, reduction, upstream):
    """At the size of fp16 latents a gradient of the plain mean is subnormal: upstream must act before rounding."""
    prediction, target, log_snr = batch(device, dtype, (2, 4, 128, 128) if dtype == FP16 else (2, 4, 32, 32))
    truth = Oracle(fixed=lambda _: 1.0).step(numpy(prediction), numpy(target), numpy(log_snr))
    truth = upstream * truth.grad_prediction
    eager = prediction.detach().clone().requires_grad_()
    (F.mse_loss(eager.float(), target.float()) * upstream).backward()
    loss = make_criterion("constant")(prediction, target, log_snr, reduction=reduction)
    ((loss if reduction == "mean" else loss.mean()) * upstream).backward()
    error, eager_error = (np.abs(numpy(x.grad) - truth) for x in (prediction, eager))
    if upstream == 3 and reduction == "mean" and dtype == BF16:
        # written in the forward, scaled in the backward: two roundings of half a unit each, by design
        assert (error <= torch.finfo(BF16).eps * np.abs(truth)).all()
    else:
        assert error.max() <= 2 * eager_error.max() + 1e-7 * np.abs(truth).max()
        assert error.mean() <= 2 * eager_error.mean() + 1e-7 * np.abs(truth).mean()
    if upstream == 0:
        assert (prediction.grad == 0).all()


@dtypes
def test_loss_scaled_gradient_keeps_its_small_values(make_criterion, device, dtype):
    """None is lost to a gradient written before the scale: zero only where the residual is."""
    prediction, target, log_snr = batch(device, dtype, (2, 4, 128, 128))
    (make_criterion("constant")(prediction, target, log_snr) * 65536).backward()
    assert torch.equal(prediction.grad == 0, prediction.detach() == target)


@dtypes
@reductions
def test_a_kept_graph_gives_the_same_gradient_again(make_criterion, device, dtype, reduction):
    prediction, target, log_snr = batch(device, dtype)
    loss = make_criterion()(prediction, target, log_snr, reduction=reduction).sum()
    (first,) = torch.autograd.grad(loss, prediction, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, prediction, retain_graph=True)
    (third,) = torch.autograd.grad(loss, prediction, torch.tensor(3.0, device=device), retain_graph=True)
    (last,) = torch.autograd.grad(loss, prediction, torch.tensor(3.0, device=device))
    assert torch.equal(first, kept)
    assert torch.equal(second, kept)
    assert torch.equal(third, last)
    torch.testing.assert_close(third, 3 * kept)


@reductions
def test_two_backwards_over_a_kept_graph_accumulate(make_criterion, device, reduction):
    prediction, target, log_snr = batch(device)
    loss = make_criterion()(prediction, target, log_snr, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    once = prediction.grad.clone()
    loss.backward()
    torch.testing.assert_close(prediction.grad, 2 * once)


@dtypes
@reductions
def test_a_second_backward_without_a_kept_graph_raises(make_criterion, device, dtype, reduction):
    prediction, target, log_snr = batch(device, dtype)
    loss = make_criterion()(prediction, target, log_snr, reduction=reduction).sum()
    loss.backward()
    once = prediction.grad.clone()
    with pytest.raises(RuntimeError, match=r"second time|retain_graph"):
        loss.backward()
    assert torch.equal(prediction.grad, once)


def test_two_losses_of_one_prediction_add_up(make_criterion, device):
    prediction, target, log_snr = batch(device)
    criterion = make_criterion("constant")
    loss = criterion(prediction, target, log_snr) + 2 * criterion(prediction, -target, log_snr)
    (grad,) = torch.autograd.grad(loss, prediction)
    expected = F.mse_loss(prediction, target) + 2 * F.mse_loss(prediction, -target)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, prediction)[0])


def test_gradients_of_accumulated_steps_add_up(make_criterion, device):
    weight = torch.randn(5, 5, device=device, requires_grad=True)
    criterion, expected = make_criterion("constant"), torch.zeros_like(weight)
    for _ in range(3):
        x, target, log_snr = batch(device)
        x = x.detach()
        (criterion(x @ weight, target, log_snr) / 3).backward()
        expected += torch.autograd.grad(F.mse_loss(x @ weight, target) / 3, weight)[0]
    torch.testing.assert_close(weight.grad, expected)


@dtypes
def test_unreduced_loss_takes_a_broadcast_upstream(make_criterion, device, dtype):
    """loss.sum().backward() sends one number expanded over the batch, stride 0."""
    prediction, target, log_snr = batch(device, dtype)
    criterion = make_criterion("constant")
    criterion(prediction, target, log_snr, reduction="none").sum().backward()
    expected = 2 * (prediction.detach().float() - target.float()) / 15
    torch.testing.assert_close(prediction.grad, expected.to(dtype))


@dtypes
@pytest.mark.parametrize("strided", [False, True])
def test_unreduced_loss_takes_any_upstream(make_criterion, device, dtype, strided):
    prediction, target, log_snr = batch(device, dtype)
    upstream = torch.tensor([0.5, 0.0, -3.0, 65536.0], device=device)
    if strided:
        upstream = torch.stack([upstream, torch.full_like(upstream, 7)], 1)[:, 0]
    make_criterion("constant")(prediction, target, log_snr, reduction="none").backward(upstream)
    expected = upstream[:, None, None] * 2 * (prediction.detach().float() - target.float()) / 15
    torch.testing.assert_close(prediction.grad, expected.to(dtype))


class LargestMade(TorchDispatchMode):
    """Elements of the largest tensor that operators return, views of the given inputs aside."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in inputs}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, x.numel())
        return out


@reductions
@pytest.mark.parametrize("case", ["needed", "prediction needs none", "no_grad"])
def test_no_gradient_is_made_when_none_is_needed(make_criterion, device, reduction, case):
    prediction, target, log_snr = batch(device, shape=(4, 500))
    prediction = prediction.detach().requires_grad_(case != "prediction needs none")
    criterion, made = make_criterion(), LargestMade(prediction, target)
    with torch.set_grad_enabled(case != "no_grad"), made:
        loss = criterion(prediction, target, log_snr, reduction=reduction).sum()
        if case == "needed":
            loss.backward()
    assert loss.requires_grad == (case == "needed")
    assert (made.elements >= 2000) == (case == "needed")


@reductions
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["float32", "float16"])
@pytest.mark.parametrize("needs_prediction", [True, False])
def test_learned_base_weight_gets_its_gradient(make_criterion, rng, device, dtype, needs_prediction, reduction):
    prediction, target, log_snr = batch(device, dtype)
    prediction = prediction.detach().requires_grad_(needs_prediction)
    level = torch.randn(4, device=device, requires_grad=True)
    v = torch.rand(4, device=device)
    loss = make_criterion("constant")(
        prediction, target, log_snr, base_weight=level.exp(), sample_weight=v, reduction=reduction
    )
    (3 * (loss if reduction == "mean" else loss.mean()) + level.mean()).backward()
    residual = numpy(prediction) - numpy(target)
    expected = 0.25 + 0.75 * np.exp(numpy(level)) * numpy(v) * (residual**2).mean((1, 2))
    np.testing.assert_allclose(numpy(level.grad), expected, rtol=1e-5)
    assert (prediction.grad is not None) == needs_prediction


def test_learned_base_weight_trains_to_the_inverse_of_the_loss(make_criterion, device):
    """u·ℓ − ln u is least at u = 1/ℓ: EDM2's learned uncertainty."""
    criterion = make_criterion("constant").eval()
    level = torch.zeros(3, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([level], lr=0.5)
    prediction = torch.tensor([[0.5], [1.0], [2.0]], device=device)
    for _ in range(25):
        optimizer.zero_grad()
        loss = criterion(
            prediction, torch.zeros_like(prediction), torch.zeros(3, device=device), base_weight=level.exp()
        )
        (3 * loss - level.sum()).backward()
        optimizer.step()
    torch.testing.assert_close(level.exp(), prediction[:, 0] ** -2, rtol=1e-2, atol=0)


@dtypes
@reductions
def test_a_second_differentiation_raises(make_criterion, device, dtype, reduction):
    prediction, target, log_snr = batch(device, dtype)
    loss = make_criterion()(prediction, target, log_snr, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, prediction, create_graph=True)
    penalised = loss + grad.float().square().sum()  # whose penalty must not vanish in silence
    with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
        penalised.backward()


@dtypes
@reductions
def test_a_gradient_made_with_create_graph_is_right(make_criterion, device, dtype, reduction):
    prediction, target, log_snr = batch(device, dtype)
    criterion = make_criterion()
    loss = criterion(prediction, target, log_snr, reduction=reduction).sum()
    (plain,) = torch.autograd.grad(loss, prediction, retain_graph=True)
    (graphed,) = torch.autograd.grad(loss, prediction, create_graph=True)
    assert torch.equal(plain, graphed)


@dtypes
@reductions
def test_what_is_returned_may_be_changed_in_place(make_criterion, device, dtype, reduction):
    prediction, target, log_snr = batch(device, dtype)
    criterion = make_criterion("constant")
    expected = torch.autograd.grad(criterion(prediction, target, log_snr, reduction=reduction).sum() / 4, prediction)
    loss = criterion(prediction, target, log_snr, reduction=reduction)
    criterion.per_sample_loss.zero_()
    loss /= 4
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), prediction), expected)


def test_transforms_of_torch_func_and_forward_mode_are_refused(make_criterion, device):
    prediction, target, log_snr = batch(device)
    criterion = make_criterion()
    for transform in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))):
        with pytest.raises(RuntimeError, match="no rule for"):
            transform(lambda x: criterion(x, target, log_snr))(prediction.detach())
    assert criterion.statistics.count.sum() == 0


def test_a_backward_makes_nothing_but_the_gradient(make_criterion, device):
    prediction, target, log_snr = batch(device)
    loss = make_criterion()(prediction, target, log_snr)
    upstream = torch.ones((), device=device)
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with Record():
        torch.autograd.grad(loss, prediction, upstream)
    of_no_size = ("aten.detach.default", "aten.new_zeros.default")  # a view; one number
    assert [call for call in calls if call not in of_no_size] == ["vadiff.scale_gradient_.default"]


@reductions
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_call_raises_and_says_where_the_criterion_belongs(
    make_criterion, device, use_reentrant, reduction
):
    prediction, target, log_snr = batch(device)
    criterion = make_criterion()

    def run(x: torch.Tensor) -> torch.Tensor:
        return criterion(x * 2, target, log_snr, reduction=reduction).sum()

    loss = checkpoint(run, prediction, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="outside"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_call_of_reweight_raises_too(make_criterion, device, use_reentrant):
    losses = torch.rand(4, device=device, requires_grad=True)
    criterion = make_criterion()

    def run(x: torch.Tensor) -> torch.Tensor:
        return criterion.reweight(x * 2, torch.zeros(4, device=device)).sum()

    loss = checkpoint(run, losses, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="outside"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_model_with_the_criterion_outside_works(make_criterion, device, use_reentrant):
    prediction, target, log_snr = batch(device)
    out = checkpoint(lambda x: x * 2, prediction, use_reentrant=use_reentrant)
    make_criterion("constant")(out, target, log_snr).backward()
    expected = F.mse_loss(2 * prediction, target)
    torch.testing.assert_close(prediction.grad, torch.autograd.grad(expected, prediction)[0])


@dtypes
@reductions
def test_inputs_are_never_modified(make_criterion, device, dtype, reduction):
    prediction, target, log_snr = batch(device, dtype)
    given = {
        "prediction": prediction,
        "target": target,
        "log_snr": log_snr,
        "noise": torch.randn(4, 3, 5).to(device, dtype),
        "base_weight": torch.rand(4, device=device),
        "sample_weight": torch.rand(4, device=device),
        "a": torch.rand(4, device=device),
        "upstream": torch.tensor(3.0, device=device) if reduction == "mean" else torch.rand(4, device=device),
    }
    before = {name: value.detach().clone() for name, value in given.items()}
    loss = make_criterion()(
        prediction,
        target,
        log_snr,
        noise=given["noise"],
        coefficients=(given["a"], -1.0, 0.5),
        base_weight=given["base_weight"],
        sample_weight=given["sample_weight"],
        reduction=reduction,
    )
    loss.backward(given["upstream"])
    for name, value in given.items():
        assert torch.equal(value.detach(), before[name]), name


def test_the_loss_of_an_earlier_step_is_not_overwritten(make_criterion, device):
    criterion = make_criterion()
    losses, logged = [], []
    for _ in range(3):
        losses.append(criterion(*batch(device)))
        logged.append(criterion.per_sample_loss)
        losses.append(criterion(*batch(device), reduction="none"))
    copies = [x.detach().clone() for x in losses + logged]
    losses[0].backward()
    criterion(*batch(device)).backward()
    for x, copy in zip(losses + logged, copies, strict=True):
        assert torch.equal(x, copy)
