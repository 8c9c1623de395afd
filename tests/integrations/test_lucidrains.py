"""denoising-diffusion-pytorch: its diffusions compute their losses by their own code, the criterion weighs and records.

With constant weighting loss and gradient are therefore the diffusion's to the last bit, random numbers included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seen import Seen
from torch import Tensor, nn

import vadiff
from vadiff.errors import DiffusionLossWarning
from vadiff.integrations import lucidrains

ddpm: Any = pytest.importorskip("denoising_diffusion_pytorch", reason="denoising-diffusion-pytorch is not installed")

OBJECTIVES = ["pred_noise", "pred_x0", "pred_v"]
MakeDiffusion = Callable[..., nn.Module]


class Model(nn.Module):
    """What the library asks of a network, and two layers."""

    channels = out_dim = 1
    self_condition = False
    random_or_learned_sinusoidal_cond = False

    def __init__(self, dimensions: int = 2) -> None:
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d)[dimensions - 1](1, 1, 3, padding=1)
        self.level = nn.Linear(1, 1)
        self.calls: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor, times: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        level = self.level(times.float()[:, None] / 100)
        output = self.conv(x) + level.reshape(-1, *[1] * (x.dim() - 1))
        self.calls.append({"x": x, "times": times, "output": output})
        return output


class LevelModel(Model):
    random_or_learned_sinusoidal_cond = True


def gaussian(objective: str = "pred_v", **options: object) -> nn.Module:
    return ddpm.GaussianDiffusion(Model(), image_size=8, timesteps=100, objective=objective, **options)


def elucidated(**options: object) -> nn.Module:
    return ddpm.ElucidatedDiffusion(LevelModel(), image_size=8, channels=1, **options)


def one_dimensional(objective: str = "pred_v") -> nn.Module:
    return ddpm.GaussianDiffusion1D(Model(1), seq_length=16, timesteps=100, objective=objective)


def criterion(weighting: object = "constant", **options: object) -> vadiff.DiffusionLoss:
    settings = {"bins": 16, "log_snr_range": (-8.0, 8.0), "half_life": float("inf"), **options}
    return vadiff.DiffusionLoss(weighting, **settings)


def images(seed: int = 0) -> Tensor:
    return torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def step(diffusion: nn.Module, given: Tensor, **options: object) -> list[Tensor]:
    """Loss and gradients of one call, from the same random numbers each time."""
    torch.manual_seed(1)
    diffusion.zero_grad()
    loss = diffusion(given, **options)
    loss.mean().backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in diffusion.parameters())]


def parts_of(diffusion: nn.Module, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared x0 error [B], SNR [B], both float64, of the last call: whatever the network predicted."""
    call = {name: value.detach().double() for name, value in diffusion.model.calls[-1].items()}
    alpha_bar = diffusion.alphas_cumprod.double()[call["times"].long()]
    alpha, sigma = (root.sqrt()[:, None, None, None] for root in (alpha_bar, 1 - alpha_bar))
    denoised = {
        "pred_noise": (call["x"] - sigma * call["output"]) / alpha,
        "pred_x0": call["output"],
        "pred_v": alpha * call["x"] - sigma * call["output"],
    }[diffusion.objective]
    return (denoised - (2 * clean.double() - 1)).square().mean((1, 2, 3)), alpha_bar / (1 - alpha_bar), call["times"]


@pytest.mark.parametrize(
    "make", [*(lambda name=name: gaussian(name) for name in OBJECTIVES), elucidated], ids=[*OBJECTIVES, "edm"]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_constant_weighting_is_the_diffusions_own_loss_and_gradient_to_the_bit(
    make: MakeDiffusion, reduction: str
) -> None:
    own = make()
    weighted = lucidrains.attach(copy.deepcopy(own), criterion())
    expected = step(own, images(), loss_reduction=reduction)
    found = step(weighted, images(), loss_reduction=reduction)
    assert expected[0].shape == (() if reduction == "mean" else (8,))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert weighted.criterion.statistics.count.sum() == 8


@pytest.mark.parametrize("options", [{}, {"loss_reduction": "none"}])
def test_sequences_too(options: dict[str, object]) -> None:
    own = one_dimensional()
    weighted = lucidrains.attach(copy.deepcopy(own), criterion())
    sequences = torch.rand(8, 1, 16)
    expected, found = step(own, sequences, **options), step(weighted, sequences, **options)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_papers_weight_of_the_x0_loss_whatever_the_objective(objective: str, gamma: float) -> None:
    diffusion = lucidrains.attach(gaussian(objective), criterion(vadiff.weighting.MinSNR(gamma)))
    losses = diffusion(images(), loss_reduction="none").detach()
    error, snr, _ = parts_of(diffusion, images())
    np.testing.assert_allclose(losses.numpy(), (snr.clamp(max=gamma) * error).numpy(), rtol=2e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_min_snr_is_what_the_library_means_by_it(objective: str) -> None:
    library = gaussian(objective, min_snr_loss_weight=True)
    ours = gaussian(objective)
    ours.load_state_dict(library.state_dict() | {"loss_weight": ours.loss_weight})
    lucidrains.attach(ours, "min_snr")
    for found, expected in zip(step(ours, images()), step(library, images()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_min_snr_of_elucidated_diffusion_is_that_of_d(monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion = lucidrains.attach(elucidated(), "min_snr")
    sigma = torch.logspace(-1, 1, 8)
    torch.manual_seed(1)
    losses = diffusion(images(), sigma=sigma, loss_reduction="none").detach()
    noisy = diffusion.net.calls[-1]["x"] * (sigma**2 + 0.5**2).sqrt()[:, None, None, None]
    denoised = diffusion.preconditioned_network_forward(noisy, sigma).detach()
    error = (denoised - (2 * images() - 1)).double().square().mean((1, 2, 3))
    np.testing.assert_allclose(losses.numpy(), (sigma.double() ** -2).clamp(max=5) * error, rtol=2e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ten_steps_record_what_the_trainer_saw(objective: str) -> None:
    diffusion = lucidrains.attach(gaussian(objective), criterion("variance_aware"))
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-2)
    seen = Seen()
    for number in range(10):
        optimizer.zero_grad()
        for part in images(number).split(4):  # gradient accumulation
            (diffusion(part) / 2).backward()
            error, snr, _ = parts_of(diffusion, part)
            seen.add(snr * error, snr.log())  # the library's weights make every objective the epsilon loss
        optimizer.step()
    seen.check(diffusion.criterion, rtol=1e-3)
    assert diffusion.criterion.weights.std() > 0.01


def test_given_noise_levels_are_the_ones_used() -> None:
    times = torch.arange(8) * 12
    diffusion = lucidrains.attach(gaussian(), criterion())
    diffusion(images(), times=times)
    assert torch.equal(diffusion.model.calls[-1]["times"], times)
    expected = torch.bincount(((lucidrains.log_snr(diffusion, times) + 8).floor().long()).clamp(0, 15), minlength=16)
    assert torch.equal(diffusion.criterion.statistics.count, expected.double())


def test_log_snr_follows_a_schedule_that_is_changed_later() -> None:
    diffusion = gaussian()
    times = torch.tensor([0, 50, 99])
    before = lucidrains.log_snr(diffusion, times)
    diffusion.alphas_cumprod.mul_(0.5)
    after = lucidrains.log_snr(diffusion, times)
    expected = diffusion.alphas_cumprod[times].double()
    torch.testing.assert_close(after, (expected / (1 - expected)).log().float())
    assert (after < before).all()


def test_a_loop_that_calls_p_losses_needs_no_attaching() -> None:
    diffusion, own = gaussian(), criterion()
    times = torch.arange(8) * 12
    torch.manual_seed(1)
    losses = own.reweight(
        diffusion.p_losses(images(), times, loss_reduction="none"), lucidrains.log_snr(diffusion, times)
    )
    torch.manual_seed(1)
    assert torch.equal(losses, diffusion.p_losses(images(), times, loss_reduction="none"))
    assert own.statistics.count.sum() == 8


def trainer_of(diffusion: nn.Module, folder: Path) -> Any:
    from PIL import Image

    pictures = folder / "pictures"
    if not pictures.exists():
        pictures.mkdir()
        for number in range(104):  # a whole number of batches
            Image.fromarray((255 * images(number)[0, 0].numpy()).astype(np.uint8)).save(pictures / f"{number}.png")
    return ddpm.Trainer(
        diffusion, str(pictures), train_batch_size=8, gradient_accumulate_every=2, train_num_steps=10, train_lr=1e-2,
        save_and_sample_every=1000, calculate_fid=False, results_folder=str(folder / "results"), ema_update_every=2,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*DataLoader will create", "ignore:.*lr_scheduler.step")
def test_its_trainer_trains_saves_and_resumes_with_the_criterion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("denoising_diffusion_pytorch.denoising_diffusion_pytorch.cpu_count", lambda: 0)
    trainer = trainer_of(lucidrains.attach(gaussian(), criterion("variance_aware")), tmp_path)
    trainer.train()
    own = trainer.model.criterion
    assert own.statistics.count.sum() == 10 * 2 * 8
    trainer.save(1)
    resumed = trainer_of(lucidrains.attach(gaussian(), criterion("variance_aware")), tmp_path)
    resumed.load(1)
    assert resumed.step == 10
    assert torch.equal(resumed.model.criterion.statistics.state, own.statistics.state)
    assert torch.equal(step(resumed.model, images())[0], step(trainer.model, images())[0])
    samples = resumed.ema.ema_model.eval().sample(batch_size=1)
    assert samples.shape == (1, 1, 8, 8)


def test_a_copy_has_a_criterion_of_its_own_and_old_checkpoints_still_fit() -> None:
    diffusion = gaussian()
    old = diffusion.state_dict()
    lucidrains.attach(diffusion)
    clone = copy.deepcopy(diffusion)
    clone(images())
    assert clone.criterion.statistics.count.sum() == 8
    assert diffusion.criterion.statistics.count.sum() == 0
    missing = diffusion.load_state_dict(old, strict=False)
    assert missing.unexpected_keys == []
    assert all(name.startswith("criterion.") for name in missing.missing_keys)
    with pytest.raises(RuntimeError, match=r"no statistics .*without vadiff.*fresh_statistics=True"):
        diffusion.load_state_dict(old)  # as the Trainer loads it
    diffusion = lucidrains.attach(gaussian(), "loss_level", strength=0.5, fresh_statistics=True)
    with pytest.warns(DiffusionLossWarning, match="the statistics start afresh"):
        diffusion.load_state_dict(old)


def test_autocast_and_a_gradient_scaler_change_neither_statistics_nor_direction() -> None:
    diffusion, results = lucidrains.attach(gaussian(), criterion()), []
    for scale in (1.0, 2.0**12):
        torch.manual_seed(1)
        diffusion.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = diffusion(images())
        torch.amp.GradScaler("cpu", init_scale=scale).scale(loss).backward()
        results.append(diffusion.model.conv.weight.grad / scale)
    torch.testing.assert_close(*results)
    assert diffusion.criterion.statistics.count.sum() == 16


def test_a_network_frozen_but_for_one_layer_trains_that_layer() -> None:
    diffusion = lucidrains.attach(gaussian())
    diffusion.model.conv.requires_grad_(False)
    diffusion(images()).backward()
    assert diffusion.model.conv.weight.grad is None
    assert diffusion.model.level.weight.grad is not None
    assert diffusion.criterion.statistics.count.sum() == 8


def test_evaluation_records_nothing() -> None:
    diffusion = lucidrains.attach(gaussian())
    with torch.no_grad():
        diffusion(images())
    diffusion.eval()(images())
    assert diffusion.criterion.statistics.count.sum() == 0


@pytest.mark.parametrize(
    ("make", "weighting", "message"),
    [
        (gaussian, vadiff.weighting.MinSNR(prediction_type="v_prediction"), r"'v_prediction'\), expected 'epsilon'"),
        (elucidated, vadiff.weighting.MinSNR(), r"prediction_type='epsilon'\), expected 'edm'"),
        (lambda: elucidated(sigma_data=0.7), vadiff.weighting.MinSNR(prediction_type="edm"), r"0.5\), expected 0.7"),
        (lambda: gaussian(min_snr_loss_weight=True), vadiff.weighting.MinSNR(), "own.*which MinSNR would multiply"),
    ],
)  # fmt: skip
def test_fixed_weights_for_another_loss_or_twice_are_refused(
    make: MakeDiffusion, weighting: object, message: str
) -> None:
    diffusion = make()
    with pytest.raises(ValueError, match=message):
        lucidrains.attach(diffusion, criterion(weighting))
    assert not hasattr(diffusion, "criterion")
    diffusion(images())  # as it was


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_fixed_weights_fit_every_schedule_of_the_library(objective: str, schedule: str) -> None:
    for timesteps in (100, 1000):
        diffusion = ddpm.GaussianDiffusion(
            Model(), image_size=8, timesteps=timesteps, objective=objective, beta_schedule=schedule
        )
        lucidrains.attach(diffusion, "min_snr")


def test_a_schedule_that_ends_at_zero_snr_is_refused_where_its_weight_is_not_a_number() -> None:
    diffusion = gaussian("pred_noise")
    diffusion.loss_weight[-1] = torch.nan  # 0/0
    with pytest.raises(ValueError, match=r"not finite at 1 timesteps: the schedule reaches zero SNR.*pred_v"):
        lucidrains.attach(diffusion)


def test_other_objects_and_second_criteria_are_refused() -> None:
    with pytest.raises(TypeError, match=r"diffusion is a Model whose forward takes self, x, times.*2.3.4 or later"):
        lucidrains.attach(Model())
    diffusion = lucidrains.attach(gaussian())
    with pytest.raises(ValueError, match="has a criterion already"):
        lucidrains.attach(diffusion)
    with pytest.raises(ValueError, match="loss='huber'"):
        lucidrains.attach(gaussian(), vadiff.DiffusionLoss(loss="huber"))
    sequences = lucidrains.attach(one_dimensional())
    with pytest.raises(ValueError, match="return_reduced_loss=False gives a loss per element"):
        sequences(torch.rand(8, 1, 16), return_reduced_loss=False)
