"""Flow-matching loops: torchcfm's matchers and what facebookresearch's flow_matching passes around.

With constant weighting loss and gradient are those of `torch.mean((vt - ut) ** 2)` to ULPS units in the last place: the
mean is taken over each sample and then over the batch, and in float64 where a sample is large.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seen import Seen, ulps
from torch import Tensor, nn

import vadiff
from vadiff.integrations.flow_matching import FlowMatchingLoss, log_snr

ULPS = 4


class Velocity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.level = nn.Linear(1, 2)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.conv(x) + self.level(t[:, None])[:, :, None, None]


@pytest.fixture
def net() -> Velocity:
    return Velocity()


def criterion(weighting: object = "constant", **options: object) -> vadiff.DiffusionLoss:
    settings = {"bins": 16, "log_snr_range": (-8.0, 8.0), "half_life": float("inf"), **options}
    return vadiff.DiffusionLoss(weighting, **settings)


def straight(seed: int, shape: tuple[int, ...] = (8, 2, 8, 8)) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Noise x0, data x1, t, x_t, u_t: facebookresearch's `CondOTProbPath().sample` gives the last three."""
    generator = torch.Generator().manual_seed(seed)
    x0, x1 = torch.randn(shape, generator=generator), 0.5 * torch.randn(shape, generator=generator)
    t = torch.rand(shape[0], generator=generator)
    per_sample = t.view(-1, *[1] * (len(shape) - 1))
    return x0, x1, t, per_sample * x1 + (1 - per_sample) * x0, x1 - x0


def matcher(name: str = "ConditionalFlowMatcher", sigma: float = 0.0) -> Any:
    torchcfm = pytest.importorskip("torchcfm", reason="torchcfm is not installed")
    return getattr(torchcfm, name)(sigma=sigma)


@pytest.mark.parametrize("name", ["ConditionalFlowMatcher", "ExactOptimalTransportConditionalFlowMatcher"])
@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_constant_weighting_is_torchcfms_own_loss_and_gradient(net: Velocity, name: str, sigma: float) -> None:
    x0, x1, *_ = straight(0)
    t, xt, ut = matcher(name, sigma).sample_location_and_conditional_flow(x0, x1)
    results = []
    for loss_of in (
        lambda vt: torch.mean((vt - ut) ** 2),
        lambda vt: FlowMatchingLoss(criterion(), sigma=sigma)(vt, ut, t),
    ):
        vt = net(t, xt)
        vt.retain_grad()
        loss = loss_of(vt)
        loss.backward()
        results.append((loss, vt.grad))
    (expected, expected_gradient), (found, found_gradient) = results
    assert ulps(found, expected) <= ULPS
    assert ulps(found_gradient, expected_gradient) <= ULPS


@pytest.mark.parametrize("data_at", [0, 1])
def test_lipmans_path_with_noise_left_at_the_data_is_torchcfms_target_matcher(net: Velocity, data_at: int) -> None:
    """x_t = t·x1 + (1 - (1 - sigma_min)·t)·x0, u = x1 - (1 - sigma_min)·x0: arXiv 2210.02747, eq. 20 to 23."""
    _, x1, *_ = straight(0)
    source = matcher("TargetConditionalFlowMatcher", 0.3)
    t, xt, ut, x0 = source.sample_location_and_conditional_flow(torch.zeros_like(x1), x1, return_noise=True)
    vt = net(t, xt)
    time, sign = (t, 1.0) if data_at == 1 else (1.0 - t, -1.0)
    loss_of = FlowMatchingLoss(criterion(), sigma_min=0.3, data_at=data_at)
    expected = torch.mean((vt - ut) ** 2)
    torch.testing.assert_close(loss_of(sign * vt, sign * ut, time), expected)
    torch.testing.assert_close(loss_of(sign * vt, x1, time, noise=x0), expected)
    scale = 1 - (1 - 0.3) * t.double()
    found = log_snr(time.double(), sigma_min=0.3, data_at=data_at)
    torch.testing.assert_close(found, 2 * (t.double() / scale).log(), rtol=0, atol=1e-6)
    seen = Seen()
    for _ in range(2):
        seen.add((vt - ut).double().square().mean((1, 2, 3)), found)
    seen.check(loss_of.criterion, rtol=1e-5)
    mean = vadiff.targets.PosteriorMean(x1)
    if data_at == 1:  # the mean velocity over the data that explain x_t, by the formula
        loss_of = FlowMatchingLoss(criterion(), sigma_min=0.3, target=mean)
        flat, noisy = x1.double().flatten(1), xt.double().flatten(1)
        distance = (noisy[:, None] - t.double()[:, None, None] * flat).square().sum(2)
        x1_hat = (-distance / (2 * scale[:, None] ** 2)).softmax(1) @ flat
        velocity = (x1_hat - (1 - 0.3) * noisy) / scale[:, None]
        wanted = (vt.detach().double().flatten(1) - velocity).square().mean()
        got = loss_of(vt, x1, t, noise=x0, index=torch.arange(len(x1)))
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-6)


def test_constant_weighting_is_the_mean_of_videos_too() -> None:
    _, _, t, vt, ut = straight(0, (3, 2, 4, 8, 8))
    results = []
    for loss_of in (lambda v: torch.pow(v - ut, 2).mean(), lambda v: FlowMatchingLoss(criterion())(v, ut, t)):
        v = vt.clone().requires_grad_()
        loss = loss_of(v)
        loss.backward()
        results.append((loss, v.grad))
    assert ulps(results[1][0], results[0][0]) <= ULPS
    assert ulps(results[1][1], results[0][1]) <= ULPS


@pytest.mark.parametrize("data_at", [0, 1])
def test_data_and_noise_in_place_of_the_target_are_the_same_loss(net: Velocity, data_at: int) -> None:
    x0, x1, t, xt, ut = straight(0)
    target = ut if data_at == 1 else -ut
    loss = FlowMatchingLoss(criterion(), data_at=data_at)
    vt = net(t, xt)
    torch.testing.assert_close(loss(vt, x1, t, noise=x0), loss(vt, target, t))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_papers_weight_of_the_x0_loss(net: Velocity, gamma: float) -> None:
    weighting = vadiff.weighting.MinSNR(gamma, prediction_type="flow")
    _, x1, t, xt, ut = straight(0)
    vt = net(t, xt)
    found = FlowMatchingLoss(criterion(weighting))(vt, ut, t, reduction="none").detach()
    time = t.double()[:, None, None, None]
    data = xt.double() + (1 - time) * vt.detach().double()  # where the velocity leads to
    error = (data - x1.double()).square().mean((1, 2, 3))
    snr = (t.double() / (1 - t.double())) ** 2
    np.testing.assert_allclose(found.numpy(), (snr.clamp(max=gamma) * error).numpy(), rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_log_snr_is_that_of_what_torchcfm_mixes(sigma: float) -> None:
    t = torch.linspace(0.05, 0.95, 10)
    x1, x0 = torch.ones(10, 4000), torch.randn(10, 4000)
    xt = matcher(sigma=sigma).sample_xt(x0, x1, t, torch.randn_like(x0))
    measured = 2 * (t / (xt - t[:, None] * x1).std(1)).log()
    torch.testing.assert_close(log_snr(t, sigma=sigma), measured, rtol=0.0, atol=0.1)


def test_the_ends_of_the_path_are_legal() -> None:
    t = torch.tensor([0.0, 0.5, 1.0])
    assert log_snr(t).tolist() == [-math.inf, 0.0, math.inf]
    assert log_snr(t, data_at=0).tolist() == [math.inf, 0.0, -math.inf]
    assert log_snr(t, sigma=0.5).tolist() == pytest.approx([-math.inf, math.log(0.25 / 0.5), math.log(4.0)])
    assert log_snr(t, data_at=0, sigma=0.5).tolist() == pytest.approx(log_snr(1 - t, sigma=0.5).tolist())
    assert log_snr(t.double(), sigma=0.5).dtype == torch.float64
    loss = FlowMatchingLoss(criterion(vadiff.weighting.MinSNR(prediction_type="flow")))
    value = loss(torch.ones(3, 4, requires_grad=True), torch.zeros(3, 4), t)
    value.backward()
    assert value.isfinite()
    assert loss.criterion.statistics.count.sum() == 3


def test_ten_steps_record_what_the_loop_saw(net: Velocity) -> None:
    loss_of = FlowMatchingLoss(criterion("variance_aware"))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    seen = Seen()
    for number in range(10):
        optimizer.zero_grad()
        for accumulated in range(2):
            *_, t, xt, ut = straight(2 * number + accumulated)
            vt = net(t, xt)
            (loss_of(vt, ut, t) / 2).backward()
            seen.add((vt.double() - ut).square().mean((1, 2, 3)), 2 * (t.double() / (1 - t.double())).log())
        optimizer.step()
    seen.check(loss_of.criterion, rtol=1e-5)
    assert loss_of.criterion.weights.std() > 0.01


@pytest.mark.parametrize("options", [{"sigma": 0.5}, {"data_at": 0}])
def test_the_bins_are_those_of_the_path_that_was_named(options: dict[str, Any]) -> None:
    *_, t, vt, ut = straight(0)
    loss_of = FlowMatchingLoss(criterion(), **options)
    loss_of(vt.requires_grad_(), ut, t)
    seen = Seen()
    seen.add((vt - ut).square().mean((1, 2, 3)), log_snr(t, **options))
    seen.check(loss_of.criterion)


def test_a_masked_loss_goes_through_the_criterion() -> None:
    *_, t, vt, ut = straight(0)
    mask = torch.zeros(8, 1, 8, 8)
    mask[:6, :, :4] = 1.0
    share = mask.mean((1, 2, 3))
    error = ((vt - ut).square() * mask).mean((1, 2, 3)) / share.clamp(min=1e-6)
    loss_of = FlowMatchingLoss(criterion())
    weighted = loss_of.criterion.reweight(error, log_snr(t), share).mean()
    torch.testing.assert_close(weighted, ((vt - ut).square() * mask).mean())
    assert loss_of.criterion.statistics.count.sum() == 6


def test_state_survives_a_checkpoint(net: Velocity, tmp_path: Path) -> None:
    loss_of = FlowMatchingLoss()
    for number in range(4):
        *_, t, xt, ut = straight(number)
        loss_of(net(t, xt), ut, t)
    torch.save({"net_model": net.state_dict(), "loss": loss_of.state_dict()}, tmp_path / "weights.pt")
    resumed = FlowMatchingLoss()
    resumed.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True)["loss"])
    *_, t, xt, ut = straight(9)
    assert torch.equal(resumed(net(t, xt), ut, t), loss_of(net(t, xt), ut, t))
    assert torch.equal(resumed.criterion.statistics.state, loss_of.criterion.statistics.state)


def test_autocast_and_a_gradient_scaler_change_neither_statistics_nor_direction(net: Velocity) -> None:
    loss_of, results = FlowMatchingLoss(criterion()), []
    *_, t, xt, ut = straight(0)
    for scale in (1.0, 2.0**12):
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(net(t, xt), ut, t)
        torch.amp.GradScaler("cpu", init_scale=scale).scale(loss).backward()
        results.append(net.conv.weight.grad / scale)
    torch.testing.assert_close(*results)
    assert loss_of.criterion.statistics.count.sum() == 16


def test_a_network_frozen_but_for_one_layer_trains_that_layer(net: Velocity) -> None:
    net.conv.requires_grad_(False)
    *_, t, xt, ut = straight(0)
    FlowMatchingLoss()(net(t, xt), ut, t).backward()
    assert net.conv.weight.grad is None
    assert net.level.weight.grad is not None


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.rand(8, 1, 1, 1), r"t has shape \(8, 1, 1, 1\), expected \(B,\).*t.flatten\(\)"),
        (torch.tensor(0.5), r"t has shape \(\), expected \(B,\)"),
        (torch.rand(16), r"log_snr has shape \(16,\), expected \(8,\)"),
        (torch.linspace(0, 999, 8), "expected values in .*divide by num_train_timesteps"),
    ],
)
def test_times_of_another_shape_or_range_are_refused(t: Tensor, message: str) -> None:
    *_, vt, ut = straight(0)
    with pytest.raises(ValueError, match=message):
        FlowMatchingLoss()(vt, ut, t)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": vadiff.DiffusionLoss(vadiff.weighting.MinSNR())}, "prediction_type='epsilon'.*expected 'flow'"),
        ({"criterion": "no_such"}, "weighting is 'no_such'"),
        ({"sigma": -0.1}, "sigma is -0.1, expected a finite number of at least 0"),
        ({"sigma_min": 1.5}, "sigma_min is 1.5, expected at most 1"),
        ({"data_at": 2}, "data_at is 2, expected 0"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowMatchingLoss(**options)


def test_a_fixed_weighting_by_name_is_made_for_the_velocity() -> None:
    assert FlowMatchingLoss("min_snr").criterion.weighting == vadiff.weighting.MinSNR(prediction_type="flow")
