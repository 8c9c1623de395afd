"""Non-finite values show in loss and gradient as with `F.mse_loss` and `F.huber_loss`; masked samples show nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vadiff
from vadiff.weighting import FixedWeighting, MinSNR

Make = Callable[..., vadiff.DiffusionLoss]
NAN, INF = math.nan, math.inf
BATCH, ELEMENTS = 5, 6
AT = (2, 3)  # where the non-finite element is

pytestmark = pytest.mark.usefixtures("poisoned_memory")
reductions = pytest.mark.parametrize("reduction", ["mean", "none"])
# float32 and bfloat16 write the gradient in the forward where the reduction is the mean, float16 in the backward
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
losses = pytest.mark.parametrize("loss", ["mse", "huber"])


class Given(FixedWeighting):
    """The weights that were given, whatever the log-SNR is."""

    def __init__(self, *weights: float) -> None:
        self.weights = weights

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.tensor(self.weights, device=log_snr.device)


def draw(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    prediction = torch.randn(BATCH, ELEMENTS).to(device, dtype)
    return prediction, torch.randn(BATCH, ELEMENTS).to(device, dtype), torch.zeros(BATCH, device=device)


def torchs(loss: str, prediction: Tensor, target: Tensor) -> Tensor:
    """What torch's own loss gives per sample, in float32. [B]"""
    elements = F.mse_loss if loss == "mse" else F.huber_loss
    return elements(prediction.float(), target.float(), reduction="none").mean(1)


def assert_as_torch(
    make_criterion: Make,
    prediction: Tensor,
    target: Tensor,
    log_snr: Tensor,
    loss: str,
    reduction: str,
    upstream: float = 1.0,
    weights: Tensor | None = None,
    **options: Any,
) -> tuple[vadiff.DiffusionLoss, Tensor]:
    """Loss and gradient, element by element; returns the criterion and the gradient."""
    mine, theirs = (prediction.detach().clone().requires_grad_() for _ in range(2))
    criterion = make_criterion(loss=loss, **options)
    found = criterion(mine, target, log_snr, reduction=reduction)
    each = torchs(loss, theirs, target)
    each = each if weights is None else each * weights
    expected = each.mean() if reduction == "mean" else each
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(found, mine, torch.full_like(found, upstream))
    (wanted,) = torch.autograd.grad(expected, theirs, torch.full_like(expected, upstream))
    rtol = 1e-5 if prediction.dtype == torch.float32 else 2 * torch.finfo(prediction.dtype).eps
    torch.testing.assert_close(gradient, wanted, equal_nan=True, rtol=rtol, atol=1e-7)
    return criterion, gradient


@reductions
@dtypes
@losses
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("upstream", [1.0, 0.0, 3.0])
def test_a_non_finite_prediction_shows_as_in_torchs_loss(
    make_criterion, device, loss, dtype, reduction, value, upstream
):
    prediction, target, log_snr = draw(device, dtype)
    prediction[AT] = value
    criterion, gradient = assert_as_torch(
        make_criterion, prediction, target, log_snr, loss, reduction, upstream, weighting="constant"
    )
    others = torch.ones_like(gradient, dtype=torch.bool)
    others[AT] = False
    assert gradient[others].isfinite().all()
    assert int(criterion.statistics.skipped) == 1
    assert criterion.statistics.count.sum() == BATCH - 1


@reductions
@losses
def test_a_weight_of_zero_multiplies(make_criterion, device, loss, reduction):
    """0 · NaN is NaN, for w, a and upstream: only u = 0 and v = 0 mask."""
    prediction, target, log_snr = draw(device)
    prediction[AT] = NAN
    weights = (1.0, 2.0, 0.0, 0.0, 1.0)
    assert_as_torch(
        make_criterion, prediction, target, log_snr, loss, reduction,
        weights=torch.tensor(weights, device=device), weighting=Given(*weights),
    )  # fmt: skip


@reductions
@pytest.mark.parametrize("per_sample", [True, False])
def test_a_coefficient_of_zero_multiplies(make_criterion, device, reduction, per_sample):
    prediction, target, log_snr = draw(device)
    prediction[AT] = NAN
    prediction.requires_grad_()
    a = torch.zeros(BATCH, device=device) if per_sample else 0.0
    loss = make_criterion()(prediction, target, log_snr, coefficients=(a, -1.0, 0.0), reduction=reduction)
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    assert gradient.isnan().nonzero().tolist() == [list(AT)]
    assert (gradient.nan_to_num(nan=0.0) == 0).all()


@reductions
@losses
def test_a_float16_prediction_whose_square_overflows_shows_as_in_torchs_loss(make_criterion, device, loss, reduction):
    prediction, target, log_snr = draw(device, torch.float16)
    prediction[AT] = 6e4
    criterion, gradient = assert_as_torch(
        make_criterion, prediction, target, log_snr, loss, reduction, upstream=65536.0, weighting="constant"
    )
    assert gradient[AT].isinf() or loss == "huber"
    assert int(criterion.statistics.skipped) == 0  # in float32 the loss is finite


@reductions
@pytest.mark.parametrize(
    "weighting", ["variance_aware", "constant", MinSNR(), "learned", "gaussian", "loss_zscore", Given(*[1.0] * BATCH)]
)
def test_a_nan_log_snr_makes_its_sample_s_weight_nan_under_every_weighting(
    make_criterion, device, weighting, reduction
):
    prediction, target, log_snr = draw(device)
    log_snr[AT[0]] = NAN
    prediction.requires_grad_()
    if not isinstance(weighting, Given):
        criterion = make_criterion(weighting)
        assert criterion.weight_at(log_snr).isnan()[AT[0]]
    else:
        criterion = make_criterion(weighting)
    loss = criterion(prediction, target, log_snr, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    assert loss.isnan().any()
    nan = gradient.isnan().all(1).tolist()
    assert nan == [weighting == "loss_zscore" or i == AT[0] for i in range(BATCH)]  # the z-score looks at the batch
    assert int(criterion.statistics.skipped) == 1


@reductions
@dtypes
@pytest.mark.parametrize("zero", ["base_weight", "sample_weight"])
@pytest.mark.parametrize("values", [{"prediction": NAN}, {"prediction": INF}, {"log_snr": NAN}, {"other": NAN}])
def test_a_masked_sample_shows_nothing_whatever_its_values(make_criterion, device, dtype, reduction, zero, values):
    prediction, target, log_snr = draw(device, dtype)
    factors = {name: torch.ones(BATCH, device=device) for name in ("base_weight", "sample_weight")}
    factors[zero][AT[0]] = 0.0
    if "prediction" in values:
        prediction[AT] = values["prediction"]
    if "log_snr" in values:
        log_snr[AT[0]] = NAN
    if "other" in values:
        factors["sample_weight" if zero == "base_weight" else "base_weight"][AT[0]] = NAN
    prediction.requires_grad_()
    criterion = make_criterion("constant")
    loss = criterion(prediction, target, log_snr, **factors, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    kept = torch.arange(BATCH, device=device) != AT[0]
    expected = torchs("mse", prediction[kept], target[kept]).detach()
    if reduction == "none":
        torch.testing.assert_close(loss, torch.zeros_like(loss).masked_scatter(kept, expected))
    else:
        torch.testing.assert_close(loss, expected.sum() / BATCH)
    assert (gradient[AT[0]] == 0).all()
    assert gradient.isfinite().all()
    assert int(criterion.statistics.skipped) == 0
    assert criterion.statistics.count.sum() == BATCH - 1


@pytest.mark.parametrize("zero", ["base_weight", "sample_weight"])
def test_a_masked_sample_teaches_a_learned_weighting_nothing(make_criterion, device, zero):
    prediction, target, log_snr = draw(device)
    prediction[AT], log_snr[AT[0]] = NAN, NAN
    factor = torch.ones(BATCH, device=device)
    factor[AT[0]] = 0.0
    criterion = make_criterion("learned")
    criterion(prediction, target, log_snr, **{zero: factor}).backward()
    gradient = criterion.weighting.weight.grad.clone()
    criterion.weighting.weight.grad = None
    kept = factor != 0
    (criterion(prediction[kept], target[kept], log_snr[kept]) * (BATCH - 1) / BATCH).backward()
    torch.testing.assert_close(gradient, criterion.weighting.weight.grad)
    assert gradient.abs().max() > 0


def test_factors_that_underflow_do_not_mask(make_criterion, device):
    """u·v is 0 in float32, but neither is: the sample is recorded, and its NaN shows."""
    prediction, target, log_snr = draw(device)
    tiny = torch.full((BATCH,), 1e-30, device=device)
    criterion = make_criterion("constant")
    loss = criterion(prediction, target, log_snr, base_weight=tiny, sample_weight=tiny)
    assert loss == 0
    assert criterion.statistics.count.sum() == BATCH
    prediction[AT] = NAN
    assert criterion(prediction, target, log_snr, base_weight=tiny, sample_weight=tiny).isnan()


@pytest.mark.parametrize("value", [NAN, INF])
def test_reweight_gives_a_non_finite_loss_the_factor_nan(make_criterion, device, value):
    losses = torch.tensor([1.0, value, value, 2.0], device=device, requires_grad=True)
    v = torch.tensor([1.0, 1.0, 0.0, 3.0], device=device)
    criterion = make_criterion("constant")
    out = criterion.reweight(losses, torch.zeros(4, device=device), v)
    assert out.isnan().tolist() == [False, True, False, False]
    assert out[[0, 2, 3]].tolist() == [1.0, 0.0, 6.0]
    (gradient,) = torch.autograd.grad(out.sum(), losses)
    assert gradient.isnan().tolist() == [False, True, False, False]
    assert gradient[2] == 0
    assert int(criterion.statistics.skipped) == 1


@dtypes
def test_the_gradient_of_a_base_weight_is_that_of_its_own_sample(make_criterion, device, dtype):
    prediction, target, log_snr = draw(device, dtype)
    prediction[AT] = NAN
    u = torch.ones(BATCH, device=device, requires_grad=True)
    v = torch.ones(BATCH, device=device)
    v[0] = 0.0
    loss = make_criterion("constant")(prediction.requires_grad_(), target, log_snr, base_weight=u, sample_weight=v)
    (gradient,) = torch.autograd.grad(loss, u)
    assert gradient.isnan().tolist() == [i == AT[0] for i in range(BATCH)]
    assert gradient[0] == 0


def test_a_gradient_scaler_skips_a_nan_prediction(make_criterion, device):
    layer = torch.nn.Linear(ELEMENTS, ELEMENTS).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    criterion = make_criterion()
    for value, moves in ((NAN, False), (1.0, True)):
        x, target, log_snr = draw(device)
        x[AT] = value
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(criterion(layer(x), target, log_snr)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(layer.weight, before) != moves
