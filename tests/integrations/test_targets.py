"""Posterior-mean targets in trainers' losses: against the targets themselves, and against the ideal network."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vadiff
from vadiff.integrations import lucidrains
from vadiff.integrations.diffusers import log_snr_of, scheduler_loss
from vadiff.integrations.edm import EDM2Loss, EDMLoss
from vadiff.integrations.flow_matching import FlowMatchingLoss
from vadiff.targets import PosteriorMean

SHAPE = (2, 4, 4)


@pytest.fixture(scope="module")
def data() -> Tensor:
    return 0.5 * torch.randn(60, *SHAPE, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def classes() -> Tensor:
    return (torch.arange(60) % 5).clamp(max=1)  # unequal


class Ideal(nn.Module):
    """The ideal denoiser of a data set or, told the class one-hot, of the class; also called as EDM2's networks are."""

    def __init__(self, data: Tensor, classes: Tensor | None = None) -> None:
        super().__init__()
        self.data, self.classes = data.flatten(1).double(), classes
        self.scale = nn.Parameter(torch.ones(()))

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, return_logvar: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        distance = (x.flatten(1).double()[:, None] - self.data).square().sum(2)
        logits = -distance / (2 * sigma.flatten().double()[:, None] ** 2)
        if labels is not None and self.classes is not None:
            logits = logits.masked_fill(labels.argmax(1)[:, None] != self.classes, -torch.inf)
        denoised = self.scale * (logits.softmax(1) @ self.data).view_as(x).float()
        return (denoised, torch.zeros(len(x), 1, 1, 1)) if return_logvar else denoised


def one_hot(classes: Tensor) -> Tensor:
    return nn.functional.one_hot(classes, 2).float()


@pytest.mark.parametrize("loss_of", [EDMLoss, EDM2Loss])
def test_edms_loss_of_the_ideal_denoiser_is_zero_with_the_posterior_mean_as_target(loss_of: Any, data: Tensor) -> None:
    rows = torch.arange(12)
    net = Ideal(data)
    plain, ideal = (loss_of(P_mean=0.0, target=target) for target in (None, PosteriorMean(data)))
    losses = []
    for loss_fn in (plain, ideal):
        torch.manual_seed(0)
        losses.append(loss_fn(net, data[rows], torch.zeros(12, 0)))
    assert losses[1].shape == data[rows].shape
    assert float(losses[0].detach().mean()) > 0.1
    assert float(losses[1].detach().mean()) < 1e-6
    sums = ideal.criterion.target.removed.sums.view(torch.float64)
    assert float(sums[0].sum()) == 12
    assert float(sums[1].sum()) > 0


def test_edms_classes_are_those_of_the_references(data: Tensor, classes: Tensor) -> None:
    loss_fn = EDMLoss(P_mean=0.5, target=PosteriorMean(data, labels=classes))
    rows = torch.arange(20)
    assert float(loss_fn(Ideal(data, classes), data[rows], one_hot(classes[rows])).detach().mean()) < 1e-6
    with pytest.raises(ValueError, match="labels is None, but the reference has labels"):
        loss_fn(Ideal(data), data[rows])
    with pytest.raises(ValueError, match="labels is given, but the reference has none"):
        EDMLoss(target=PosteriorMean(data))(Ideal(data, classes), data[rows], one_hot(classes[rows]))
    with pytest.raises(ValueError, match=r"labels has shape \(20,\), expected \(B, C\), one-hot"):
        loss_fn(lambda x, sigma, labels: x, data[rows], classes[rows])


def test_edms_augmentation_that_the_network_is_told_of_is_refused_with_a_target(data: Tensor) -> None:
    def augment(images: Tensor) -> tuple[Tensor, Tensor]:
        return images, torch.zeros(len(images), 9)

    loss_fn = EDMLoss(target=PosteriorMean(data))
    with pytest.raises(ValueError, match=r"augment_pipe is given with a target.*told how each image was augmented"):
        loss_fn(Ideal(data), data[:8], None, augment)


def test_in_eval_mode_losses_are_against_the_data(data: Tensor) -> None:
    net = Ideal(data)
    losses = []
    for target in (None, PosteriorMean(data)):
        torch.manual_seed(0)
        losses.append(EDMLoss(target=target).eval()(net, data[:8]))
    assert torch.equal(*losses)


@pytest.mark.parametrize("loss_of", [EDMLoss, EDM2Loss])
def test_snapshots_of_edm_do_not_hold_the_references(loss_of: Any, data: Tensor) -> None:
    loss_fn = loss_of(target=PosteriorMean(torch.cat([data] * 100)))
    loss_fn(Ideal(data), data[:8])
    for saved in (pickle.dumps(loss_fn), pickle.dumps(copy.deepcopy(loss_fn))):
        assert len(saved) < 100_000
        opened = pickle.loads(saved)
        log_snr = torch.linspace(-6, 6, 5)
        recorded = opened.criterion.target
        assert torch.equal(recorded.removed_error(log_snr), loss_fn.criterion.target.removed_error(log_snr))
        assert recorded.description == loss_fn.criterion.target.description
        resumed = loss_of(target=PosteriorMean(data))
        resumed.load_state_dict(opened.state_dict())  # as EDM resumes
        assert torch.equal(resumed.criterion.target.removed.sums, recorded.removed.sums)
        assert torch.equal(opened.criterion.statistics.state, loss_fn.criterion.statistics.state)
    assert isinstance(loss_fn.criterion.target, PosteriorMean)
    resumed.load_state_dict(loss_fn.state_dict())  # as EDM2 resumes
    assert torch.equal(resumed.criterion.target.removed.sums, loss_fn.criterion.target.removed.sums)


@pytest.mark.parametrize(
    ("options", "is_kept"), [({"subset": 60}, True), ({"subset": 60, "sync": False}, False), ({"bank": 60}, False)]
)
def test_snapshots_hold_on_several_ranks_what_is_the_same_on_all(
    options: dict[str, Any], is_kept: bool, data: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EDM compares what the ranks save."""
    loss_fn = EDMLoss(target=PosteriorMean(None if "bank" in options else data, **options))
    loss_fn(Ideal(data), data[:8])
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    assert (copy.deepcopy(loss_fn).criterion.target is not None) == is_kept
    assert loss_fn.criterion.target is not None


@pytest.mark.parametrize("data_at", [0, 1])
def test_flow_matchings_loss_of_the_ideal_velocity_is_zero(data_at: int, data: Tensor) -> None:
    loss_fn = FlowMatchingLoss("constant", data_at=data_at, target=PosteriorMean(data))
    rows = torch.arange(16)
    clean, noise, t = data[rows], torch.randn(16, *SHAPE), torch.linspace(0.02, 0.98, 16)
    alpha, sigma = ((1 - t), t) if data_at == 0 else (t, 1 - t)
    a, s = (value.view(-1, 1, 1, 1) for value in (alpha, sigma))
    noisy = a * clean + s * noise
    denoised = Ideal(data)(noisy / a, sigma / alpha).detach()
    velocity = (noisy - a * denoised) / s - denoised  # noise minus data
    found = loss_fn(velocity if data_at == 0 else -velocity, clean, t, noise=noise, index=rows)
    plain = FlowMatchingLoss("constant", data_at=data_at)(
        velocity if data_at == 0 else -velocity, clean, t, noise=noise
    )
    assert float(found) < 1e-5 * float(plain)
    assert loss_fn.criterion.target.removed_error(torch.tensor([-4.0])) > 0


def test_torchcfms_loop_keeps_its_loss_near_the_data_bit_by_bit(data: Tensor) -> None:
    torchcfm = pytest.importorskip("torchcfm", reason="torchcfm is not installed")
    target = PosteriorMean(data, threshold=0.5)
    loss_fn = FlowMatchingLoss("constant", target=target)
    x1 = data[:16]
    for _ in range(30):  # enough draws at low noise to know that nothing is removed there
        target(x1, x1 + 0.05 * torch.randn_like(x1), 1.0, 0.05)
    x0 = torch.randn_like(x1)
    near = torch.full((16,), 1 / 1.05)
    t, xt, _ = torchcfm.ConditionalFlowMatcher(sigma=0.0).sample_location_and_conditional_flow(x0, x1, near)
    vt = 0.5 * xt
    assert torch.equal(loss_fn(vt, x1, t, noise=x0), FlowMatchingLoss("constant")(vt, x1, t, noise=x0))


def test_flow_matching_needs_data_and_noise_and_no_noise_on_top(data: Tensor) -> None:
    loss_fn = FlowMatchingLoss(target=PosteriorMean(data))
    with pytest.raises(ValueError, match=r"noise is None with a posterior-mean target.*criterion\(vt, x1, t, noise=x0"):
        loss_fn(data, data, torch.rand(60))
    with pytest.raises(ValueError, match=r"sigma is 0.1 with a target, expected 0"):
        FlowMatchingLoss(sigma=0.1, target=PosteriorMean(data))
    with pytest.raises(TypeError, match=r"target is a str, expected a vadiff.targets.PosteriorMean"):
        FlowMatchingLoss(target="posterior")


class Model(nn.Module):
    """What denoising-diffusion-pytorch asks of a network."""

    channels = out_dim = 2
    self_condition = False
    random_or_learned_sinusoidal_cond = False

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, times: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        self.seen.append(x)
        return self.conv(x)


class LevelModel(Model):
    random_or_learned_sinusoidal_cond = True


def gaussian(objective: str = "pred_v", **options: Any) -> Any:
    ddpm = pytest.importorskip("denoising_diffusion_pytorch", reason="denoising-diffusion-pytorch is not installed")
    return ddpm.GaussianDiffusion(Model(), image_size=4, timesteps=100, objective=objective, **options)


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_lucidrains_noisy_samples_stay_and_the_targets_are_posterior_means(objective: str, data: Tensor) -> None:
    own = gaussian(objective)
    reference = own.normalize(data)
    targets = PosteriorMean(reference)
    replaced = lucidrains.attach(copy.deepcopy(own), "constant", target=targets)
    times = torch.arange(0, 96, 6)
    images = data[:16]
    torch.manual_seed(1)
    plain = own(images, times=times, loss_reduction="none")
    torch.manual_seed(1)
    losses = replaced(images, times=times, loss_reduction="none")
    torch.testing.assert_close(replaced.model.seen[-1], own.model.seen[-1], rtol=1e-4, atol=1e-5)

    torch.manual_seed(1)
    noise = torch.randn_like(images)
    alpha_bar = own.alphas_cumprod[times]
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x0_hat, noise_hat = PosteriorMean(reference).pair(reference[:16], noise, alpha, sigma)
    a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    wanted = {"pred_noise": noise_hat, "pred_x0": x0_hat, "pred_v": a * noise_hat - s * x0_hat}[objective]
    expected = (replaced.model.conv(own.model.seen[-1]) - wanted).square().mean((1, 2, 3)) * own.loss_weight[times]
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-5)
    assert ((losses - plain).abs() > 1e-3 * plain).any()
    assert replaced.criterion.target is targets


def test_lucidrains_evaluates_against_the_data(data: Tensor) -> None:
    own = gaussian()
    replaced = lucidrains.attach(copy.deepcopy(own), "constant", target=PosteriorMean(own.normalize(data)))
    losses = []
    for diffusion in (own.eval(), replaced.eval()):
        torch.manual_seed(1)
        losses.append(diffusion(data[:8]))
    assert torch.equal(*losses)


def test_lucidrains_sequences_take_targets_too(data: Tensor) -> None:
    ddpm = pytest.importorskip("denoising_diffusion_pytorch", reason="denoising-diffusion-pytorch is not installed")

    class Sequences(Model):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 3, padding=1)  # type: ignore[assignment]

    own = ddpm.GaussianDiffusion1D(Sequences(), seq_length=16, timesteps=100, objective="pred_x0")
    sequences = data.flatten(2)
    lucidrains.attach(own, "constant", target=PosteriorMean(own.normalize(sequences)))
    own(sequences[:8], times=torch.full((8,), 90)).backward()
    assert float(own.criterion.target.removed.sums.view(torch.float64)[0].sum()) == 8
    with pytest.raises(ValueError, match="model_forward_kwargs is given with a target"):
        own(sequences[:8], model_forward_kwargs={"text": ["a"] * 8})


def test_lucidrains_diffusions_without_free_noise_are_refused(data: Tensor) -> None:
    ddpm = pytest.importorskip("denoising_diffusion_pytorch", reason="denoising-diffusion-pytorch is not installed")
    targets = PosteriorMean(2 * data - 1)
    elucidated = ddpm.ElucidatedDiffusion(LevelModel(), image_size=4, channels=2)
    with pytest.raises(ValueError, match=r"ElucidatedDiffusion, expected None: its noise cannot be given.*EDMLoss"):
        lucidrains.attach(elucidated, target=targets)
    with pytest.raises(ValueError, match=r"offset_noise_strength=0.1 with a target"):
        lucidrains.attach(gaussian(offset_noise_strength=0.1), target=targets)
    with pytest.raises(ValueError, match="immiscible=True with a target"):
        lucidrains.attach(gaussian(immiscible=True), target=targets)

    def net(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:  # what the error suggests
        denoised: Tensor = elucidated.preconditioned_network_forward(x, sigma.flatten())
        return denoised

    EDMLoss(target=targets)(net, 2 * data[:8] - 1).sum().backward()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_one_call_before_diffusers_loss_gives_the_ideal_network_no_loss(prediction_type: str, data: Tensor) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction_type)
    criterion = vadiff.DiffusionLoss("constant")
    criterion.target = PosteriorMean(data)
    clean, noise = data[:16], torch.randn(16, *SHAPE)
    timesteps = torch.linspace(50, 999, 16).long()
    log_snr = log_snr_of(scheduler, timesteps)
    alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()

    noisy, a, s = scheduler.add_noise(clean, noise, timesteps), alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    denoised = Ideal(data)(noisy / a, sigma / alpha).detach()
    of_noise = (noisy - a * denoised) / s
    ideal = {"epsilon": of_noise, "sample": denoised, "v_prediction": a * of_noise - s * denoised}[prediction_type]

    x0_hat, noise_hat = criterion.target.pair(clean, noise, alpha, sigma)
    found = scheduler_loss(criterion, scheduler, ideal, x0_hat, noise_hat, timesteps)
    plain = scheduler_loss(criterion, scheduler, ideal, clean, noise, timesteps)
    assert float(found) < 1e-4 * float(plain)


def test_copies_of_edms_loss_without_references_do_not_train(data: Tensor) -> None:
    loss_fn = EDMLoss(target=PosteriorMean(data))
    loss_fn(Ideal(data), data[:8])
    copied = copy.deepcopy(loss_fn)
    with pytest.raises(ValueError, match="without references: make the loss anew with target="):
        copied(Ideal(data), data[:8])
    copied.eval()(Ideal(data), data[:8])
    resumed = EDMLoss(target=PosteriorMean(data))
    resumed.load_state_dict(copied.state_dict())
    resumed(Ideal(data), data[:8])


def test_edm_refuses_conditions_that_are_no_classes(data: Tensor) -> None:
    loss_fn = EDMLoss(target=PosteriorMean(data))
    with pytest.raises(ValueError, match=r"labels has shape .*, expected \(B, C\), one-hot: a target needs classes"):
        loss_fn(Ideal(data), data[:8], torch.randn(8, 16))


def test_flow_matching_knows_its_arguments(data: Tensor) -> None:
    loss_fn = FlowMatchingLoss("constant")
    velocity, t = torch.zeros(8, *SHAPE), torch.rand(8)
    with pytest.raises(TypeError, match="nonsense"):
        loss_fn(velocity, data[:8], t, nonsense=1)
    with pytest.raises(ValueError, match="index, labels or generator is given without a target"):
        loss_fn(velocity, data[:8], t, index=torch.arange(8))
