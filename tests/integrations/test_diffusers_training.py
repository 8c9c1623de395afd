"""Training as diffusers' scripts do it: what is recorded, frozen nets, autocast, accumulation, masks, class images.

Bounds in units of the last place are those of test_diffusers.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers_script import batch, gradient_of, scheduler_for, target_of, ulps
from torch import Tensor, nn

import vadiff
from vadiff.integrations.diffusers import (
    log_snr_of,
    per_sample,
    prior_preservation_loss,
    reweight_elements,
    scheduler_loss,
)

LOSS_ULPS, GRADIENT_ULPS = 4, 2


class TinyUNet(nn.Module):
    """The real thing, as small as it gets."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.unet = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
        )  # fmt: skip

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.unet(noisy, timesteps).sample


def digits(count: int) -> Tensor:
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images[:count, None] / 8 - 1).float()


@pytest.mark.parametrize("form", ["epsilon", "v_prediction", "flow"])
def test_ten_steps_of_training_record_what_the_trainer_saw(form: str) -> None:
    scheduler, clean = scheduler_for(form), digits(16)
    criterion = vadiff.DiffusionLoss(bins=16, log_snr_range=(-8.0, 8.0), half_life=math.inf)
    net, generator = TinyUNet(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    seen_log_snr, seen_loss = [], []
    for _ in range(10):
        noise = torch.randn(clean.shape, generator=generator)
        indices = torch.randint(0, 1000, (16,), generator=generator)
        if form == "flow":
            timesteps = scheduler.timesteps[indices]
            noisy = scheduler.scale_noise(clean, timesteps, noise)
            snr = ((1 - scheduler.sigmas[indices].double()) / scheduler.sigmas[indices].double()) ** 2
        else:
            timesteps = indices
            noisy = scheduler.add_noise(clean, noise, timesteps)
            alpha_bar = scheduler.alphas_cumprod[timesteps].double()
            snr = alpha_bar / (1 - alpha_bar)
        pred = net(noisy, timesteps)
        target = target_of(form, scheduler, {"clean": clean, "noise": noise, "timesteps": timesteps})
        seen_log_snr.append(snr.log())
        seen_loss.append((pred.detach().double() - target.double()).square().mean((1, 2, 3)))
        loss = criterion(pred.float(), target.float(), log_snr_of(scheduler, timesteps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    log_snr, losses = torch.cat(seen_log_snr).numpy(), torch.cat(seen_loss).numpy()
    bins = np.clip(np.floor(log_snr + 8), 0, 15).astype(int)
    for k in range(16):
        inside = losses[bins == k]
        assert criterion.statistics.count[k] == len(inside)
        if len(inside) > 1:
            assert criterion.statistics.mean[k].item() == pytest.approx(inside.mean(), rel=1e-5)
            assert criterion.statistics.variance[k].item() == pytest.approx(inside.var(ddof=1), rel=1e-4)
    assert criterion.weights.max() > 1.05


class LoRA(nn.Module):
    """A frozen layer with a low-rank update beside it."""

    def __init__(self, channels: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False)
        self.down = nn.Conv2d(channels, rank, 1, bias=False)
        self.up = nn.Conv2d(rank, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_a_lora_in_a_frozen_net_gets_the_gradient_it_got_before() -> None:
    net, scheduler = LoRA(4), scheduler_for("v_prediction")
    values = batch(scheduler)
    target = target_of("v_prediction", scheduler, values)
    gradients = []
    for loss in (
        F.mse_loss(net(values["clean"]).float(), target.float()),
        vadiff.DiffusionLoss("constant")(net(values["clean"]), target, log_snr_of(scheduler, values["timesteps"])),
    ):
        net.zero_grad()
        loss.backward()
        assert net.base.weight.grad is None
        gradients.append((net.down.weight.grad.clone(), net.up.weight.grad.clone()))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_autocast_and_a_gradient_scaler_train_as_before_and_skip_a_poisoned_batch() -> None:
    net, scheduler = LoRA(4), scheduler_for("epsilon")
    optimizer = torch.optim.SGD((parameter for parameter in net.parameters() if parameter.requires_grad), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    values = batch(scheduler)
    criterion = vadiff.DiffusionLoss("constant")
    log_snr = log_snr_of(scheduler, values["timesteps"])
    gradients = []
    for own in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pred = net(values["clean"])
            if own:
                loss = F.mse_loss(pred.float(), values["noise"].float())
            else:
                loss = criterion(pred.float(), values["noise"].float(), log_snr)
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients.append(net.up.weight.grad.clone())
        scaler.update()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-2, atol=1e-5)  # what bfloat16 makes of an ulp
    before, count = net.up.weight.clone(), criterion.statistics.count
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pred = net(values["clean"] * torch.tensor([1, 1, torch.inf, 1, 1, 1])[:, None, None, None])
        loss = criterion(pred.float(), values["noise"], log_snr)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(net.up.weight, before)
    assert scaler.get_scale() == 512.0
    assert criterion.statistics.skipped == 1
    assert criterion.statistics.count.sum() > count.sum()


def test_accumulated_micro_batches_are_the_whole_batch() -> None:
    scheduler, whole = scheduler_for("epsilon"), batch(scheduler_for("epsilon"), (8, 4, 8, 8))
    log_snr = log_snr_of(scheduler, whole["timesteps"])
    results = []
    for parts in (1, 4):
        criterion = vadiff.DiffusionLoss("constant", half_life=math.inf)
        pred = whole["model_pred"].detach().requires_grad_()
        for part in torch.arange(8).chunk(parts):
            (criterion(pred[part], whole["noise"][part], log_snr[part]) / parts).backward()
        results.append((pred.grad, criterion.statistics.count, criterion.statistics.mean.nan_to_num()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)


def test_a_mask_leaves_loss_and_gradient_as_they_were_and_the_statistics_with_what_it_lets_through() -> None:
    scheduler = scheduler_for("epsilon")
    values = batch(scheduler)
    mask = torch.zeros(6, 1, 8, 8)
    mask[1:, :, :4] = 1.0
    mask[2] = 0.25
    elements = F.mse_loss(values["model_pred"], values["noise"], reduction="none")
    own = (elements * mask).mean()
    criterion = vadiff.DiffusionLoss("constant", bins=2, log_snr_range=(-100.0, 100.0))
    log_snr = log_snr_of(scheduler, values["timesteps"])
    ours = reweight_elements(criterion, elements, log_snr, mask=mask).mean()
    assert ulps(ours, own) <= LOSS_ULPS
    assert (gradient_of(ours, values) - gradient_of(own, values)).abs().max() <= 1e-9
    let_through = [elements[1, :, :4], elements[2], *(elements[i, :, :4] for i in (3, 4, 5))]
    means = torch.stack([part.detach().mean() for part in let_through]).double()
    n, mu = criterion.statistics.count, criterion.statistics.mean.nan_to_num()
    assert n.sum() == 5  # the first sample is masked altogether
    assert (n * mu).sum().item() == pytest.approx(means.sum().item(), rel=1e-5)
    assert criterion.statistics.mass.sum().item() == pytest.approx(4 * 0.5 + 0.25)


@pytest.mark.parametrize("prior_loss_weight", [1.0, 0.3])
def test_prior_preservation_is_the_sum_of_two_means(prior_loss_weight: float) -> None:
    scheduler = scheduler_for("epsilon")
    values = batch(scheduler)
    pred, pred_prior = values["model_pred"].chunk(2)
    target, target_prior = values["noise"].chunk(2)
    own = F.mse_loss(pred, target) + prior_loss_weight * F.mse_loss(pred_prior, target_prior)
    criterion = vadiff.DiffusionLoss("constant")
    log_snr = log_snr_of(scheduler, values["timesteps"])
    ours = prior_preservation_loss(criterion, values["model_pred"], values["noise"], log_snr, prior_loss_weight)
    assert ulps(ours, own) <= LOSS_ULPS
    assert ulps(gradient_of(ours, values), gradient_of(own, values)) <= 2 * GRADIENT_ULPS
    assert criterion.statistics.count.sum() == 6
    with pytest.raises(ValueError, match="5 samples, expected an even number"):
        prior_preservation_loss(criterion, values["model_pred"][:5], values["noise"][:5], log_snr[:5])


@pytest.mark.parametrize("samples", [1, 3])
def test_two_timesteps_for_each_sample_are_an_error_that_names_prior_preservation(samples: int) -> None:
    scheduler, criterion = scheduler_for("epsilon"), vadiff.DiffusionLoss()
    pred, clean, noise = torch.randn(3, samples, 4, 8, 8)
    timesteps = torch.arange(2 * samples)
    log_snr = log_snr_of(scheduler, timesteps)
    with pytest.raises(ValueError, match=r"prior preservation.*log_snr.chunk\(2\)\[0\]"):
        criterion(pred, noise, log_snr)
    with pytest.raises(ValueError, match=r"prior preservation.*log_snr.chunk\(2\)\[0\]"):
        criterion.reweight((pred - noise).square().mean((1, 2, 3)), log_snr)
    with pytest.raises(ValueError, match=r"prior preservation.*base_weight.chunk\(2\)\[0\]"):
        criterion(pred, noise, log_snr[:samples], base_weight=torch.ones(2 * samples))
    with pytest.raises(ValueError, match=r"timesteps has .* expected .*timesteps.chunk\(2\)\[0\]"):
        scheduler_loss(criterion, scheduler, pred, clean, noise, timesteps)
    with pytest.raises(ValueError, match=r"weight.chunk\(2\)\[0\]"):
        per_sample(torch.ones(2 * samples, 1, 1, 1), samples)
    assert criterion.statistics.count.sum() == 0


def test_nothing_broadcasts_over_the_wrong_axis() -> None:
    """8 samples of width 8: [B] against [B, C, H, W] would go along W without a word."""
    scheduler, criterion = scheduler_for("flow"), vadiff.DiffusionLoss()
    values = batch(scheduler, (8, 4, 8, 8))
    log_snr = log_snr_of(scheduler, values["timesteps"])
    elements = (values["model_pred"] - values["noise"]).square()
    with pytest.raises(ValueError, match=r"base_weight.flatten\(\)"):
        criterion(values["model_pred"], values["noise"], log_snr, base_weight=torch.ones(8, 1, 1, 1))
    with pytest.raises(ValueError, match="one value per sample"):
        criterion.reweight(elements, log_snr)
    with pytest.raises(ValueError, match="reweight_elements"):
        per_sample(torch.ones(8, 1, 8, 8), 8)
    for mask in (torch.ones(8), torch.ones(8, 8), torch.ones(1, 1, 8, 8), torch.ones(8, 1, 8, 4)):
        with pytest.raises(ValueError, match="mask has shape"):
            reweight_elements(criterion, elements, log_snr, mask=mask)
    with pytest.raises(ValueError, match=r"Use criterion\.reweight"):
        reweight_elements(criterion, elements.mean((1, 2, 3)), log_snr)
    with pytest.raises(ValueError, match=r"timesteps.flatten\(\)"):
        log_snr_of(scheduler, values["timesteps"][:, None])
    assert criterion.statistics.count.sum() == 0


@pytest.mark.parametrize("shape", [(5,), (5, 1, 1, 1), (5, 1, 1, 1, 1)])
def test_weights_of_every_slot_become_one_number_per_sample(shape: tuple[int, ...]) -> None:
    assert per_sample(torch.arange(5.0).view(shape), 5).tolist() == [0, 1, 2, 3, 4]
    assert per_sample(None, 5) is None
