"""The solvers against diffusers' schedulers: same timesteps, same noise, same estimates of x0, for Gaussian data."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vadiff.models import PREDICTIONS, Denoiser, parameterisation
from vadiff.process import DiscreteVP
from vadiff.sampling import ddpm, dpmpp_2m, euler, flow_levels, timestep_levels

diffusers = pytest.importorskip("diffusers")

SEED, SHAPE = 11, (3, 8, 8)
MEAN, STD = 0.4, 0.5
BETAS: dict[str, dict[str, Any]] = {  # of diffusers, for each process
    "vp_linear": {"beta_schedule": "linear"},
    "vp_cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "vp_scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def best_denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """The best denoiser for data ~ N(MEAN, STD²)."""
    shrink = STD**2 / (STD**2 + sigma**2)
    return MEAN + shrink.view(-1, 1, 1, 1) * (x - MEAN)


def diffusers_sample(scheduler: Any, sigmas: Tensor) -> Tensor:
    """What a variance-preserving scheduler makes of the noise of SEED, [1, *SHAPE].

    Args:
        scheduler: with `prediction_type="sample"` and its timesteps set.
        sigmas: sigma/alpha at each timestep, as float64.
    """
    generator = torch.Generator().manual_seed(SEED)
    alphas = (1.0 + sigmas**2).rsqrt()
    x = (torch.randn(SHAPE, generator=generator)[None] * sigmas[0] * alphas[0]).float()
    takes_generator = isinstance(scheduler, diffusers.DDPMScheduler)
    for timestep, sigma, alpha in zip(scheduler.timesteps, sigmas, alphas, strict=True):
        x0 = best_denoiser(x / alpha.float(), sigma.float()[None])
        x = scheduler.step(x0, timestep, x, **({"generator": generator} if takes_generator else {})).prev_sample
    return x


def levels_of(scheduler: Any) -> Tensor:
    """sigma/alpha at each timestep of a scheduler with a table `alphas_cumprod`, then 0, as float64."""
    kept = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    return torch.cat([((1.0 - kept) / kept).sqrt(), torch.zeros(1, dtype=torch.float64)])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("name", "solver", "options"),
    [("DDIMScheduler", euler, {}), ("DDPMScheduler", ddpm, {"variance_type": "fixed_small"})],
)
def test_same_as_diffusers(
    name: str, solver: Callable[..., Tensor], options: dict[str, Any], clip: bool, schedule: str
) -> None:
    scheduler = getattr(diffusers, name)(beta_schedule=schedule, prediction_type="sample", clip_sample=clip, **options)
    scheduler.set_timesteps(25)
    levels = levels_of(scheduler)
    sample = solver(best_denoiser, SHAPE, [SEED], levels=levels, clip=clip)
    torch.testing.assert_close(sample, diffusers_sample(scheduler, levels[:-1]), rtol=1e-5, atol=1e-5)


class Network(torch.nn.Module):
    """Some output that depends on x_t and the timestep, as eps, v or x0 far from any image."""

    def forward(self, scaled: Tensor, c_noise: Tensor) -> Tensor:
        return 2.0 * (0.7 * scaled + 0.05 * c_noise.view(-1, 1, 1, 1)).sin()


@pytest.mark.parametrize("process", BETAS)
@pytest.mark.parametrize("prediction", PREDICTIONS["vp_linear"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_denoiser_of_every_prediction_is_sampled_as_by_diffusers(name: str, prediction: str, process: str) -> None:
    """From a network's output at a timestep to the sample, clipped but for DPM-Solver++."""
    options: dict[str, dict[str, Any]] = {
        "DDIMScheduler": {"clip_sample": True},
        "DDPMScheduler": {"clip_sample": True, "variance_type": "fixed_small"},
        "DPMSolverMultistepScheduler": {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"},
    }
    # Clipped, DDIM keeps the network's eps beside another x0 unless it is told to make eps of the clipped one.
    per_step: dict[str, Any] = {"use_clipped_model_output": True} if name == "DDIMScheduler" else {}
    solver, clip = {"DDIMScheduler": (euler, True), "DDPMScheduler": (ddpm, True)}.get(name, (dpmpp_2m, False))
    scheduler = getattr(diffusers, name)(**BETAS[process], prediction_type=prediction, **options[name])
    scheduler.set_timesteps(20)
    levels = scheduler.sigmas.double() if solver is dpmpp_2m else levels_of(scheduler)
    denoiser = Denoiser(Network(), 0.5, process=parameterisation(process, prediction, timesteps=1000))
    sample = solver(denoiser, SHAPE, [SEED], levels=levels, clip=clip)

    generator = torch.Generator().manual_seed(SEED)
    first = levels[0] * (1.0 + levels[0] ** 2).rsqrt()
    x = (torch.randn(SHAPE, generator=generator)[None] * first).float()
    if name == "DDPMScheduler":
        per_step = {"generator": generator}
    for timestep in scheduler.timesteps:
        output = Network()(x, (timestep / 100.0)[None].float())
        x = scheduler.step(output, timestep, x, **per_step).prev_sample
    torch.testing.assert_close(sample, x, rtol=1e-3, atol=1e-3 * float(x.abs().max()))
    first_x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED))[None] * levels[0].float()
    assert denoiser(first_x, levels[:1].float()).abs().max() > 1.0  # so that clipping matters


def test_timesteps_are_strided_as_diffusers_linspace() -> None:
    for steps in (7, 50, 1000):
        scheduler = diffusers.DDPMScheduler(timestep_spacing="linspace")
        scheduler.set_timesteps(steps)
        levels = timestep_levels(DiscreteVP.linear(), steps)
        torch.testing.assert_close(levels, levels_of(scheduler), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [2, 10, 16])  # below 15 steps diffusers has another rule for the end
def test_dpmpp_2m_is_the_one_of_diffusers(steps: int, schedule: str) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule=schedule, prediction_type="sample", solver_order=2, algorithm_type="dpmsolver++",
        solver_type="midpoint", lower_order_final=True, final_sigmas_type="zero", timestep_spacing="linspace",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    levels = scheduler.sigmas.double()
    sample = dpmpp_2m(best_denoiser, SHAPE, [SEED], levels=levels)
    torch.testing.assert_close(sample, diffusers_sample(scheduler, levels[:-1]), rtol=1e-5, atol=1e-5)


def test_dpmpp_2m_on_edms_levels_is_the_one_of_diffusers() -> None:
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(sigma_data=STD, solver_order=2, final_sigmas_type="zero")
    scheduler.set_timesteps(16)
    levels = scheduler.sigmas.double()
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED))[None] * levels[0].float()
    for timestep, sigma in zip(scheduler.timesteps, levels[:-1].float(), strict=True):
        c_skip = STD**2 / (sigma**2 + STD**2)
        c_out = sigma * STD / (sigma**2 + STD**2).sqrt()
        x = scheduler.step((best_denoiser(x, sigma[None]) - c_skip * x) / c_out, timestep, x).prev_sample
    sample = dpmpp_2m(best_denoiser, SHAPE, [SEED], levels=levels)
    torch.testing.assert_close(sample, x, rtol=1e-4, atol=1e-4)  # float32 at sigma 80


def test_euler_at_evenly_spaced_times_is_flow_matching_in_diffusers() -> None:
    levels = flow_levels(20)
    times = levels / (1.0 + levels)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=times[:-1].tolist())
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED))[None] * times[0].float()
    for timestep, time in zip(scheduler.timesteps, times[:-1].float(), strict=True):
        x0 = best_denoiser(x / (1.0 - time), (time / (1.0 - time))[None])
        x = scheduler.step((x - x0) / time, timestep, x).prev_sample
    torch.testing.assert_close(euler(best_denoiser, SHAPE, [SEED], levels=levels), x, rtol=1e-5, atol=1e-5)
