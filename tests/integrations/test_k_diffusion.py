"""k-diffusion's own Denoisers, each with its own loss: the criterion only weighs and records what they return.

With constant weighting loss and gradient are therefore the denoiser's to the last bit.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from seen import Seen
from torch import Tensor, nn

import vadiff
from vadiff.errors import DiffusionLossWarning
from vadiff.extras import MissingExtraError
from vadiff.integrations.k_diffusion import SigmaWeighting, WeightedDenoiser, import_k_diffusion

SIGMA_DATA = 0.5


@pytest.fixture(scope="module")
def layers() -> ModuleType:
    try:
        return import_k_diffusion().layers
    except MissingExtraError as error:
        pytest.skip(str(error))


class Inner(nn.Module):
    """F: one convolution, its output moved by the noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.level = nn.Linear(1, 2)

    def forward(self, x: Tensor, sigma: Tensor, aug_cond: Tensor | None = None, return_variance: bool = False) -> Any:
        output = self.conv(x) + self.level(sigma.log()[:, None])[:, :, None, None]
        output = output if aug_cond is None else output + aug_cond
        return (output, self.level(sigma[:, None]).mean(1)) if return_variance else output


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.conv(x)


def batch(seed: int, shape: tuple[int, ...] = (8, 2, 8, 8)) -> tuple[Tensor, Tensor, Tensor]:
    """Clean images, noise, sigma."""
    generator = torch.Generator().manual_seed(seed)
    sigma = (-1.2 + 1.2 * torch.randn(shape[0], generator=generator)).exp()
    return 0.5 * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), sigma


def criterion(weighting: object = "constant") -> vadiff.DiffusionLoss:
    return vadiff.DiffusionLoss(weighting, bins=16, log_snr_range=(-8.0, 8.0), half_life=float("inf"))


def loss_and_gradients(denoiser: nn.Module, inner: nn.Module, *given: Tensor, **extra: Tensor) -> list[Tensor]:
    inner.zero_grad()
    losses = denoiser.loss(*given, **extra)
    losses.mean().backward()
    return [losses.detach(), *(p.grad.clone() for p in inner.parameters() if p.grad is not None)]


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # k-diffusion, where scales is not 1
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Denoiser", {}),
        ("Denoiser", {"weighting": "soft-min-snr"}),
        ("Denoiser", {"weighting": "snr"}),
        ("Denoiser", {"scales": 2}),
        ("SimpleLossDenoiser", {}),
        ("DenoiserWithVariance", {}),
    ],
)
def test_constant_weighting_is_the_denoisers_own_loss_and_gradient_to_the_bit(
    layers: ModuleType, name: str, options: dict[str, object]
) -> None:
    inner = Inner()
    own = getattr(layers, name)(inner, sigma_data=SIGMA_DATA, **options)
    weighted = WeightedDenoiser(own, criterion())
    expected = loss_and_gradients(own, inner, *batch(0), aug_cond=torch.tensor(0.5))
    found = loss_and_gradients(weighted, inner, *batch(0), aug_cond=torch.tensor(0.5))
    assert len(found) == len(expected) == 5
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert weighted.criterion.statistics.count.sum() == 8


def test_videos_have_one_weight_each(layers: ModuleType) -> None:
    inner = Volume()
    own = layers.Denoiser(inner, sigma_data=SIGMA_DATA)
    given = batch(0, (3, 2, 4, 8, 8))
    expected = loss_and_gradients(own, inner, *given)
    found = loss_and_gradients(WeightedDenoiser(own, criterion()), inner, *given)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("name", "form"), [("Denoiser", "edm"), ("SimpleLossDenoiser", "epsilon")])
def test_min_snr_is_the_papers_weight_of_the_x0_loss(layers: ModuleType, name: str, form: str) -> None:
    denoiser = getattr(layers, name)(Inner(), sigma_data=SIGMA_DATA)
    clean, noise, sigma = batch(0)
    weighted = WeightedDenoiser(denoiser, "min_snr")
    assert weighted.criterion.weighting.prediction_type == form
    found = weighted.loss(clean, noise, sigma)
    denoised = denoiser(clean + noise * sigma[:, None, None, None], sigma).detach().double()
    error = (denoised - clean.double()).square().mean((1, 2, 3)).numpy()
    expected = np.minimum(sigma.double().numpy() ** -2, 5.0) * error
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=2e-5)


def test_a_weighting_callable_is_min_snr_of_the_f_loss(layers: ModuleType) -> None:
    denoiser = layers.Denoiser(Inner(), sigma_data=SIGMA_DATA)
    clean, noise, sigma = batch(0)
    plain = denoiser.loss(clean, noise, sigma).detach()
    denoiser.weighting = SigmaWeighting("min_snr", sigma_data=SIGMA_DATA)
    snr = sigma.double().numpy() ** -2
    expected = plain.double().numpy() * np.minimum(snr, 5.0) / (snr + 1 / SIGMA_DATA**2)
    np.testing.assert_allclose(denoiser.loss(clean, noise, sigma).detach().numpy(), expected, rtol=1e-6)


def test_soft_min_snr_of_the_same_sigma_data_is_k_diffusions_own(layers: ModuleType) -> None:
    own = layers.Denoiser(Inner(), sigma_data=SIGMA_DATA, weighting="soft-min-snr")
    weighting = vadiff.weighting.SoftMinSNR(1 / SIGMA_DATA**2, prediction_type="edm", sigma_data=SIGMA_DATA)
    sigma = torch.logspace(-2, 2, 32)
    ours = SigmaWeighting(vadiff.DiffusionLoss(weighting), sigma_data=SIGMA_DATA)
    torch.testing.assert_close(ours(sigma), own.weighting(sigma))


def test_weights_of_another_runs_statistics_can_be_used_as_they_are(layers: ModuleType) -> None:
    trained = criterion("loss_level")
    for _ in range(8):
        trained.reweight(torch.rand(64, requires_grad=True) + 0.1, torch.linspace(-6, 6, 64))
    recorded = trained.statistics.state.clone()
    denoiser = layers.Denoiser(Inner())
    denoiser.weighting = SigmaWeighting(trained)
    sigma = torch.logspace(-1, 1, 8)
    assert torch.equal(denoiser.weighting(sigma), trained.weight_at(-2 * sigma.log()))
    denoiser.loss(*batch(0)).mean().backward()
    assert torch.equal(trained.statistics.state, recorded)


def test_ten_steps_record_what_the_denoiser_saw(layers: ModuleType) -> None:
    inner = Inner()
    model = WeightedDenoiser(layers.Denoiser(inner, sigma_data=SIGMA_DATA), criterion("variance_aware"))
    optimizer = torch.optim.AdamW(model.inner_model.parameters(), lr=1e-2)
    assert model.inner_model is inner
    seen = Seen()
    for step in range(10):
        optimizer.zero_grad()
        for accumulated in range(2):
            clean, noise, sigma = batch(2 * step + accumulated)
            with torch.no_grad():
                level = sigma[:, None, None, None]
                root = (level**2 + SIGMA_DATA**2).sqrt()
                target = (level / SIGMA_DATA * clean - SIGMA_DATA * noise) / root  # what F has to say
                error = inner((clean + noise * level) / root, sigma) - target
                seen.add(error.square().mean((1, 2, 3)), -2 * sigma.log())
            (model.loss(clean, noise, sigma).mean() / 2).backward()
        optimizer.step()
    seen.check(model.criterion, rtol=1e-5)
    assert model.criterion.weights.std() > 0.01


def test_it_denoises_as_before(layers: ModuleType) -> None:
    own = layers.Denoiser(Inner(), sigma_data=SIGMA_DATA)
    clean, _, sigma = batch(0)
    assert torch.equal(WeightedDenoiser(own)(clean, sigma), own(clean, sigma))


def test_state_survives_a_save_of_its_own_beside_the_inner_models(layers: ModuleType, tmp_path: Path) -> None:
    model = WeightedDenoiser(layers.Denoiser(Inner()))
    for seed in range(4):
        model.loss(*batch(seed))
    # train.py: {"model": inner_model.state_dict(), ...}, here with one entry more
    saved = {"model": model.inner_model.state_dict(), "criterion": model.criterion.state_dict()}
    torch.save(saved, tmp_path / "checkpoint.pth")
    resumed = WeightedDenoiser(layers.Denoiser(Inner()))
    loaded = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    resumed.inner_model.load_state_dict(loaded["model"])
    resumed.criterion.load_state_dict(loaded["criterion"])
    for other in (resumed, copy.deepcopy(model)):
        assert torch.equal(other.criterion.statistics.state, model.criterion.statistics.state)
    assert torch.equal(resumed.loss(*batch(9)), model.loss(*batch(9)))


def test_the_names_of_parameters_and_buffers_are_the_denoisers_as_train_py_compares_them(layers: ModuleType) -> None:
    own = layers.Denoiser(Inner())
    model = WeightedDenoiser(own, vadiff.DiffusionLoss("learned"))
    average = copy.deepcopy(own)
    layers.utils.ema_update(model, average, 0.5)
    assert dict(model.named_parameters()).keys() == dict(average.named_parameters()).keys()
    assert all(parameter is not model.criterion.weighting.weight for parameter in model.parameters())
    saved = model.state_dict()
    assert {"denoiser.inner_model.conv.weight", "criterion.statistics.state"} < saved.keys()
    model.to(torch.float64)
    assert model.inner_model.conv.weight.dtype is torch.float64


def test_a_checkpoint_without_the_criterion_needs_the_switch(layers: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"no statistics .*without vadiff.*fresh_statistics=True"):
        WeightedDenoiser(layers.Denoiser(Inner())).criterion.load_state_dict({})
    model = WeightedDenoiser(layers.Denoiser(Inner()), "loss_level", strength=0.5, fresh_statistics=True)
    assert model.criterion.weighting == vadiff.weighting.LossLevel(strength=0.5)
    with pytest.warns(DiffusionLossWarning, match="the statistics start afresh: the saved state has no"):
        model.criterion.load_state_dict({})


def test_autocast_and_a_gradient_scaler_change_neither_statistics_nor_direction(layers: ModuleType) -> None:
    inner, results = Inner(), []
    model = WeightedDenoiser(layers.Denoiser(inner), criterion())
    for scale in (1.0, 2.0**12):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        inner.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(*batch(0)).mean()
        scaler.scale(loss).backward()
        results.append(inner.conv.weight.grad / scale)
    torch.testing.assert_close(*results)
    assert model.criterion.statistics.count.sum() == 16


def test_what_a_mask_leaves_goes_through_the_criterion(layers: ModuleType) -> None:
    model = WeightedDenoiser(layers.Denoiser(Inner()), criterion())
    clean, noise, sigma = batch(0)
    masked = model.denoiser.loss(clean, noise, sigma) * (torch.arange(8) % 2)
    weighted = model.criterion.reweight(masked, vadiff.log_snr.from_sigma(sigma), (torch.arange(8) % 2).float())
    assert torch.equal(weighted, masked)
    assert model.criterion.statistics.count.sum() == 4


@pytest.mark.parametrize(
    ("options", "weighting", "message"),
    [
        ({}, vadiff.weighting.MinSNR(), r"MinSNR\(prediction_type='epsilon'\), expected 'edm'"),
        ({}, vadiff.weighting.MinSNR(prediction_type="edm"), r"sigma_data=0.5\), expected 1: the trainer's"),
        ({"weighting": "soft-min-snr"}, "min_snr", "has a weighting of its own, which MinSNR would multiply"),
        ({}, "no_such", "weighting is 'no_such'"),
    ],
)
def test_fixed_weights_for_another_loss_or_twice_are_refused(
    layers: ModuleType, options: dict[str, str], weighting: object, message: str
) -> None:
    given = weighting if isinstance(weighting, str) else vadiff.DiffusionLoss(weighting)
    with pytest.raises(ValueError, match=message):
        WeightedDenoiser(layers.Denoiser(Inner(), **options), given)


def test_what_would_fight_the_weighting_is_refused(layers: ModuleType) -> None:
    with pytest.raises(
        ValueError, match=r"criterion is 'learned', whose parameters nothing would train: .*'loss_level'"
    ):
        WeightedDenoiser(layers.Denoiser(Inner()), "learned")
    with pytest.raises(TypeError, match="DenoiserWithVariance, which learns a weight"):
        WeightedDenoiser(layers.DenoiserWithVariance(Inner()))
    with pytest.raises(TypeError, match=r"denoiser is a Inner, expected a k_diffusion.layers.Denoiser"):
        WeightedDenoiser(Inner())
    with pytest.raises(ValueError, match="loss='huber', expected 'mse': the trainer computes the loss"):
        WeightedDenoiser(layers.Denoiser(Inner()), vadiff.DiffusionLoss(loss="huber"))


def test_weights_that_would_never_adapt_or_need_more_than_sigma_are_refused() -> None:
    for name in ("variance_aware", "learned", "loss_zscore"):
        with pytest.raises(ValueError, match=f"criterion is '{name}', which needs statistics, .* Use WeightedDenoiser"):
            SigmaWeighting(name)
    with pytest.raises(ValueError, match="depends on more than sigma"):
        SigmaWeighting(vadiff.DiffusionLoss("loss_zscore"))


def test_a_sigma_that_would_broadcast_over_the_wrong_axis_is_refused(layers: ModuleType) -> None:
    model = WeightedDenoiser(layers.Denoiser(Inner()))
    clean, noise, sigma = batch(0)
    with pytest.raises(ValueError, match=r"sigma has shape \(8, 1, 1, 1\), expected \(B,\)"):
        model.loss(clean, noise, sigma[:, None, None, None])
    assert model.criterion.statistics.count.sum() == 0


def test_a_left_out_part_of_k_diffusion_says_why(layers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "k_diffusion"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "skimage", None)
    package = import_k_diffusion()
    assert package.layers.Denoiser(Inner()).sigma_data == 1.0
    with pytest.raises(
        AttributeError, match=r"k_diffusion.augmentation could not be imported: .*skimage.*pip install jsonmerge"
    ):
        package.augmentation.KarrasAugmentWrapper  # noqa: B018
    for name in [name for name in sys.modules if name.partition(".")[0] == "k_diffusion"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(MissingExtraError, match=r"cannot be imported.*pip install --no-deps dctorch k-diffusion"):
        import_k_diffusion()


def test_clip_is_imported_without_the_pkg_resources_that_setuptools_has_no_longer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "clip", raising=False)
    (tmp_path / "clip.py").write_text(
        "from pkg_resources import packaging\nversion = packaging.version.parse('2.13')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    other = ModuleType("pkg_resources")
    monkeypatch.setitem(sys.modules, "pkg_resources", other)
    try:
        import_k_diffusion()
    except MissingExtraError as error:
        pytest.skip(str(error))
    assert sys.modules.pop("clip").version.major == 2
    assert sys.modules["pkg_resources"] is other


def test_noise_levels_are_those_of_its_configs() -> None:
    """k-diffusion draws with noise falling in u; split-lognormal draws side and distance apart, so by distribution."""
    try:
        utils = import_k_diffusion().utils
    except MissingExtraError as error:
        pytest.skip(str(error))
    cut = (-2.0 * np.log(1e3), -2.0 * np.log(1e-3))
    drawn = {
        vadiff.levels.CosineInterpolated(256, 32, 128, 0.5): utils.rand_cosine_interpolated,
        vadiff.levels.Shift(vadiff.levels.CosMap(), 0.5, cut): utils.rand_v_diffusion,
        vadiff.levels.LogLogistic(np.log(0.5), 0.5, cut): utils.rand_log_logistic,
    }
    options: list[dict[str, float]] = [
        {"image_d": 256, "noise_d_low": 32, "noise_d_high": 128, "sigma_data": 0.5},
        {"sigma_data": 0.5, "min_value": 1e-3, "max_value": 1e3},
        {"loc": np.log(0.5), "scale": 0.5, "min_value": 1e-3, "max_value": 1e3},
    ]
    for (ours, theirs), given in zip(drawn.items(), options, strict=True):
        torch.manual_seed(0)
        expected = theirs((400,), dtype=torch.float64, **given)
        torch.manual_seed(0)
        u = torch.rand(400, dtype=torch.float64)
        found = ours(1.0 - u if "Cosine" in repr(ours) else u).sigma
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    sigma = utils.rand_split_log_normal((40_000,), -0.4, 0.5, 1.5)
    u = vadiff.levels.SplitLogNormal(-0.4, 0.5, 1.5).cdf(vadiff.log_snr.from_sigma(sigma)).sort().values
    assert (u - torch.linspace(0, 1, 40_000)).abs().max() < 0.01  # Kolmogorov: above 0.0098 once in 1,000 seeds
