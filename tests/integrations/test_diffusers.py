"""diffusers' training scripts with one line changed, beside the scripts' own lines.

With constant weighting the loss and its gradient are the trainer's. Where the trainer's target is handed over they
differ in the order of summation alone: LOSS_ULPS and GRADIENT_ULPS units in the last place of float32. Where the
residual a·output + b·x0 + c·eps takes the target's place, each of its three terms is rounded as well: TERM_ULPS of
the largest of them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor, nn

import vadiff
from vadiff.integrations.diffusers import (
    log_snr_of,
    per_sample,
    prior_preservation_loss,
    reweight_elements,
    scheduler_loss,
    sigma_of,
    snr_gamma_weight,
)

LOSS_ULPS, GRADIENT_ULPS, TERM_ULPS = 4, 2, 4
ULP = 2.0**-23
FORMS = ("epsilon", "sample", "v_prediction", "flow")
SHAPES = {"image": (6, 4, 8, 8), "video": (6, 4, 3, 8, 8)}
SCRIPT_WEIGHTINGS = ("sigma_sqrt", "cosmap", "none")


def scheduler_for(form: str, **options: Any) -> Any:
    if form == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return DDPMScheduler(prediction_type=form, **options)


def batch(scheduler: Any, shape: tuple[int, ...] = SHAPES["image"], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pred, clean, noise = torch.randn(3, *shape, generator=generator)
    indices = torch.randint(0, 1000, shape[:1], generator=generator)
    timesteps = scheduler.timesteps[indices] if hasattr(scheduler, "scale_noise") else indices
    return {"model_pred": pred.requires_grad_(), "clean": clean, "noise": noise, "timesteps": timesteps}


def target_of(form: str, scheduler: Any, values: dict[str, Tensor]) -> Tensor:
    """What the scripts compare with."""
    clean, noise = values["clean"], values["noise"]
    if form == "v_prediction":
        return scheduler.get_velocity(clean, noise, values["timesteps"])
    return {"epsilon": noise, "sample": clean, "flow": noise - clean}[form]


def gradient_of(loss: Tensor, values: dict[str, Tensor]) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, values["model_pred"], retain_graph=True)
    return gradient


def ulps(found: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the last place of the expected value."""
    spacing = np.spacing(expected.detach().abs().numpy())
    return float(np.max((found - expected).detach().abs().numpy() / spacing))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_constant_weighting_is_the_script_s_own_loss_and_gradient(form: str, shape: str) -> None:
    scheduler = scheduler_for(form)
    values = batch(scheduler, SHAPES[shape])
    target = target_of(form, scheduler, values)
    own = F.mse_loss(values["model_pred"].float(), target.float(), reduction="mean")
    criterion = vadiff.DiffusionLoss("constant")
    ours = criterion(values["model_pred"].float(), target.float(), log_snr_of(scheduler, values["timesteps"]))
    assert ulps(ours, own) <= LOSS_ULPS
    assert ulps(gradient_of(ours, values), gradient_of(own, values)) <= GRADIENT_ULPS


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_scheduler_loss_makes_the_target_itself(form: str, shape: str) -> None:
    scheduler = scheduler_for(form)
    values = batch(scheduler, SHAPES[shape])
    own = F.mse_loss(values["model_pred"], target_of(form, scheduler, values))
    ours = scheduler_loss(vadiff.DiffusionLoss("constant"), scheduler, **values)
    assert ulps(ours, own) <= 2 * LOSS_ULPS
    largest = max(value.detach().abs().max().item() for value in list(values.values())[:3])
    error = (gradient_of(ours, values) - gradient_of(own, values)).abs().max()
    assert error <= TERM_ULPS * ULP * largest * 2 / values["model_pred"].numel()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_scheduler_loss_is_that_of_edm_style_training(prediction_type: str) -> None:
    """train_dreambooth_lora_sdxl.py --do_edm_style_training with EDM's scheduler: the denoised image against the clean.

    At sigma = 80, c_out is 0.5 and c_skip·x_t made of two rounded numbers: 1e-5 of the loss.
    """
    scheduler: Any = EDMEulerScheduler(prediction_type=prediction_type)
    values = batch(scheduler)
    values["timesteps"] = scheduler.timesteps[values["timesteps"]]
    sigmas = sigma_of(scheduler, values["timesteps"])[:, None, None, None]
    noisy = values["clean"] + sigmas * values["noise"]
    own = (scheduler.precondition_outputs(noisy, values["model_pred"], sigmas) - values["clean"]).square().mean()
    ours = scheduler_loss(vadiff.DiffusionLoss("constant"), scheduler, **values)
    assert ours.item() == pytest.approx(own.item(), rel=1e-5)
    torch.testing.assert_close(gradient_of(ours, values), gradient_of(own, values), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_style_training_with_euler_s_scheduler_keeps_its_weights(prediction_type: str) -> None:
    """There the script weighs the denoised image's error by sigma**-2, element by element, as [B, 1, 1, 1]."""
    scheduler: Any = EulerDiscreteScheduler(prediction_type=prediction_type)
    values = batch(scheduler)
    timesteps = scheduler.timesteps[values["timesteps"]]
    sigmas = sigma_of(scheduler, timesteps)[:, None, None, None]
    noisy = values["clean"] + sigmas * values["noise"]
    if prediction_type == "epsilon":
        denoised = values["model_pred"] * -sigmas + noisy
    else:
        denoised = values["model_pred"] * (-sigmas / (sigmas**2 + 1) ** 0.5) + noisy / (sigmas**2 + 1)
    weighting = (sigmas**-2.0).float()
    own = (weighting * (denoised - values["clean"]) ** 2).mean()
    criterion = vadiff.DiffusionLoss("constant")
    ours = criterion(
        denoised, values["clean"], log_snr_of(scheduler, timesteps), base_weight=per_sample(weighting, len(denoised))
    )
    assert ulps(ours, own) <= LOSS_ULPS
    assert ulps(gradient_of(ours, values), gradient_of(own, values)) <= 4 * GRADIENT_ULPS  # of the trainer's own chain


@pytest.mark.parametrize("scheme", SCRIPT_WEIGHTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sd3_and_flux_scripts_keep_their_weighting_scheme(shape: str, scheme: str) -> None:
    scheduler = scheduler_for("flow")
    values = batch(scheduler, SHAPES[shape])
    sigmas = sigma_of(scheduler, values["timesteps"]).view(-1, *[1] * (values["clean"].dim() - 1))
    weighting = compute_loss_weighting_for_sd3(weighting_scheme=scheme, sigmas=sigmas)
    target = values["noise"] - values["clean"]
    own = torch.mean(
        (weighting.float() * (values["model_pred"].float() - target.float()) ** 2).reshape(target.shape[0], -1), 1
    ).mean()
    log_snr = log_snr_of(scheduler, values["timesteps"])
    by_weight = vadiff.DiffusionLoss("constant")(
        values["model_pred"], target, log_snr, base_weight=per_sample(weighting, len(target))
    )
    by_element = reweight_elements(
        vadiff.DiffusionLoss("constant"), weighting * (values["model_pred"] - target) ** 2, log_snr
    ).mean()
    for ours in (by_weight, by_element):
        assert ulps(ours, own) <= LOSS_ULPS
        assert ulps(gradient_of(ours, values), gradient_of(own, values)) <= 2 * GRADIENT_ULPS


def test_train_unconditional_s_sample_prediction_keeps_its_snr_weights() -> None:
    scheduler: Any = DDPMScheduler()  # the script's flag says what is predicted, not its scheduler
    values = batch(scheduler)
    alpha_bar = scheduler.alphas_cumprod[values["timesteps"]][:, None, None, None]
    snr_weights = alpha_bar / (1 - alpha_bar)
    own = (snr_weights * F.mse_loss(values["model_pred"], values["clean"], reduction="none")).mean()
    ours = scheduler_loss(
        vadiff.DiffusionLoss("constant"), scheduler, **values, prediction_type="sample",
        base_weight=log_snr_of(scheduler, values["timesteps"]).exp(),
    )  # fmt: skip
    assert ours.item() == pytest.approx(own.item(), rel=1e-5)


def min_snr(form: str, alpha_bar: np.ndarray, gamma: float = 5.0) -> np.ndarray:
    """The paper's weight, written out; float64."""
    snr = alpha_bar / (1 - alpha_bar)
    if form == "epsilon":
        return np.minimum(1.0, gamma / np.maximum(snr, 1e-300))
    if form == "v_prediction":
        return np.minimum(snr, gamma) / (snr + 1)
    return np.minimum(snr, gamma)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("form", ["epsilon", "sample", "v_prediction"])
def test_snr_gamma_is_the_paper_s_formula_at_every_timestep(form: str, zero_terminal_snr: bool) -> None:
    scheduler = scheduler_for(form, rescale_betas_zero_snr=zero_terminal_snr)
    expected = min_snr(form, scheduler.alphas_cumprod.double().numpy())
    found = snr_gamma_weight(scheduler, torch.arange(1000)).double().numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-30)


def test_snr_gamma_of_a_flow_and_of_edm() -> None:
    flow: Any = scheduler_for("flow")
    edm: Any = EDMEulerScheduler()
    sigma = (flow.timesteps / 1000).double()  # flow.sigmas but for half an ulp, which 1 - sigma makes 1e-4
    snr = ((1 - sigma) / sigma) ** 2
    expected = snr.clamp(max=5.0) / (1 + snr.sqrt()) ** 2
    torch.testing.assert_close(snr_gamma_weight(flow, flow.timesteps).double(), expected, rtol=1e-5, atol=1e-12)
    snr = edm.sigmas[:-1].double() ** -2
    torch.testing.assert_close(snr_gamma_weight(edm, edm.timesteps).double(), snr.clamp(max=5.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", ["epsilon", "v_prediction"])
def test_a_batch_with_min_snr_is_the_formula_in_float64(form: str) -> None:
    """As a base weight, as the script's --snr_gamma; and as the weighting of a criterion made for the scheduler."""
    scheduler = scheduler_for(form, rescale_betas_zero_snr=True)
    values = batch(scheduler)
    values["timesteps"][0] = 999
    weight = torch.from_numpy(min_snr(form, scheduler.alphas_cumprod.double().numpy()))[values["timesteps"]]
    residual = values["model_pred"].double() - target_of(form, scheduler, values).double()
    expected = (weight * residual.square().mean((1, 2, 3))).mean()
    part_of_the_objective = scheduler_loss(vadiff.DiffusionLoss("constant"), scheduler, **values, snr_gamma=5.0)
    criterion = vadiff.DiffusionLoss.for_process(scheduler, weighting="min_snr")
    weighting = scheduler_loss(criterion, scheduler, **values)
    for ours in (part_of_the_objective, weighting):
        assert ours.item() == pytest.approx(expected.item(), rel=2e-6)
        assert gradient_of(ours, values).isfinite().all()
    zero = criterion.weight_at(torch.tensor([-torch.inf])).item()
    assert zero == {"epsilon": 1.0, "v_prediction": 0.0}[form]


def test_a_weighting_written_for_another_prediction_type_is_refused() -> None:
    """As the +1 and the missing +1 of so many scripts: here the weight and the loss have to be of one form."""
    scheduler = scheduler_for("v_prediction")
    values = batch(scheduler)
    wrong = vadiff.DiffusionLoss(vadiff.weighting.MinSNR(prediction_type="epsilon"))
    with pytest.raises(ValueError, match=r"Use MinSNR\(prediction_type='v_prediction'\)"):
        scheduler_loss(wrong, scheduler, **values)
    scheduler_loss(wrong, scheduler, **values, prediction_type="epsilon")
    with pytest.raises(TypeError, match=r"criterion is a str, expected a vadiff\.DiffusionLoss"):
        scheduler_loss("min_snr", scheduler, **values)
    edm: Any = EDMEulerScheduler()
    values["timesteps"] = edm.timesteps[values["timesteps"]]
    with pytest.raises(ValueError, match=r"Use EDM\(prediction_type='sample'\)"):
        scheduler_loss(vadiff.DiffusionLoss(vadiff.weighting.EDM(prediction_type="edm")), edm, **values)


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
