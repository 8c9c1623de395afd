"""OpenAI's GaussianDiffusion (also DiT's) and SiT's Transport with the lines of docs/trainers/openai.md and dit-sit.md.

They are not on PyPI. Stand-ins have their interface; where VADIFF_TRAINERS names a folder with checkouts called
improved-diffusion, guided-diffusion, DiT and SiT, the real classes run as well.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from seen import Seen
from torch import Tensor, nn

import vadiff

Gradients = tuple[Tensor, list[Tensor]]


class Net(nn.Module):
    """A network with twice as many channels if it also predicts a variance."""

    def __init__(self, learn_sigma: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4 if learn_sigma else 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) * (1 + 0.1 * t.float().cos()[:, None, None, None])


class StandIn:
    """What a loop reads of a GaussianDiffusion."""

    num_timesteps = 100

    def __init__(self, learn_sigma: bool) -> None:
        self.learn_sigma = learn_sigma
        self.alphas_cumprod = np.cumprod(1 - np.linspace(1e-3, 0.2, 100))

    def training_losses(self, model: Net, x_start: Tensor, t: Tensor) -> dict[str, Tensor]:
        noise, alpha_bar = torch.randn_like(x_start), torch.from_numpy(self.alphas_cumprod).float()[t, None, None, None]
        output = model(alpha_bar.sqrt() * x_start + (1 - alpha_bar).sqrt() * noise, t)
        mse = (noise - output[:, :2]).square().mean((1, 2, 3))
        if not self.learn_sigma:
            return {"mse": mse, "loss": mse}
        vb = output[:, 2:].square().mean((1, 2, 3))
        return {"vb": vb, "mse": mse, "loss": mse + vb}


class StandInTransport:
    """What a loop reads of SiT's Transport, with its GVP path."""

    class path_sampler:
        @staticmethod
        def compute_alpha_t(t: Tensor) -> tuple[Tensor, Tensor]:
            return (t * math.pi / 2).sin(), math.pi / 2 * (t * math.pi / 2).cos()

        @staticmethod
        def compute_sigma_t(t: Tensor) -> tuple[Tensor, Tensor]:
            return (t * math.pi / 2).cos(), -math.pi / 2 * (t * math.pi / 2).sin()

    def training_losses(self, model: Net, x1: Tensor) -> dict[str, Tensor]:
        t = torch.rand(len(x1))
        (alpha, d_alpha), (sigma, d_sigma) = self.path_sampler.compute_alpha_t(t), self.path_sampler.compute_sigma_t(t)
        x0 = torch.randn_like(x1)
        alpha, d_alpha, sigma, d_sigma = (each[:, None, None, None] for each in (alpha, d_alpha, sigma, d_sigma))
        error = model(alpha * x1 + sigma * x0, t) - (d_alpha * x1 + d_sigma * x0)
        return {"t": t, "loss": error.square().mean((1, 2, 3))}


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], ModuleType]:
    """(repository, module) → the module of a checkout."""

    def load(repository: str, module: str) -> ModuleType:
        folder = Path(os.environ.get("VADIFF_TRAINERS", "nowhere"), repository)
        if not folder.is_dir():
            pytest.skip(f"VADIFF_TRAINERS names no folder with a checkout of {repository}")
        monkeypatch.syspath_prepend(folder)
        for name in [name for name in sys.modules if name.partition(".")[0] == module.partition(".")[0]]:
            monkeypatch.delitem(sys.modules, name)
        return importlib.import_module(module)

    return load


def gaussian(kind: str, learn_sigma: bool, load: Callable[[str, str], ModuleType]) -> Any:
    if kind == "stand-in":
        return StandIn(learn_sigma)
    found = load(kind, f"{'diffusion' if kind == 'DiT' else kind.replace('-', '_')}.gaussian_diffusion")
    variance = found.ModelVarType.LEARNED_RANGE if learn_sigma else found.ModelVarType.FIXED_LARGE
    return found.GaussianDiffusion(
        betas=np.linspace(1e-3, 0.2, 100), model_mean_type=found.ModelMeanType.EPSILON, model_var_type=variance,
        loss_type=found.LossType.MSE,
    )  # fmt: skip


def transport(kind: str, load: Callable[[str, str], ModuleType]) -> Any:
    if kind == "stand-in":
        return StandInTransport()
    made = load("SiT", "transport").create_transport(kind, "velocity", None, None, None)
    drawn: list[Tensor] = []
    sample, losses = made.sample, made.training_losses

    def remembered(x1: Tensor) -> Any:
        found = sample(x1)
        drawn[:] = found[:1]
        return found

    made.sample = remembered
    made.training_losses = lambda *given: {**losses(*given), "t": drawn[0]}  # the page's line in transport.py
    return made


def of(loss: Tensor, net: nn.Module) -> Gradients:
    net.zero_grad()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["stand-in", "improved-diffusion", "guided-diffusion", "DiT"])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_constant_weighting_is_the_loops_own_loss_with_a_schedule_samplers_weights(
    kind: str, learn_sigma: bool, checkout: Callable[[str, str], ModuleType]
) -> None:
    diffusion, net, images = gaussian(kind, learn_sigma, checkout), Net(learn_sigma), torch.randn(8, 2, 8, 8)
    criterion = vadiff.DiffusionLoss("constant", bins=16, log_snr_range=(-8.0, 8.0), half_life=math.inf)
    t, weights, seen = torch.randint(diffusion.num_timesteps, (8,)), torch.rand(8) + 0.5, Seen()
    torch.manual_seed(1)
    expected = of((diffusion.training_losses(net, images, t)["loss"] * weights).mean(), net)
    torch.manual_seed(1)
    losses = diffusion.training_losses(net, images, t)
    log_snr = vadiff.log_snr.from_alphas_cumprod(diffusion.alphas_cumprod, t)
    loss = criterion.reweight(losses["mse"], log_snr, sample_weight=weights).mean()
    if "vb" in losses:
        loss = loss + (losses["vb"] * weights).mean()
    torch.testing.assert_close(of(loss, net), expected)
    seen.add(losses["mse"], log_snr)
    seen.check(criterion)  # the objective, without the sampler's 1/p
    assert ("vb" in losses) == learn_sigma


@pytest.mark.parametrize("kind", ["stand-in", "Linear", "GVP", "VP"])
def test_constant_weighting_is_sits_own_loss_on_every_path(
    kind: str, checkout: Callable[[str, str], ModuleType]
) -> None:
    model, net, images = transport(kind, checkout), Net(), torch.randn(8, 2, 8, 8)
    criterion = vadiff.DiffusionLoss("constant", bins=16, log_snr_range=(-8.0, 8.0), half_life=math.inf)
    torch.manual_seed(1)
    expected = of(model.training_losses(net, images)["loss"].mean(), net)
    torch.manual_seed(1)
    losses = model.training_losses(net, images)
    alpha, _ = model.path_sampler.compute_alpha_t(losses["t"])
    sigma, _ = model.path_sampler.compute_sigma_t(losses["t"])
    log_snr = vadiff.log_snr.from_alpha_sigma(alpha, sigma)
    torch.testing.assert_close(of(criterion.reweight(losses["loss"], log_snr).mean(), net), expected)
    assert criterion.statistics.count.sum() == 8
    assert bool((log_snr.argsort() == losses["t"].argsort()).all())  # data are at t = 1
