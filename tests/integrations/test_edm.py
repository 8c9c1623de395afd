"""NVlabs' loops are not on PyPI: their calls and checkpoints stand here, and their losses as the papers' formulas.

With constant weighting the loss is the element-wise one up to rounding: the errors of a sample are averaged before they
are weighted and not after, and lambda is 1/sigma² + 1/sigma_data². ULPS bounds the sum and every gradient.
"""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seen import Seen, ulps
from torch import Tensor, nn

import vadiff
from vadiff.errors import DiffusionLossWarning
from vadiff.integrations.edm import EDM2Loss, EDMLoss

ULPS = 16
SIGMA_DATA = 0.5


class Net(nn.Module):
    """A denoiser with EDM's preconditioning around one convolution, called as NVlabs' networks are."""

    def __init__(self, labels: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.level = nn.Linear(1 + labels, 2)
        self.head = nn.Linear(1, 1)  # u(sigma)
        self.calls: list[dict[str, Tensor]] = []

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        return_logvar: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        sigma = sigma.reshape(-1, *[1] * (x.dim() - 1))
        total = sigma.square() + SIGMA_DATA**2
        noise_level = sigma.log().reshape(-1, 1) / 4
        given = noise_level if class_labels is None else torch.cat([noise_level, class_labels], 1)
        flat = (x / total.sqrt()).flatten(2).unsqueeze(-1)
        modulation = self.level(given)[:, :, None, None]
        f = (self.conv(flat) * (1 + modulation)).reshape(x.shape)
        denoised = SIGMA_DATA**2 / total * x + sigma * SIGMA_DATA / total.sqrt() * f
        self.calls.append({"x": x, "sigma": sigma, "denoised": denoised})
        return (denoised, self.head(noise_level)[:, :, None, None]) if return_logvar else denoised


@pytest.fixture
def images() -> Tensor:
    return 0.5 * torch.randn(8, 2, 4, 4)


@pytest.fixture
def net() -> Net:
    return Net()


def criterion(weighting: object = "constant", **options: object) -> vadiff.DiffusionLoss:
    settings = {"bins": 16, "log_snr_range": (-8.0, 8.0), "half_life": float("inf"), **options}
    return vadiff.DiffusionLoss(weighting, **settings)


def elementwise(
    net: Net, images: Tensor, p_mean: float = -1.2, p_std: float = 1.2, uncertain: bool = False
) -> tuple[Tensor, Tensor]:
    """The papers' loss for each element, and sigma [B, 1, ...]."""
    normal = torch.randn([len(images)] + [1] * (images.dim() - 1))
    sigma = (p_mean + p_std * normal).exp()
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    noisy = images + sigma * torch.randn_like(images)
    if uncertain:
        denoised, u = net(noisy, sigma, return_logvar=True)
        return weight / u.exp() * (denoised - images) ** 2 + u, sigma
    return weight * (net(noisy, sigma) - images) ** 2, sigma


def gradients(net: Net, loss: Tensor) -> list[Tensor]:
    """As the loops go backward: loss scaling 100 over the batch."""
    net.zero_grad()
    denoised = net.calls[-1]["denoised"]
    denoised.retain_grad()
    loss.sum().mul(100 / len(loss)).backward()
    return [denoised.grad, *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("shape", [(8, 2, 4, 4), (3, 2, 5, 4, 4)], ids=["images", "videos"])
def test_constant_weighting_is_edms_own_loss_and_gradient(net: Net, shape: tuple[int, ...]) -> None:
    images = 0.5 * torch.randn(shape)
    torch.manual_seed(1)
    expected, _ = elementwise(net, images)
    expected_gradients = gradients(net, expected)
    torch.manual_seed(1)
    loss = EDMLoss(sigma_data=SIGMA_DATA, criterion=criterion())(net=net, images=images, labels=None, augment_pipe=None)
    assert loss.shape == images.shape
    assert loss.dtype == torch.float32
    assert ulps(loss.sum(), expected.sum()) <= ULPS
    assert ulps(loss.mean(), expected.mean()) <= ULPS
    by_denoised, *by_parameters = gradients(net, loss)
    assert ulps(by_denoised, expected_gradients[0]) <= ULPS
    for found, wanted in zip(by_parameters, expected_gradients[1:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


def test_constant_weighting_is_edm2s_own_loss_and_gradient_with_its_learned_uncertainty(
    net: Net, images: Tensor
) -> None:
    torch.manual_seed(1)
    expected, _ = elementwise(net, images, -0.4, 1.0, uncertain=True)
    expected_gradients = gradients(net, expected)
    torch.manual_seed(1)
    loss = EDM2Loss(sigma_data=SIGMA_DATA, criterion=criterion())(net=net, images=images, labels=None)
    assert ulps(loss.sum(), expected.sum()) <= ULPS
    by_denoised, *by_parameters = gradients(net, loss)
    assert ulps(by_denoised, expected_gradients[0]) <= ULPS
    assert len(by_parameters) == 6  # the head's among them
    for found, wanted in zip(by_parameters, expected_gradients[1:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_papers_weight_of_the_x0_loss(net: Net, images: Tensor, gamma: float) -> None:
    weighting = vadiff.weighting.MinSNR(gamma, prediction_type="edm", sigma_data=SIGMA_DATA)
    loss = EDMLoss(sigma_data=SIGMA_DATA, criterion=criterion(weighting))(net, images)
    call = net.calls[-1]
    sigma, denoised = (call[name].detach().double().numpy() for name in ("sigma", "denoised"))
    error = (denoised - images.double().numpy()) ** 2
    expected = (np.minimum(sigma**-2.0, gamma) * error).mean((1, 2, 3))
    np.testing.assert_allclose(loss.detach()[:, 0, 0, 0].numpy(), expected, rtol=3e-6)


def test_a_fixed_weighting_by_name_is_made_for_edm_and_its_sigma_data() -> None:
    weighting = EDMLoss(sigma_data=0.7, criterion="min_snr").criterion.weighting
    assert weighting == vadiff.weighting.MinSNR(prediction_type="edm", sigma_data=0.7)


def test_ten_steps_record_what_the_loop_saw(net: Net, images: Tensor) -> None:
    loss_fn = EDMLoss(sigma_data=SIGMA_DATA, criterion=criterion("variance_aware"))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    seen = Seen()
    for _ in range(10):
        optimizer.zero_grad()
        for part in images.split(4):  # gradient accumulation
            loss_fn(net, part).sum().mul(1 / len(images)).backward()
            call = net.calls[-1]
            sigma = call["sigma"].double()
            weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
            error = (call["denoised"].double() - part) ** 2
            seen.add((weight * error).mean((1, 2, 3)), -2 * sigma.flatten().log())
        optimizer.step()
    seen.check(loss_fn.criterion)
    assert loss_fn.criterion.weights.std() > 0.01


def test_weights_scale_whole_samples_and_their_gradients(net: Net, images: Tensor) -> None:
    own = criterion("loss_level", half_life=256.0)
    loss_fn = EDMLoss(sigma_data=SIGMA_DATA, criterion=own)
    for _ in range(20):
        loss_fn(net, 3 * images)
    own.eval()
    torch.manual_seed(1)
    plain, sigma = elementwise(net, images)
    plain_gradient = gradients(net, plain)[0]
    torch.manual_seed(1)
    weighted = loss_fn(net, images)
    weight = own.weight_at(-2 * sigma.flatten().log())[:, None, None, None]
    assert weight.max() / weight.min() > 1.05
    torch.testing.assert_close(weighted.sum(), (weight * plain).sum())
    torch.testing.assert_close(gradients(net, weighted)[0], weight * plain_gradient)


def test_augmented_images_are_the_target_and_the_network_gets_the_labels(images: Tensor) -> None:
    asked: dict[str, Tensor] = {}

    def net(x: Tensor, sigma: Tensor, labels: Tensor | None, **conditions: Tensor) -> Tensor:
        asked.update(conditions)
        return -images  # the augmented images themselves: no error is left

    def augment(clean: Tensor) -> tuple[Tensor, Tensor]:
        return -clean, torch.full((len(clean), 9), 3.0)

    assert float(EDMLoss(criterion="constant")(net, images, None, augment).abs().max()) == 0.0
    assert torch.equal(asked["augment_labels"], torch.full((8, 9), 3.0))
    EDMLoss(criterion="constant")(lambda x, sigma, labels: images, images)  # no augment_labels without a pipe


def test_labels_reach_the_network(images: Tensor) -> None:
    labels = torch.eye(8)[:, :3]
    EDMLoss()(Net(labels=3), images, labels).sum().backward()
    EDM2Loss()(Net(labels=3), images, labels).sum().backward()


def test_where_the_criterion_weighs_edm2s_head_has_a_zero_gradient_and_not_none(net: Net, images: Tensor) -> None:
    loss = EDM2Loss()(net=net, images=images)
    loss.sum().backward()
    assert float(net.head.weight.grad.abs().max()) == 0.0
    assert float(net.conv.weight.grad.abs().max()) > 0.0
    assert float(loss.detach().min()) >= 0.0  # no u in it


def test_head_and_criterion_cannot_both_weigh() -> None:
    with pytest.raises(
        ValueError, match=r"uncertainty is True with VarianceAware.*undo the weighting.*criterion='const"
    ):
        EDM2Loss(uncertainty=True)
    assert not EDM2Loss(criterion="constant", uncertainty=False).uncertainty


def test_a_logvar_that_is_not_one_number_per_sample_is_an_error(images: Tensor) -> None:
    def net(x: Tensor, sigma: Tensor, labels: None, return_logvar: bool) -> tuple[Tensor, Tensor]:
        return x, x

    with pytest.raises(ValueError, match=r"logvar of shape \(8, 2, 4, 4\), expected one number per sample"):
        EDM2Loss()(net, images)


class WithoutHead(nn.Module):
    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (WithoutHead(), "as it takes no return_logvar"),
        (lambda x, sigma, labels, **ignored: x, "but a Tensor"),
        (lambda x, sigma, labels, **ignored: (x, None), r"but \(Tensor, NoneType\)"),
    ],
)
def test_a_network_without_the_head_is_named_and_the_loss_for_it(net: Any, message: str) -> None:
    images = torch.zeros(2, 3, 4, 4)  # as many as there should be parts: a tensor would come apart into two
    with pytest.raises(TypeError, match=rf"net returned no logvar.* {message}.*Use EDMLoss"):
        EDM2Loss()(net, images)


def test_a_type_error_inside_the_network_stays_as_it_is(images: Tensor) -> None:
    def net(x: Tensor, sigma: Tensor, labels: None, return_logvar: bool) -> tuple[Tensor, Tensor]:
        raise TypeError("the network's own")

    with pytest.raises(TypeError, match=r"^the network's own$"):
        EDM2Loss()(net, images)


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        (vadiff.weighting.MinSNR(), r"MinSNR\(prediction_type='epsilon'\), expected 'edm'.*Use MinSNR"),
        (vadiff.weighting.P2(prediction_type="v_prediction"), "expected 'edm'"),
        (vadiff.weighting.MinSNR(prediction_type="edm", sigma_data=1.0), r"sigma_data=1\), expected 0.5"),
    ],
)
def test_fixed_weights_for_another_loss_are_refused(weighting: object, message: str) -> None:
    for loss in (EDMLoss, EDM2Loss):
        with pytest.raises(ValueError, match=message):
            loss(criterion=vadiff.DiffusionLoss(weighting))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"P_std": 0.0}, ValueError, "P_std is 0.0, expected a finite number above 0"),
        ({"sigma_data": -1}, ValueError, "sigma_data is -1"),
        ({"P_mean": float("nan")}, ValueError, "P_mean is nan"),
        ({"criterion": "no_such"}, ValueError, "weighting is 'no_such'"),
        ({"criterion": nn.MSELoss()}, TypeError, "criterion is a MSELoss, expected a vadiff.DiffusionLoss or the name"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EDMLoss(**options)


def test_state_survives_edms_snapshot_and_resume(net: Net, images: Tensor, tmp_path: Path) -> None:
    loss_fn = EDMLoss()
    for _ in range(5):
        loss_fn(net, images)
    snapshot = {"loss_fn": copy.deepcopy(loss_fn).eval().requires_grad_(False).cpu()}
    (tmp_path / "network-snapshot-000005.pkl").write_bytes(pickle.dumps(snapshot))
    resumed = EDMLoss()
    saved = pickle.loads((tmp_path / "network-snapshot-000005.pkl").read_bytes())
    resumed.restore(saved["loss_fn"])
    same_from_here(loss_fn, resumed, net, images)
    assert resumed.criterion.training  # the snapshot was put into eval mode, what trains was not


def test_state_survives_edm2s_checkpoints_which_hold_the_state_dict_of_the_loss(
    net: Net, images: Tensor, tmp_path: Path
) -> None:
    loss_fn = EDM2Loss()
    for _ in range(5):
        loss_fn(net, images)
    torch.save({"loss_fn": loss_fn.state_dict()}, tmp_path / "training-state.pt")
    resumed = EDM2Loss()
    resumed.load_state_dict(torch.load(tmp_path / "training-state.pt", weights_only=True)["loss_fn"])
    same_from_here(loss_fn, resumed, net, images)


def test_a_run_begun_with_the_loops_own_loss_continues_with_the_switch() -> None:
    """EDM's snapshots hold its loss object; EDM2's checkpoints the attributes of its loss as the state."""
    edm_s_own, edm2_s_own = object(), {"P_mean": -0.4, "P_std": 1.0, "sigma_data": 0.5}
    with pytest.raises(RuntimeError, match=r"no statistics .*without vadiff.*fresh_statistics=True"):
        EDMLoss().restore(edm_s_own)
    with pytest.raises(RuntimeError, match=r"no statistics .*without vadiff.*fresh_statistics=True"):
        EDM2Loss().load_state_dict(edm2_s_own)
    with pytest.warns(DiffusionLossWarning, match="the statistics start afresh"):
        EDMLoss(fresh_statistics=True).restore(edm_s_own)
    with pytest.warns(DiffusionLossWarning, match="the statistics start afresh"):
        EDM2Loss(fresh_statistics=True).load_state_dict(edm2_s_own)


def test_the_criterion_can_be_set_by_values_that_json_has(net: Net, images: Tensor) -> None:
    """EDM and EDM2 write the options of their loss as JSON, and make it by them."""
    options = {"criterion": "loss_level", "strength": 0.5, "bins": 64, "log_snr_range": [-10.0, 14.0], "half_life": 512}
    found = EDMLoss(**json.loads(json.dumps(options))).criterion
    expected = vadiff.DiffusionLoss(vadiff.weighting.LossLevel(0.5), 64, (-10.0, 14.0), 512)
    assert found.weighting == expected.weighting
    assert str(found.statistics) == str(expected.statistics)
    capped = EDM2Loss(sigma_data=1.0, criterion="min_snr", gamma=1.0, fresh_statistics=True).criterion
    assert capped.weighting == vadiff.weighting.MinSNR(1.0, prediction_type="edm", sigma_data=1.0)
    with pytest.raises(TypeError, match=r"'strenght'.*Options of the criterion are backend, bins, fresh_stat"):
        EDMLoss(strenght=0.5)
    with pytest.raises(TypeError, match=r"^'gama' is given, which min_snr does not have, expected gamma or "):
        EDMLoss(criterion="min_snr", gama=3.0)
    with pytest.raises(TypeError, match=r"strength given beside a criterion that is no name"):
        EDMLoss(criterion=criterion(), strength=0.5)
    for loss in (EDMLoss, EDM2Loss):
        with pytest.raises(ValueError, match=r"'learned', whose parameters nothing would train: .*net.parameters\(\)"):
            loss(criterion="learned")
        loss(criterion=vadiff.DiffusionLoss("learned"))(net, images).sum().backward()  # for a loop that trains it


def test_edm2s_snapshots_hold_the_loss_on_the_cpu(net: Net, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are pickled from where they train, and a tensor on a GPU cannot be read without one."""
    moved: list[object] = []

    def cpu(self: vadiff.DiffusionLoss) -> vadiff.DiffusionLoss:
        moved.append(self)
        return self

    monkeypatch.setattr(vadiff.DiffusionLoss, "cpu", cpu)
    loss_fn = EDM2Loss()
    for _ in range(5):
        loss_fn(net, images)
    opened = pickle.loads(pickle.dumps({"loss_fn": loss_fn}))["loss_fn"]
    assert len(moved) == 1
    assert moved[0] is not loss_fn.criterion
    assert list(opened._modules) == list(loss_fn._modules)
    same_from_here(loss_fn, opened, net, images)


def same_from_here(one: nn.Module, other: nn.Module, net: Net, images: Tensor) -> None:
    assert round(float(one.criterion.statistics.count.sum())) == 40
    losses = []
    for loss_fn in (one, other):
        torch.manual_seed(2)
        losses.append(torch.stack([loss_fn(net, images).detach() for _ in range(3)]))
    assert torch.equal(*losses)
    assert torch.equal(one.criterion.statistics.state, other.criterion.statistics.state)


def test_autocast_and_a_gradient_scaler_change_neither_statistics_nor_direction(net: Net, images: Tensor) -> None:
    loss_fn, results = EDMLoss(sigma_data=SIGMA_DATA, criterion=criterion()), []
    for scale in (1.0, 2.0**12):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        torch.manual_seed(3)
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_fn(net, images).sum() / len(images)
        scaler.scale(loss).backward()
        results.append(net.conv.weight.grad / scale)
    torch.testing.assert_close(*results)
    assert loss_fn.criterion.statistics.count.sum() == 16
    assert loss_fn.criterion.statistics.skipped == 0


def test_a_network_frozen_but_for_one_layer_trains_that_layer(net: Net, images: Tensor) -> None:
    net.requires_grad_(False)
    net.level.requires_grad_(True)
    loss_fn = EDMLoss()
    loss_fn(net, images).sum().backward()
    assert net.conv.weight.grad is None
    assert float(net.level.weight.grad.abs().max()) > 0.0
    assert loss_fn.criterion.statistics.count.sum() == 8


def test_evaluation_records_nothing(net: Net, images: Tensor) -> None:
    loss_fn = EDMLoss()
    with torch.no_grad():
        loss_fn(net, images)
    loss_fn.eval()(net, images)
    assert loss_fn.criterion.statistics.count.sum() == 0
