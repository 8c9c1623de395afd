"""Loss and gradient of DiffusionLoss against the numpy oracle, on every backend.

One tolerance rule: the error against float64 is at most twice that of plain torch code in the same low
precision, plus 1e-6 of the largest value: what float32 ln w, its exponential and a handful of roundings cost.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle

import vadiff

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Make = Callable[..., torch.nn.Module]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
FORMS = ("pair", "floats", "v_prediction", "epsilon", "preconditioned")


@dataclass
class Inputs:
    """One batch; what is None is not passed."""

    prediction: torch.Tensor
    target: torch.Tensor
    log_snr: torch.Tensor  # [B]
    noise: torch.Tensor | None = None
    coefficients: tuple | None = None
    base_weight: torch.Tensor | None = None
    sample_weight: torch.Tensor | None = None

    def arguments(self) -> dict:
        names = ("noise", "coefficients", "base_weight", "sample_weight")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def as_numpy(self) -> dict:
        arguments = {name: value for name, value in self.arguments().items() if name != "coefficients"}
        out: dict = {name: numpy(value) for name, value in arguments.items()}
        if self.coefficients is not None:
            out["coefficients"] = tuple(numpy(x) if torch.is_tensor(x) else x for x in self.coefficients)
        return out


def numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def draw(
    device: torch.device,
    shape: tuple[int, ...] = (3, 5, 7),
    dtype: torch.dtype = FP32,
    other: torch.dtype | None = None,
    form: str = "pair",
    weights: bool = True,
) -> Inputs:
    """A batch in one of the forms that the affine residual covers."""
    batch = shape[0]
    log_snr = torch.randn(batch) * 4
    alpha, sigma = torch.sigmoid(log_snr).sqrt().to(device), torch.sigmoid(-log_snr).sqrt().to(device)
    forms: dict[str, tuple[bool, tuple | None]] = {
        "pair": (False, None),
        "floats": (True, (0.5, 0.25, -0.75)),
        "v_prediction": (True, (1.0, sigma, -alpha)),
        "epsilon": (True, (1.0, 0.0, -1.0)),
        "preconditioned": (False, (sigma, -1.5, 0.0)),
    }
    noisy, coefficients = forms[form]
    return Inputs(
        prediction=torch.randn(shape).to(device, dtype),
        target=torch.randn(shape).to(device, other or dtype),
        log_snr=log_snr.to(device),
        noise=torch.randn(shape).to(device, other or dtype) if noisy else None,
        coefficients=coefficients,
        base_weight=(0.5 + torch.rand(batch)).to(device) if weights else None,
        sample_weight=(0.5 + torch.rand(batch)).to(device) if weights else None,
    )


@functools.cache
def _warmed(backend: str, device: torch.device, **options: object) -> tuple[torch.nn.Module, Oracle]:
    bins, loss, delta = options.get("bins", 16), options.get("loss", "mse"), options.get("huber_delta", 1.0)
    rule = vadiff.weighting.VarianceAware(prior=4.0)
    settings = {"bins": bins, "log_snr_range": (-8.0, 8.0), **options}
    criterion = vadiff.DiffusionLoss(rule, backend=backend, **settings).to(device)
    oracle = Oracle(bins, -8.0, 8.0, prior=4.0, loss=loss, huber_delta=delta)
    rng = np.random.default_rng(0)
    for size in (150, 50):
        log_snr = (rng.normal(size=size) * 4).astype(np.float32)
        losses = (np.exp(-0.3 * log_snr) * rng.gamma(4.0, size=size)).astype(np.float32)
        criterion.reweight(*(torch.from_numpy(x).to(device) for x in (losses, log_snr)))
        oracle.reweight(losses, log_snr)
    assert np.ptp(oracle.log_weight) > 0.5
    return criterion, oracle


def warmed(backend: str, device: torch.device, **options: object) -> tuple[torch.nn.Module, Oracle]:
    """A criterion and an oracle that have seen the same two hundred samples: weights differ over bins."""
    return copy.deepcopy(_warmed(backend, device, **options))


def plain(inputs: Inputs, weight: np.ndarray, oracle: Oracle) -> tuple[np.ndarray, np.ndarray]:
    """What one writes by hand, in the inputs' own precision: weighted [B] losses, gradient of their mean."""
    prediction = inputs.prediction.detach().requires_grad_()
    batch = len(prediction)

    def per_sample(x: object) -> torch.Tensor:
        x = torch.as_tensor(x, device=prediction.device).to(prediction.dtype)
        return x.expand(batch).reshape(-1, *[1] * (prediction.ndim - 1))

    a, b, c = (per_sample(x) for x in inputs.coefficients or (1.0, -1.0, 0.0))
    residual = a * prediction + b * inputs.target
    if inputs.noise is not None:
        residual = residual + c * inputs.noise
    if oracle.loss == "mse":
        elements = residual.square()
    else:
        elements = F.huber_loss(residual, torch.zeros_like(residual), reduction="none", delta=oracle.huber_delta)
    losses = elements.reshape(batch, -1).mean(1)
    for factor in (torch.from_numpy(weight), inputs.base_weight, inputs.sample_weight):
        if factor is not None:
            losses = losses * factor.to(losses)
    (grad,) = torch.autograd.grad(losses.mean(), prediction)
    return numpy(losses), numpy(grad)


def assert_as_good_as(got: np.ndarray, low_precision: np.ndarray, truth: np.ndarray) -> None:
    assert got.shape == truth.shape
    error, allowed = np.abs(got - truth).max(), 2 * np.abs(low_precision - truth).max()
    assert error <= allowed + 1e-6 * np.abs(truth).max(), f"error {error:.3g}, plain torch's {allowed / 2:.3g}"


def check(criterion: torch.nn.Module, oracle: Oracle, inputs: Inputs) -> torch.Tensor:
    """Both reductions of one batch against the oracle; returns the gradient of the mean."""
    truth = oracle.step(
        numpy(inputs.prediction),
        numpy(inputs.target),
        numpy(inputs.log_snr).astype(np.float32),
        **inputs.as_numpy(),
        record=False,
    )
    plain_losses, plain_grad = plain(inputs, truth.weight, oracle)
    criterion.eval()  # both calls below see the same weights
    leaf = inputs.prediction.detach().requires_grad_()
    assert leaf.stride() == inputs.prediction.stride()

    loss = criterion(leaf, inputs.target, inputs.log_snr, **inputs.arguments())
    assert loss.shape == ()
    assert loss.dtype == FP32
    assert_as_good_as(numpy(loss), plain_losses.mean(), np.float64(truth.loss))
    np.testing.assert_allclose(numpy(criterion.per_sample_loss), truth.per_sample, rtol=2e-6)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert grad.dtype == leaf.dtype
    assert_as_good_as(numpy(grad), plain_grad, truth.grad_prediction)

    losses = criterion(leaf, inputs.target, inputs.log_snr, **inputs.arguments(), reduction="none")
    assert losses.shape == (len(leaf),)
    assert losses.dtype == FP32
    assert_as_good_as(numpy(losses), plain_losses, truth.weighted)
    (unreduced,) = torch.autograd.grad(losses.mean(), leaf)
    assert_as_good_as(numpy(unreduced), plain_grad, truth.grad_prediction)
    return grad


@pytest.mark.parametrize(
    ("form", "loss"), [*((form, "mse") for form in FORMS), ("pair", "huber"), ("v_prediction", "huber")]
)
@pytest.mark.parametrize(
    ("dtype", "other"),
    [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, FP16), (FP16, BF16)],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_loss_and_gradient_are_as_exact_as_plain_torch(backend, device, dtype, other, form, loss):
    criterion, oracle = warmed(backend, device, loss=loss, huber_delta=0.7)
    check(criterion, oracle, draw(device, dtype=dtype, other=other, form=form))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [(7,), (5, 1), (3, 17), (2, 3, 8, 8), (2, 4096), (2, 4097), (3, 9001), (1, 3, 1, 131, 67), (1, 40_001)],
    ids=lambda x: "x".join(map(str, x)),
)
def test_any_number_of_elements_per_sample(backend, device, shape, dtype):
    criterion, oracle = warmed(backend, device)
    check(criterion, oracle, draw(device, shape, dtype, form="floats"))


@pytest.mark.parametrize("batch", [1, 2, 3, 65])
def test_any_batch_size(backend, device, batch):
    criterion, oracle = warmed(backend, device)
    check(criterion, oracle, draw(device, (batch, 6)))


@pytest.mark.parametrize("batch", [1, 129, 1025])
def test_any_batch_size_is_recorded(backend, device, batch):
    criterion, oracle = warmed(backend, device)
    inputs = draw(device, (batch, 6))
    loss = criterion(inputs.prediction, inputs.target, inputs.log_snr, **inputs.arguments())
    arrays = (numpy(x).astype(np.float32) for x in (inputs.prediction, inputs.target, inputs.log_snr))
    truth = oracle.step(*arrays, **inputs.as_numpy())
    np.testing.assert_allclose(numpy(loss), truth.loss, rtol=2e-6)
    np.testing.assert_allclose(numpy(criterion.statistics.count), oracle.count, rtol=1e-12)
    np.testing.assert_allclose(numpy(criterion.weights), oracle.weights, rtol=1e-5)


@pytest.mark.parametrize("bins", [2, 50, 64, 256])
def test_any_number_of_bins(backend, device, bins):
    criterion, oracle = warmed(backend, device, bins=bins)
    check(criterion, oracle, draw(device, (9, 4)))


def sliced(x: torch.Tensor) -> torch.Tensor:
    big = torch.full((x.shape[0] + 1, x.shape[1] + 2, x.shape[2] + 1, 2 * x.shape[3] + 1), math.nan).to(x)
    view = big[1:, 1:-1, :-1, 1::2]
    return view.copy_(x)


def unaligned(x: torch.Tensor) -> torch.Tensor:
    flat = torch.full((x.numel() + 1,), math.nan).to(x)
    return flat[1:].view(x.shape).copy_(x)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "batch_inside": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": sliced,
    "unaligned": unaligned,
    "expanded_over_batch": lambda x: x[:1].expand_as(x),
    "expanded_over_channels": lambda x: x[:, :1].expand_as(x),
}


PAIRS = [
    *(("contiguous", name) for name in LAYOUTS),
    *((name, name) for name in ("channels_last", "transposed", "sliced", "unaligned")),
    *((name, "contiguous") for name in ("channels_last", "transposed", "sliced", "unaligned")),
    ("channels_last", "expanded_over_batch"),
    ("channels_last", "unaligned"),
]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("prediction_layout", "target_layout"), PAIRS)
def test_any_mix_of_layouts(backend, device, prediction_layout, target_layout, dtype):
    criterion, oracle = warmed(backend, device)
    inputs = draw(device, (2, 3, 4, 5), dtype, form="floats", weights=False)
    inputs.prediction = LAYOUTS[prediction_layout](inputs.prediction)
    inputs.target = LAYOUTS[target_layout](inputs.target)
    inputs.noise = LAYOUTS[prediction_layout](inputs.noise)
    check(criterion, oracle, inputs)


@pytest.mark.parametrize("layout", ["batch_inside", "expanded_over_batch", "expanded_over_channels"])
def test_unusual_prediction_layouts(backend, device, layout):
    criterion, oracle = warmed(backend, device)
    inputs = draw(device, (2, 3, 4, 5))
    inputs.prediction = LAYOUTS[layout](inputs.prediction)
    check(criterion, oracle, inputs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("target_layout", ["contiguous", "channels_last"])
def test_gradient_of_channels_last_output_is_channels_last(make_criterion, device, dtype, target_layout, reduction):
    inputs = draw(device, (2, 3, 4, 5), dtype)
    prediction = inputs.prediction.to(memory_format=torch.channels_last).requires_grad_()
    target = LAYOUTS[target_layout](inputs.target)
    loss = make_criterion()(prediction, target, inputs.log_snr, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, prediction)
    assert grad.stride() == prediction.stride()


def test_weights_given_as_views_of_larger_tensors_are_read_by_their_stride(backend, device):
    criterion, oracle = warmed(backend, device)
    inputs = draw(device, (5, 4), form="v_prediction")
    table = torch.full((5, 6), math.nan, device=device)
    columns = [inputs.log_snr, inputs.base_weight, inputs.sample_weight, *inputs.coefficients[1:]]
    for i, column in enumerate(columns):
        table[:, i] = column
    inputs.log_snr, inputs.base_weight, inputs.sample_weight = table[:, 0], table[:, 1], table[:, 2]
    inputs.coefficients = (1.0, table[:, 3], table[:, 4])
    check(criterion, oracle, inputs)
    inputs.sample_weight = torch.tensor([2.0], device=device).expand(5)
    check(criterion, oracle, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, BF16, FP16], ids=["float64", "bfloat16", "float16"])
def test_per_sample_arguments_of_any_float_dtype_are_read(backend, device, dtype):
    criterion, oracle = warmed(backend, device)
    inputs = draw(device, (5, 4), form="v_prediction")
    inputs.log_snr, inputs.base_weight = inputs.log_snr.to(dtype), inputs.base_weight.to(dtype)
    inputs.sample_weight = inputs.sample_weight.to(dtype)
    inputs.coefficients = tuple(torch.as_tensor(x).to(dtype).expand(5).to(device) for x in inputs.coefficients)
    check(criterion, oracle, inputs)


def test_target_and_noise_may_be_float64(backend, device):
    criterion, oracle = warmed(backend, device)
    check(criterion, oracle, draw(device, other=torch.float64, form="v_prediction"))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bfloat16", "float16"])
def test_low_precision_gradient_is_the_exact_one_rounded_once(backend, device, dtype):
    criterion, oracle = warmed(backend, device)
    inputs = draw(device, (2, 3, 40), dtype)
    truth = oracle.step(
        numpy(inputs.prediction),
        numpy(inputs.target),
        numpy(inputs.log_snr).astype(np.float32),
        **inputs.as_numpy(),
        record=False,
    ).grad_prediction
    prediction = inputs.prediction.requires_grad_()
    criterion(prediction, inputs.target, inputs.log_snr, **inputs.arguments()).backward()
    half_ulp = torch.finfo(dtype).eps / 2 * np.abs(truth) + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (np.abs(numpy(prediction.grad) - truth) <= half_ulp + 1e-6 * np.abs(truth).max()).all()


def test_a_coefficient_of_plain_zero_does_not_read_its_tensor(make_criterion, device):
    criterion = make_criterion()
    prediction, good = torch.randn(3, 5, device=device), torch.randn(3, 5, device=device)
    unread, log_snr = torch.full((3, 5), math.nan, device=device), torch.zeros(3, device=device)
    loss = criterion(prediction, unread, log_snr, noise=good, coefficients=(1.0, 0.0, -1.0))
    torch.testing.assert_close(loss, F.mse_loss(prediction, good))


def test_reductions_agree(backend, device):
    criterion, _ = warmed(backend, device)
    inputs = draw(device, (6, 10))
    criterion.eval()
    mean = criterion(inputs.prediction, inputs.target, inputs.log_snr, **inputs.arguments())
    none = criterion(inputs.prediction, inputs.target, inputs.log_snr, **inputs.arguments(), reduction="none")
    expected = (
        criterion.weight_at(inputs.log_snr) * inputs.base_weight * inputs.sample_weight * criterion.per_sample_loss
    )
    torch.testing.assert_close(none, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(mean, none.double().mean().float(), rtol=3e-7, atol=0)


def test_per_sample_loss_is_the_unweighted_one_and_detached(backend, device):
    criterion, _ = warmed(backend, device)
    inputs = draw(device, (6, 10))
    criterion(inputs.prediction.requires_grad_(), inputs.target, inputs.log_snr, **inputs.arguments())
    logged = criterion.per_sample_loss
    expected = (inputs.prediction - inputs.target).square().mean(1)
    assert logged.dtype == FP32
    assert not logged.requires_grad
    torch.testing.assert_close(logged, expected.detach())


def ulps(x: torch.Tensor, y: torch.Tensor) -> int:
    """Largest distance in units in the last place of float32."""

    def order(t: torch.Tensor) -> torch.Tensor:
        bits = t.detach().cpu().contiguous().view(torch.int32).long()
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return int((order(x) - order(y)).abs().max())


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (3, 5, 7), (2, 9001)], ids=lambda x: "x".join(map(str, x)))
def test_constant_weighting_is_mse_loss_to_the_last_place(make_criterion, device, shape):
    prediction, target = torch.randn(shape, device=device), torch.randn(shape, device=device)
    ours, theirs = prediction.clone().requires_grad_(), prediction.clone().requires_grad_()
    loss = make_criterion(vadiff.weighting.Constant())(ours, target, torch.randn(shape[0], device=device))
    expected = F.mse_loss(theirs, target)
    loss.backward()
    expected.backward()
    assert ulps(loss, F.mse_loss(prediction.double(), target.double()).float()) <= 1
    assert ulps(loss, expected) <= 4
    assert ulps(ours.grad, theirs.grad) <= 1


def test_constant_weighting_stays_mse_loss_after_training(make_criterion, device):
    criterion = make_criterion("constant")
    for _ in range(3):
        prediction, target = torch.randn(8, 6, device=device), torch.randn(8, 6, device=device)
        loss = criterion(prediction, target, torch.randn(8, device=device) * 5)
        assert ulps(loss, F.mse_loss(prediction.double(), target.double()).float()) <= 1


def test_huber_is_torchs_huber(make_criterion, device):
    prediction = torch.randn(4, 50, device=device).requires_grad_()
    target = torch.randn(4, 50, device=device)
    loss = make_criterion("constant", loss="huber", huber_delta=0.3)(prediction, target, torch.zeros(4, device=device))
    expected = F.huber_loss(prediction, target, delta=0.3)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, prediction), torch.autograd.grad(expected, prediction))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_reference_is_exact_in_float64(loss, form):
    criterion = vadiff.DiffusionLoss("constant", loss=loss, huber_delta=0.7, backend="reference")
    inputs = draw(torch.device("cpu"), (3, 4, 5), torch.float64, form=form)
    truth = Oracle(fixed=lambda _: 1.0, loss=loss, huber_delta=0.7).step(
        numpy(inputs.prediction), numpy(inputs.target), numpy(inputs.log_snr), **inputs.as_numpy()
    )
    leaf = inputs.prediction.requires_grad_()
    total = criterion(leaf, inputs.target, inputs.log_snr, **inputs.arguments())
    (grad,) = torch.autograd.grad(total, leaf)
    assert total.dtype == torch.float64
    np.testing.assert_allclose(numpy(total), truth.loss, rtol=1e-13)
    np.testing.assert_allclose(numpy(grad), truth.grad_prediction, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_gradcheck_of_prediction_and_base_weight(loss, reduction):
    criterion, _ = warmed("reference", torch.device("cpu"), loss=loss)
    criterion.eval()
    inputs = draw(torch.device("cpu"), (3, 4), torch.float64, form="v_prediction")
    arguments = inputs.arguments()
    base_weight = arguments.pop("base_weight").double().requires_grad_()

    def run(prediction: torch.Tensor, base_weight: torch.Tensor) -> torch.Tensor:
        return criterion(
            prediction,
            inputs.target,
            inputs.log_snr,
            **arguments,
            base_weight=base_weight,
            reduction=reduction,
        )

    assert torch.autograd.gradcheck(run, (inputs.prediction.requires_grad_(), base_weight))


def test_a_tensor_whose_coefficient_is_a_plain_zero_is_not_read(make_criterion, device):
    prediction, eps = torch.randn(4, 3, device=device), torch.randn(4, 3, device=device)
    unread, log_snr = torch.full((4, 3), math.nan, device=device), torch.zeros(4, device=device)
    criterion = make_criterion("constant")
    loss = criterion(prediction, unread, log_snr, noise=eps, coefficients=(1.0, 0.0, -1.0))
    torch.testing.assert_close(loss, F.mse_loss(prediction, eps))
    loss = criterion(prediction, eps, log_snr, noise=unread, coefficients=(1.0, -1.0, 0.0))
    torch.testing.assert_close(loss, F.mse_loss(prediction, eps))


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fused", "deferred"])
def test_a_masked_sample_has_no_gradient_though_its_weight_overflows(make_criterion, device, dtype):
    prediction = torch.ones(2, 3, device=device, dtype=dtype, requires_grad=True)
    big = torch.tensor([1e30, 1.0], device=device)
    v = torch.tensor([0.0, 1.0], device=device)

    class Huge(vadiff.weighting.FixedWeighting):
        def __call__(self, log_snr: torch.Tensor) -> torch.Tensor:
            return torch.tensor([1e30, 1.0], device=device)

    criterion = make_criterion(Huge())
    target = torch.zeros_like(prediction, requires_grad=False)
    criterion(prediction, target, torch.zeros(2, device=device), base_weight=big, sample_weight=v).backward()
    torch.testing.assert_close(
        prediction.grad.float(), torch.tensor([[0.0] * 3, [1 / 3] * 3], device=device), rtol=1e-3, atol=0
    )


def test_a_weighting_of_another_shape_is_refused_and_an_expanded_one_read_right(make_criterion, device):
    class Two(vadiff.weighting.FixedWeighting):
        def __init__(self, shape: tuple[int, ...]) -> None:
            self.shape = shape

        def __call__(self, log_snr: torch.Tensor) -> torch.Tensor:
            return torch.tensor(2.0, device=device).expand(self.shape)

    x, y, log_snr = torch.randn(4, 3, device=device), torch.zeros(4, 3, device=device), torch.zeros(4, device=device)
    torch.testing.assert_close(make_criterion(Two((4,)))(x, y, log_snr), 2 * F.mse_loss(x, y))
    with pytest.raises(ValueError, match=r"weighting\(log_snr\) has shape \(1,\), expected \(4,\)"):
        make_criterion(Two((1,)))(x, y, log_snr)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_fixed_weighting_is_the_same_in_every_precision(backend, device, kernels, dtype):
    if kernels == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels have no float64")
    criterion = vadiff.DiffusionLoss(vadiff.weighting.MinSNR(), backend=backend).to(device).eval()
    prediction, target = (torch.randn(5, 3, 7).to(device, dtype) for _ in range(2))
    log_snr = torch.tensor([-3.0, -1.0, 0.5, 2.0, 6.0], device=device)
    ell = (prediction.double() - target.double()).square().mean((1, 2))
    weight = vadiff.weighting.MinSNR()(log_snr).double()
    torch.testing.assert_close(
        criterion(prediction, target, log_snr, reduction="none").double(), weight * ell, rtol=1e-6, atol=0
    )
    losses = ell if dtype == torch.float64 else ell.float()
    torch.testing.assert_close(criterion.reweight(losses, log_snr).double(), weight * ell, rtol=1e-6, atol=0)
