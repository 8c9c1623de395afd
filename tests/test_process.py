"""vadiff.process: noise processes, prediction types, their residuals and loss ratios."""

import math

import pytest
import torch
from torch import Tensor

from vadiff.log_snr import from_alphas_cumprod
from vadiff.process import (
    EDM,
    PREDICTION_TYPES,
    Flow,
    NoiseProcess,
    VPCosine,
    VPLinear,
    coefficients,
    edm_preconditioning,
    loss_ratio,
)

SIGMA_DATA = 0.7

# Every pair of a process and a prediction type that is defined on it.
PAIRS = [
    *((process, kind) for process in (VPCosine(), VPLinear(), EDM(), Flow()) for kind in ("epsilon", "sample")),
    (VPCosine(), "v_prediction"),
    (VPLinear(), "v_prediction"),
    (Flow(data_at=0), "flow"),
    (Flow(data_at=1), "flow"),
    (EDM(), "edm"),
]


class Batch:
    """Random x0, eps and a random guess of x0, float64, at 32 times of a process."""

    def __init__(self, process: NoiseProcess) -> None:
        random = torch.Generator().manual_seed(0)
        self.x0, self.eps, self.guess = torch.randn(3, 32, 3, 4, 4, dtype=torch.float64, generator=random)
        self.t = torch.rand(32, dtype=torch.float64, generator=random) * 0.98 + 0.01
        self.alpha, self.sigma = process.alpha(self.t), process.sigma(self.t)
        self.x_t = process.add_noise(self.x0, self.eps, self.t)


def pixels(value: Tensor | float) -> Tensor | float:
    """Per-sample value [B] made to broadcast over [B, C, H, W]."""
    return value.view(-1, 1, 1, 1) if isinstance(value, Tensor) else value


def in_form_of(kind: str, x0: Tensor, batch: Batch, data_at: int) -> Tensor:
    """What a network of this prediction type has to say to mean `x0`, given x_t: the usual conversions."""
    alpha, sigma = pixels(batch.alpha), pixels(batch.sigma)
    eps = (batch.x_t - alpha * x0) / sigma
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x0
    if kind == "v_prediction":
        return alpha * eps - sigma * x0
    if kind == "flow":
        return eps - x0 if data_at == 0 else x0 - eps
    c_skip, c_out, _, _ = edm_preconditioning(batch.sigma, SIGMA_DATA)
    return (x0 - pixels(c_skip) * batch.x_t) / pixels(c_out)


def squared_error(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).mean(1)


@pytest.mark.parametrize(("process", "kind"), PAIRS)
def test_residual_is_prediction_minus_target(process: NoiseProcess, kind: str) -> None:
    batch = Batch(process)
    data_at = getattr(process, "data_at", 0)
    a, b, c = coefficients(kind, batch.alpha, batch.sigma, sigma_data=SIGMA_DATA, data_at=data_at)
    output = in_form_of(kind, batch.guess, batch, data_at)
    residual = pixels(a) * output + pixels(b) * batch.x0 + pixels(c) * batch.eps
    if kind == "edm":  # the network says F, the residual is that of the denoiser D
        expected = batch.guess - batch.x0
    else:
        expected = output - in_form_of(kind, batch.x0, batch, data_at)
    assert torch.allclose(residual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("process", "kind"), PAIRS)
def test_loss_ratio_turns_x0_loss_into_the_loss_of_the_form(process: NoiseProcess, kind: str) -> None:
    batch = Batch(process)
    data_at = getattr(process, "data_at", 0)
    guessed, true = (in_form_of(kind, x0, batch, data_at) for x0 in (batch.guess, batch.x0))
    k = loss_ratio(kind, process.log_snr(batch.t), sigma_data=SIGMA_DATA)
    expected = k * squared_error(batch.guess - batch.x0)
    assert torch.allclose(squared_error(guessed - true), expected, rtol=1e-9)


def test_loss_ratio_of_edm_is_edms_loss_weight() -> None:
    sigma = torch.tensor([0.002, 0.3, 80.0], dtype=torch.float64)
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    assert torch.allclose(loss_ratio("edm", EDM().log_snr(sigma), sigma_data=SIGMA_DATA), weight, rtol=1e-13)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_loss_ratio_at_infinite_log_snr_is_no_nan(kind: str) -> None:
    assert not loss_ratio(kind, torch.tensor([-math.inf, math.inf])).isnan().any()


@pytest.mark.parametrize("process", [VPCosine(), VPLinear(), EDM(), Flow(0), Flow(1)])
def test_log_snr_agrees_with_alpha_and_sigma(process: NoiseProcess) -> None:
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    expected = (process.alpha(t).square() / process.sigma(t).square()).log()
    assert torch.allclose(process.log_snr(t), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("process", [VPCosine(), VPLinear()])
def test_variance_is_preserved(process: NoiseProcess) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-14)


@pytest.mark.parametrize("process", [VPCosine(), Flow(0)])
def test_start_is_clean_and_end_is_pure_noise(process: NoiseProcess) -> None:
    ends = torch.tensor([0.0, 1.0])
    assert process.alpha(ends).tolist() == [1.0, 0.0]
    assert process.sigma(ends).tolist() == [0.0, 1.0]
    assert process.log_snr(ends).tolist() == [math.inf, -math.inf]


def test_linear_schedule_is_the_limit_of_ddpms_thousand_steps() -> None:
    table = torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
    steps = torch.tensor([99, 499, 899])
    continuous = VPLinear().log_snr((steps + 1).double() / 1000)
    assert torch.allclose(continuous, from_alphas_cumprod(table, steps), atol=0.02, rtol=0.01)


def test_cosine_schedule_is_the_papers_formula() -> None:
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    f0 = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert torch.allclose(VPCosine().alpha(t) ** 2, f / f0, rtol=1e-12)


@pytest.mark.parametrize("process", [VPCosine(), VPLinear(), EDM(), Flow(0), Flow(1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_processes_return_float32_unless_float64_came_in(process: NoiseProcess, dtype: torch.dtype) -> None:
    t = torch.tensor([0.25, 0.5], dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {process.alpha(t).dtype, process.sigma(t).dtype, process.log_snr(t).dtype} == {expected}
    assert process.add_noise(torch.zeros(2, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype), t).dtype == dtype


def test_add_noise_names_the_shape_that_does_not_fit() -> None:
    x0 = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"eps has shape \(2, 64\), expected \(2, 1, 8, 8\)"):
        EDM().add_noise(x0, torch.zeros(2, 64), torch.ones(2))
    with pytest.raises(ValueError, match=r"t has shape \(3,\), expected \(2,\)"):
        EDM().add_noise(x0, x0, torch.ones(3))


def test_preconditioning_gives_the_network_unit_variance() -> None:
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = edm_preconditioning(sigma, SIGMA_DATA)
    assert torch.allclose(c_in**2 * (SIGMA_DATA**2 + sigma**2), torch.ones(3, dtype=torch.float64))
    target_variance = ((1 - c_skip) ** 2 * SIGMA_DATA**2 + c_skip**2 * sigma**2) / c_out**2
    assert torch.allclose(target_variance, torch.ones(3, dtype=torch.float64))
    assert torch.allclose(c_noise, sigma.log() / 4)


def test_edm_coefficients_stay_exact_at_small_sigma() -> None:
    _, b, _ = coefficients("edm", 1.0, torch.tensor([1e-3]))
    assert float(b) == pytest.approx(-1e-6 / (1e-6 + 0.25), rel=1e-6)


def test_numbers_give_numbers() -> None:
    assert coefficients("edm", 1.0, 0.5, sigma_data=0.5) == pytest.approx((0.5 / math.sqrt(2), -0.5, 0.25))
    assert coefficients("epsilon", 0.8, 0.6) == (1.0, 0.0, -1.0)


def test_unknown_names_and_directions_are_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type is 'noise', expected one of epsilon, sample, "):
        coefficients("noise", 1.0, 1.0)
    with pytest.raises(ValueError, match="prediction_type is 'noise'"):
        loss_ratio("noise", torch.zeros(1))
    with pytest.raises(ValueError, match="data_at is 2"):
        Flow(data_at=2)
    with pytest.raises(ValueError, match="data_at is 2"):
        coefficients("flow", 1.0, 1.0, data_at=2)


@pytest.mark.parametrize("alpha", [0.9, torch.tensor([1.0, 0.9])])
def test_edm_on_a_process_with_another_alpha_is_refused(alpha: float | Tensor) -> None:
    with pytest.raises(ValueError, match=r"alpha is not 1.*x_t / alpha"):
        coefficients("edm", alpha, 0.5)


@pytest.mark.parametrize("process", [VPCosine(), VPLinear(), EDM(), Flow(), Flow(data_at=1)])
def test_time_inverts_log_snr(process: NoiseProcess) -> None:
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(process.time(process.log_snr(t)), t, rtol=1e-9, atol=1e-12)
    assert process.time(torch.zeros(2)).dtype == torch.float32


@pytest.mark.parametrize("process", [VPCosine(), Flow(), Flow(data_at=1)])
def test_time_at_infinite_log_snr_is_an_end_of_the_process(process: NoiseProcess) -> None:
    ends = process.time(torch.tensor([math.inf, -math.inf], dtype=torch.float64)).tolist()
    assert sorted(ends) == pytest.approx([0.0, 1.0], abs=1e-12)
