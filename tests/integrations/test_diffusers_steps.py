"""Steps for diffusers' pipelines from a criterion's statistics: sigmas of Euler, timesteps of DPM-Solver++."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
)
from torch import Tensor

import vadiff
from vadiff.integrations.diffusers import log_snr_of, sigmas_for, timesteps_for, timesteps_of
from vadiff.models import Denoiser
from vadiff.models.parameterisation import VPForm
from vadiff.process import DiscreteVP, loss_ratio
from vadiff.sampling import euler
from vadiff.weighting import MinSNR

SPREAD = 0.5


def criterion_of(form: str, weight: Any = None) -> vadiff.DiffusionLoss:
    """The statistics of the best network for Gaussian data of std 0.5, whose loss has this form."""
    criterion = vadiff.DiffusionLoss("constant", bins=80, log_snr_range=(-10.0, 10.0))
    log_snr = criterion.bin_centers.repeat(32)
    sigma = (-0.5 * log_snr).exp()
    loss = SPREAD**2 * sigma**2 / (SPREAD**2 + sigma**2) * loss_ratio(form, log_snr)
    criterion.reweight(loss if weight is None else loss * weight(log_snr), log_snr)
    return criterion


def arctan_levels(steps: int, low: float, high: float) -> list[float]:
    """Equal steps of τ = s·arctan(σ/s), the closed form of Gaussian data."""
    return [SPREAD * math.tan(t) for t in np.linspace(math.atan(high / SPREAD), math.atan(low / SPREAD), steps)]


@pytest.mark.parametrize("form", ["epsilon", "sample", "v_prediction"])
def test_sigmas_of_gaussian_data_are_the_closed_form_for_every_prediction_type(form: str) -> None:
    scheduler: Any = EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type=form)
    low, high = float(scheduler.sigmas[-2]), float(scheduler.sigmas[0])
    sigmas = sigmas_for(criterion_of(form), scheduler, 12)
    assert sigmas == pytest.approx([*arctan_levels(12, low, high), 0.0], rel=0.03)
    assert [sigmas[0], sigmas[-2]] == pytest.approx([high, low], rel=1e-6)


def test_sigmas_are_the_levels_that_euler_then_takes() -> None:
    scheduler: Any = EulerDiscreteScheduler()
    sigmas = sigmas_for(criterion_of("epsilon"), scheduler, 9)
    scheduler.set_timesteps(sigmas=sigmas)
    assert scheduler.num_inference_steps == len(scheduler.timesteps) == 9
    assert scheduler.sigmas.tolist() == pytest.approx(sigmas)
    told = log_snr_of(DDPMScheduler(), scheduler.timesteps)
    assert told.tolist() == pytest.approx([-2.0 * math.log(sigma) for sigma in sigmas[:-1]], abs=1e-3)
    assert sigmas_for(criterion_of("epsilon"), scheduler, 9) == sigmas  # whatever steps are set


class Pipeline(DiffusionPipeline):
    """An unconditional pipeline that takes sigmas, as those of Stable Diffusion do."""

    unet: Any
    scheduler: Any

    def __init__(self, unet: UNet2DModel, scheduler: EulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)  # type: ignore[attr-defined]

    @torch.no_grad()
    def __call__(self, noise: torch.Tensor, sigmas: list[float]) -> torch.Tensor:
        self.scheduler.set_timesteps(sigmas=sigmas)
        x = noise * self.scheduler.init_noise_sigma
        for timestep in self.scheduler.timesteps:
            output = self.unet(self.scheduler.scale_model_input(x, timestep), timestep).sample
            x = self.scheduler.step(output, timestep, x).prev_sample
        return x


class Timesteps(torch.nn.Module):
    """The network of a denoiser, which is told timestep / 100."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.unet(x, 100.0 * c_noise).sample
        return output


def test_state_of_a_criterion_gives_a_pipeline_its_steps() -> None:
    """Train, save the criterion, read it elsewhere, draw: the images are those of vadiff's own Euler."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    noise_scheduler: Any = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    criterion = vadiff.DiffusionLoss.for_process(noise_scheduler)
    for _ in range(8):
        clean, noise, timesteps = torch.randn(32, 1, 8, 8), torch.randn(32, 1, 8, 8), torch.randint(1000, (32,))
        output = unet(noise_scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        criterion(output, noise, log_snr_of(noise_scheduler, timesteps)).backward()
    read = vadiff.DiffusionLoss.for_process(noise_scheduler)
    read.load_state_dict(criterion.state_dict())

    pipeline = Pipeline(unet, EulerDiscreteScheduler.from_config(noise_scheduler.config))
    sigmas = sigmas_for(read, pipeline.scheduler, 6)
    noise = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    drawn = pipeline(noise, sigmas)

    form = VPForm(DiscreteVP(noise_scheduler.alphas_cumprod), "epsilon")
    denoiser = Denoiser(Timesteps(unet), 0.5, image_shape=(1, 8, 8), process=form)
    ours = euler(denoiser, (1, 8, 8), range(3), levels=torch.tensor(sigmas, dtype=torch.float64))
    torch.testing.assert_close(drawn, ours, rtol=1e-3, atol=1e-3)


def test_base_weight_of_the_loop_does_not_move_the_levels() -> None:
    scheduler, weight = EulerDiscreteScheduler(), MinSNR(5.0, prediction_type="epsilon")
    plain = sigmas_for(criterion_of("epsilon"), scheduler, 10)
    weighted = criterion_of("epsilon", weight)
    assert sigmas_for(weighted, scheduler, 10, base_weight=weight) == pytest.approx(plain, rel=1e-3)
    assert sigmas_for(weighted, scheduler, 10) != pytest.approx(plain, rel=0.1)


@pytest.mark.parametrize("form", ["epsilon", "v_prediction"])
def test_what_posterior_mean_targets_took_out_does_not_move_the_levels(form: str) -> None:
    scheduler: Any = EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type=form)

    def best(log_snr: Tensor) -> Tensor:
        return 1.0 / (SPREAD**-2 + log_snr.exp())

    targets, log_snr = vadiff.targets.Recorded("posterior mean"), torch.linspace(-12, 12, 40_000)
    targets.removed.record(log_snr, 0.9 * best(log_snr), torch.ones(len(log_snr), dtype=torch.bool))
    criterion = vadiff.DiffusionLoss("constant", bins=80, log_snr_range=(-10.0, 10.0))
    criterion.target = targets
    log_snr = criterion.bin_centers.repeat(32)
    criterion.reweight(0.1 * best(log_snr) * loss_ratio(form, log_snr), log_snr)
    plain = sigmas_for(criterion_of(form), scheduler, 10)
    assert sigmas_for(criterion, scheduler, 10) == pytest.approx(plain, rel=0.02)


def test_form_of_the_recorded_loss_may_be_another_than_the_scheduler_s() -> None:
    scheduler: Any = EulerDiscreteScheduler()
    plain = sigmas_for(criterion_of("epsilon"), scheduler, 10)
    assert sigmas_for(criterion_of("sample"), scheduler, 10, prediction_type="sample") == pytest.approx(plain, rel=1e-3)


def test_small_errors_of_eps_at_high_noise_draw_no_steps() -> None:
    """An eps error of 0.01 at every level is an x0 error of 2,500 at σ 500, more than the data could have."""
    criterion = vadiff.DiffusionLoss("constant", bins=80, log_snr_range=(-10.0, 10.0))
    log_snr = criterion.bin_centers.repeat(32)
    criterion.reweight(torch.full_like(log_snr, 0.01), log_snr)
    scheduler: Any = EulerDiscreteScheduler()
    assert sigmas_for(criterion, scheduler, 11)[4] < 15.0
    assert sigmas_for(criterion, scheduler, 11, sigma_data=1e4)[4] > 50.0


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [2, 8, 50, 1000])
def test_timesteps_fall_from_the_last_to_the_first_and_are_all_different(steps: int, zero_snr: bool) -> None:
    scheduler: Any = DPMSolverMultistepScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr)
    timesteps = timesteps_for(criterion_of("v_prediction"), scheduler, steps)
    assert len(timesteps) == steps
    # With zero terminal SNR diffusers gives timestep 999 a noise level between those of 997 and 998.
    assert timesteps[0] == (998 if zero_snr and steps < 1000 else 999)
    assert timesteps[-1] == 0
    assert all(earlier > later for earlier, later in itertools.pairwise(timesteps))
    scheduler.set_timesteps(timesteps=timesteps)
    assert scheduler.timesteps.tolist() == timesteps


def test_timesteps_are_those_nearest_to_the_sigmas() -> None:
    criterion = criterion_of("epsilon")
    timesteps = timesteps_for(criterion, DPMSolverMultistepScheduler(), 8)
    sigmas = torch.tensor(sigmas_for(criterion, EulerDiscreteScheduler(), 8)[:-1])
    nearest = timesteps_of(DDPMScheduler(), -2.0 * sigmas.log())
    assert timesteps == nearest.tolist()
    assert log_snr_of(DDPMScheduler(), nearest).diff().min() > 0


def test_what_does_not_fit_is_named() -> None:
    criterion = criterion_of("epsilon")
    for scheduler in (HeunDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(), DPMSolverMultistepScheduler()):
        with pytest.raises(TypeError, match=rf"scheduler is a {type(scheduler).__name__}, expected EulerDiscrete"):
            sigmas_for(criterion, scheduler, 8)
    with pytest.raises(TypeError, match="scheduler is a EulerDiscreteScheduler, expected DPMSolverMultistep"):
        timesteps_for(criterion, EulerDiscreteScheduler(), 8)
    with pytest.raises(ValueError, match="steps is 1001, expected at most 1000"):
        timesteps_for(criterion, DPMSolverMultistepScheduler(), 1001)
    with pytest.raises(ValueError, match="steps is 1, expected at least 2"):
        sigmas_for(criterion, EulerDiscreteScheduler(), 1)
    with pytest.raises(ValueError, match="the criterion has 0 samples"):
        sigmas_for(vadiff.DiffusionLoss(), EulerDiscreteScheduler(), 8)
    with pytest.raises(ValueError, match="the criterion's loss is 'huber', expected 'mse'"):
        sigmas_for(vadiff.DiffusionLoss(loss="huber"), EulerDiscreteScheduler(), 8)
