"""diffusers' training scripts with one line changed, beside the scripts' own lines.

With constant weighting the loss and its gradient are the trainer's. Where the trainer's target is handed over they
differ in the order of summation alone: LOSS_ULPS and GRADIENT_ULPS units in the last place of float32. Where the
residual a·output + b·x0 + c·eps takes the target's place, each of its three terms is rounded as well: TERM_ULPS of
the largest of them.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3
from diffusers_script import SHAPES, batch, gradient_of, scheduler_for, target_of, ulps

import vadiff
from vadiff.errors import DiffusionLossWarning
from vadiff.integrations.diffusers import (
    log_snr_of,
    per_sample,
    reweight_elements,
    scheduler_loss,
    sigma_of,
    snr_gamma_weight,
)

LOSS_ULPS, GRADIENT_ULPS, TERM_ULPS = 4, 2, 4
ULP = 2.0**-23
FORMS = ("epsilon", "sample", "v_prediction", "flow")
SCRIPT_WEIGHTINGS = ("sigma_sqrt", "cosmap", "none")


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
    untrained = pytest.warns(DiffusionLossWarning, match="is 0 at zero SNR")
    with untrained if form == "v_prediction" else contextlib.nullcontext():
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
