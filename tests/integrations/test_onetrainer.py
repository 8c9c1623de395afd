"""OneTrainer: by a stand-in of its mixins, and the real ones from a checkout: VADIFF_ONETRAINER=FOLDER."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vadiff
from vadiff.integrations import onetrainer

CHECKOUT = os.environ.get("VADIFF_ONETRAINER")
MIXINS = "modules.modelSetup.mixin"
T = 1000
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, T) ** 2


class LossMixin:
    """The losses of a batch, and the arguments with which the setups ask for them."""

    def _losses(self, batch: dict[str, Any], data: dict[str, Any]) -> Tensor:
        return (data["predicted"] - data["target"]).square().flatten(1).mean(1) * batch["loss_weight"]

    def _diffusion_losses(
        self, batch: Any, data: Any, config: Any, train_device: Any, betas: Any = None, alphas_cumprod_fun: Any = None
    ) -> Tensor:
        return self._losses(batch, data)

    def _flow_matching_losses(
        self, batch: Any, data: Any, config: Any, train_device: Any, sigmas: Any = None
    ) -> Tensor:
        return self._losses(batch, data)


class FlowMixin:
    def _add_noise_discrete(self, clean: Tensor, noise: Tensor, timestep: Tensor, table: Tensor) -> tuple[Tensor, Any]:
        sigma = ((timestep + 1) / len(table)).view(-1, 1, 1, 1)
        return sigma * noise + (1 - sigma) * clean, sigma


class DiffusionMixin:
    def _add_noise_discrete(self, clean: Tensor, noise: Tensor, timestep: Tensor, betas: Tensor) -> Tensor:
        alphas_cumprod = torch.cumprod(1 - betas, 0)[timestep].view(-1, 1, 1, 1)
        return alphas_cumprod.sqrt() * clean + (1 - alphas_cumprod).sqrt() * noise

    def _add_noise_continuous(self, clean: Tensor, noise: Tensor, timestep: Tensor, function: Any) -> Tensor:
        alphas_cumprod = function(timestep, 4)
        return alphas_cumprod.sqrt() * clean + (1 - alphas_cumprod).sqrt() * noise


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


@pytest.fixture(params=["stand-in", "real"])
def mixins(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The mixins (loss, flow, diffusion), with their own methods afterwards."""
    names = ("DiffusionLoss", "FlowMatching", "Diffusion")
    if request.param == "real":
        if CHECKOUT is None:
            pytest.skip("VADIFF_ONETRAINER names no checkout of OneTrainer")
        monkeypatch.syspath_prepend(CHECKOUT)
        found = [
            getattr(importlib.import_module(f"{MIXINS}.ModelSetup{name}Mixin"), f"ModelSetup{name}Mixin")
            for name in names
        ]
    else:
        found = [
            type(f"ModelSetup{name}Mixin", (base,), dict(vars(base)))
            for name, base in zip(names, (LossMixin, FlowMixin, DiffusionMixin), strict=True)
        ]
        path = f"{MIXINS}.ModelSetupDiffusionLossMixin"
        monkeypatch.setitem(sys.modules, path, _module(path, ModelSetupDiffusionLossMixin=found[0]))
        for package in ("modules", "modules.modelSetup", MIXINS):
            monkeypatch.setitem(sys.modules, package, _module(package, __path__=[]))
    own = {name: vars(found[0])[name] for name in ("_diffusion_losses", "_flow_matching_losses")}
    yield found
    for name, method in own.items():
        setattr(found[0], name, method)


def config(**options: Any) -> Any:
    """Those of OneTrainer's options that its losses read."""
    enum = SimpleNamespace(get_scale=lambda *given, **named: 1)
    names = {"mae_strength": 0.0, "log_cosh_strength": 0.0, "huber_strength": 0.0, "vb_loss_strength": 0.0}
    return SimpleNamespace(
        mse_strength=1.0, masked_training=False, loss_scaler=enum, batch_size=6, gradient_accumulation_steps=1,
        normalize_masked_area_loss=False, **{**names, **options},
    )  # fmt: skip


KINDS = ("flow", "sana", "epsilon", "v_prediction", "continuous")


def losses_of(mixins: Any, kind: str, seed: int, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, prediction, log-SNR by which noise was added) of a batch, as the setups of this kind compute them."""
    loss, flow, diffusion = mixins
    setup: Any = type("Setup", (loss, flow if kind in ("flow", "sana") else diffusion), {})()
    generator = torch.Generator().manual_seed(seed)
    clean, noise, prediction = torch.randn(3, 6, 4, 8, 8, generator=generator)
    prediction.requires_grad_(grad)
    timestep = torch.randint(T, (6,), generator=generator).int()
    tables: dict[str, Any]
    if kind == "flow":
        noisy, _ = setup._add_noise_discrete(clean, noise, timestep, torch.arange(T))
        tables = {"sigmas": torch.linspace(1, 1 / T, T)}
    elif kind == "continuous":
        tables = {"alphas_cumprod_fun": lambda t, dim: (1 - t).clamp(0.01, 0.99).view(-1, *[1] * (dim - 1))}
        timestep = (timestep + 1) / T
        noisy = setup._add_noise_continuous(clean, noise, timestep, tables["alphas_cumprod_fun"])
    else:
        noisy = setup._add_noise_discrete(clean, noise, timestep, BETAS)
        noisy = noisy[0] if kind == "sana" else noisy
        tables = {"betas": BETAS}
    data = {"loss_type": "target", "predicted": prediction, "target": noise, "timestep": timestep}
    if kind in ("epsilon", "v_prediction"):
        data["prediction_type"] = kind
    method = setup._flow_matching_losses if kind == "flow" else setup._diffusion_losses
    loss_weights = {"loss_weight": torch.linspace(0.5, 1.5, 6)}
    options = config(loss_weight_fn=_constant(loss))
    found = method(batch=loss_weights, data=data, config=options, train_device=torch.device("cpu"), **tables)
    pairs = torch.stack([clean.flatten(1), noise.flatten(1)], 2).double()
    solved = torch.linalg.lstsq(pairs, noisy.flatten(1).double()[..., None]).solution[..., 0]
    return found, prediction, 2 * (solved[:, 0].abs() / solved[:, 1].abs()).log()


def _constant(loss: Any) -> Any:
    """OneTrainer's LossWeight.CONSTANT; anything for the stand-in."""
    return (
        importlib.import_module("modules.util.enum.LossWeight").LossWeight.CONSTANT if "__init__" in vars(loss) else 0
    )


class Recording(vadiff.DiffusionLoss):
    """A criterion that keeps the log-SNR that it was given."""

    def reweight(self, loss_per_sample: Tensor, log_snr: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        self.given = log_snr
        return super().reweight(loss_per_sample, log_snr, sample_weight)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_constant_weighting_is_onetrainer_s_own_loss_at_its_own_levels(mixins: Any, kind: str) -> None:
    expected, expected_prediction, _ = losses_of(mixins, kind, 0)
    expected.mean().backward()
    criterion: Any = onetrainer.attach(Recording("constant"))
    found, prediction, levels = losses_of(mixins, kind, 0)
    found.mean().backward()
    assert torch.equal(found, expected)
    assert torch.equal(prediction.grad, expected_prediction.grad)
    # as times of a flow, which are bounded
    torch.testing.assert_close(criterion.given.double().sigmoid(), levels.sigmoid(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_weighted_and_validation_is_left_alone(mixins: Any, kind: str) -> None:
    plain, *_ = losses_of(mixins, kind, 99)
    first = onetrainer.attach(vadiff.DiffusionLoss())
    criterion = onetrainer.attach(vadiff.DiffusionLoss())  # in place of the first
    for seed in range(20):
        losses_of(mixins, kind, seed)
    assert criterion.statistics.count.sum() > 100
    assert first.statistics.count.sum() == 0
    assert not torch.equal(losses_of(mixins, kind, 99)[0], plain)
    before = criterion.statistics.state.clone()
    assert torch.equal(losses_of(mixins, kind, 99, grad=False)[0], plain)
    assert torch.equal(criterion.statistics.state, before)


def test_fixed_weights_are_those_of_the_form_of_the_loss(mixins: Any) -> None:
    for kind, form in (("flow", "flow"), ("sana", "flow"), ("epsilon", "epsilon"), ("v_prediction", "v_prediction")):
        criterion = onetrainer.attach(vadiff.DiffusionLoss("min_snr"))
        losses_of(mixins, kind, 0)
        assert criterion.weighting == vadiff.weighting.MinSNR(prediction_type=form)


def test_several_gpus_are_refused(mixins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    onetrainer.attach(vadiff.DiffusionLoss())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="trains on 2 GPUs, expected one"):
        losses_of(mixins, "flow", 0)


def test_what_cannot_be_attached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"criterion is a str, expected a vadiff\.DiffusionLoss"):
        onetrainer.attach("constant")
    with pytest.raises(ValueError, match="Use weighting='loss_level'"):
        onetrainer.attach(vadiff.DiffusionLoss("learned"))
    for name in ("modules", "modules.modelSetup", MIXINS, f"{MIXINS}.ModelSetupDiffusionLossMixin"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="run this in OneTrainer's folder"):
        onetrainer.attach(vadiff.DiffusionLoss())


@pytest.mark.skipif(CHECKOUT is None, reason="VADIFF_ONETRAINER names no checkout of OneTrainer")
def test_every_setup_of_onetrainer_calls_one_of_the_two_methods() -> None:
    folder = Path(str(CHECKOUT)) / "modules" / "modelSetup"
    setups = [path for path in folder.glob("Base*Setup.py") if path.stem != "BaseModelSetup"]
    assert len(setups) >= 15
    for path in setups:
        tree = ast.parse(path.read_text())
        methods = [
            node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "calculate_loss"
        ]
        text = ast.unparse(methods[0])
        assert text.count("self._flow_matching_losses(") + text.count("self._diffusion_losses(") == 1
        assert text.rstrip().endswith(".mean()")
