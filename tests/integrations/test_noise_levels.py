"""The noise levels that trainers draw, through their integrations: none of them looks wrong to the criterion."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import vadiff
from vadiff.errors import DiffusionLossWarning
from vadiff.integrations import lucidrains
from vadiff.integrations.diffusers import scheduler_loss
from vadiff.integrations.edm import EDM2Loss, EDMLoss
from vadiff.integrations.flow_matching import FlowMatchingLoss
from vadiff.integrations.k_diffusion import WeightedDenoiser
from vadiff.integrations.kohya import post_process_loss

ddpm: Any = pytest.importorskip("denoising_diffusion_pytorch", reason="denoising-diffusion-pytorch is not installed")

CALLS = 400
Step = Callable[[vadiff.DiffusionLoss], Callable[[], object]]  # criterion → one training call


class Network(nn.Module):
    """Returns zeros that require a gradient, whatever else it is given."""

    channels = out_dim = 1
    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(
        self, x: Tensor, *given: object, return_logvar: bool = False, **more: object
    ) -> Tensor | tuple[Tensor, ...]:
        output = self.scale * x
        return (output, self.scale.expand(len(x), 1, 1, 1)) if return_logvar else output


class Denoiser(nn.Module):
    """What `WeightedDenoiser` asks of k-diffusion's denoiser, with weighting "karras"."""

    sigma_data = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.inner_model = Network()

    def weighting(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def loss(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return (self.inner_model(clean) - noise).square().mean((1, 2, 3))


def images() -> Tensor:
    return torch.rand(4, 1, 8, 8)


def edm(criterion: vadiff.DiffusionLoss) -> Callable[[], object]:
    loss, network = EDMLoss(criterion=criterion), Network()
    return lambda: loss(network, images())


def edm2(criterion: vadiff.DiffusionLoss) -> Callable[[], object]:
    loss, network = EDM2Loss(criterion=criterion), Network()
    return lambda: loss(network, images())


def k_diffusion(criterion: vadiff.DiffusionLoss) -> Callable[[], object]:
    model = WeightedDenoiser(Denoiser(), criterion)
    return lambda: model.loss(images(), torch.randn(4, 1, 8, 8), (1.2 * torch.randn(4) - 1.2).exp())


def torchcfm(criterion: vadiff.DiffusionLoss) -> Callable[[], object]:
    loss, network = FlowMatchingLoss(criterion), Network()
    return lambda: loss(network(images()), images(), torch.rand(4))


def gaussian_diffusion(schedule: str, objective: str, timesteps: int) -> Step:
    def step(criterion: vadiff.DiffusionLoss) -> Callable[[], object]:
        diffusion = ddpm.GaussianDiffusion(
            Network(), image_size=8, timesteps=timesteps, objective=objective, beta_schedule=schedule
        )
        lucidrains.attach(diffusion, criterion)
        return lambda: diffusion(images())

    return step


def elucidated(criterion: vadiff.DiffusionLoss) -> Callable[[], object]:
    diffusion = lucidrains.attach(ddpm.ElucidatedDiffusion(LevelNetwork(), image_size=8, channels=1), criterion)
    return lambda: diffusion(images())


class LevelNetwork(Network):
    random_or_learned_sinusoidal_cond = True


def kohya(scheduler: object, draw: Callable[[], Tensor]) -> Step:
    def step(criterion: vadiff.DiffusionLoss) -> Callable[[], object]:
        args = SimpleNamespace(v_parameterization=False)
        return lambda: post_process_loss(criterion, torch.rand(4, requires_grad=True), args, draw(), scheduler)

    return step


def script(scheduler: object, draw: Callable[[], Tensor]) -> Step:
    def step(criterion: vadiff.DiffusionLoss) -> Callable[[], object]:
        network = Network()
        return lambda: scheduler_loss(
            criterion, scheduler, network(images()), images(), torch.randn(4, 1, 8, 8), draw()
        )

    return step


def indices() -> Tensor:
    return torch.randint(1000, (4,))


FLOW: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
EULER_EDM: Any = diffusers.EDMEulerScheduler()
TRAINERS: dict[str, Step] = {
    "NVlabs edm": edm,
    "NVlabs edm2": edm2,
    "k-diffusion": k_diffusion,
    "torchcfm": torchcfm,
    **{
        f"lucidrains {schedule}, {objective}, {timesteps} steps": gaussian_diffusion(schedule, objective, timesteps)
        for schedule, objective, timesteps in (
            ("linear", "pred_noise", 1000), ("cosine", "pred_v", 1000), ("sigmoid", "pred_v", 1000),
            ("linear", "pred_x0", 100), ("sigmoid", "pred_noise", 200),
        )
    },
    "lucidrains elucidated": elucidated,
    "kohya SD": kohya(diffusers.DDPMScheduler(beta_schedule="scaled_linear"), indices),
    "kohya Flux": kohya(FLOW, lambda: 1000 * torch.randn(4).sigmoid()),
    "kohya HunyuanImage": kohya(FLOW, indices),
    "diffusers DDPM": script(diffusers.DDPMScheduler(), indices),
    "diffusers DDIM": script(diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"), indices),
    "diffusers SD3": script(FLOW, lambda: FLOW.timesteps[(1000 * torch.randn(4).sigmoid()).long()]),
    "diffusers EDM": script(EULER_EDM, lambda: EULER_EDM.timesteps[torch.randint(len(EULER_EDM.timesteps), (4,))]),
}  # fmt: skip


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_s_own_noise_levels_stay_silent(trainer: str) -> None:
    criterion = vadiff.DiffusionLoss("constant")
    step = TRAINERS[trainer](criterion)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiffusionLossWarning)
        for _ in range(CALLS):
            step()
        criterion.summary()
    assert criterion.statistics.count.sum() > 1000
