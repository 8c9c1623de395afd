"""musubi-tuner's trainers: by a stand-in, and the real ones from a checkout: VADIFF_MUSUBI_TUNER=FOLDER."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

import vadiff
from vadiff.integrations import kohya
from vadiff.integrations.kohya.__main__ import main

CHECKOUT = os.environ.get("VADIFF_MUSUBI_TUNER")
on_the_real_one = pytest.mark.skipif(CHECKOUT is None, reason="VADIFF_MUSUBI_TUNER names no checkout of musubi-tuner")


@dataclasses.dataclass
class Output:
    pred: Tensor
    target: Tensor
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


class NetworkTrainer:
    """The methods of the trainer that have to do with the loss."""

    def resume_from_local_or_hf_if_specified(self, accelerator: Any, args: Any) -> bool:
        if args.resume:
            accelerator.load_state(args.resume)
        return bool(args.resume)

    def compute_loss(
        self, args: Any, output: Any, timesteps: Tensor, scheduler: Any, dit_dtype: Any, dtype: Any, global_step: int
    ) -> tuple[Tensor, dict[str, float]]:
        loss = (output.pred.to(dtype) - output.target).square().mean()
        return loss, {"loss/pred": output.pred.detach().mean().item()}

    def extra_step_logs(self, args: Any, logs: dict[str, Any]) -> dict[str, Any]:
        return {"own": 1.0}

    def train(self, args: Any) -> None:
        for step in range(args.steps):
            loss, metrics = self.compute_loss(
                args, output(seed=step), timesteps(seed=step), flow_scheduler(), None, torch.float32, step
            )
            self.logged = {"loss/current": loss.item(), **metrics, **self.extra_step_logs(args, {})}


def flow_scheduler() -> Any:
    sigmas = torch.linspace(1, 0, 1001)
    return SimpleNamespace(
        sigmas=sigmas, timesteps=sigmas[:-1] * 1000, config=SimpleNamespace(num_train_timesteps=1000)
    )


def output(seed: int, samples: int = 4) -> Output:
    generator = torch.Generator().manual_seed(seed)
    pred, target = torch.randn(2, samples, 4, 2, 4, 4, generator=generator)
    return Output(pred.requires_grad_(), target)


def timesteps(seed: int, samples: int = 4) -> Tensor:
    return 1 + 1000 * torch.rand(samples, generator=torch.Generator().manual_seed(seed))


class Trainer(kohya.MusubiAdaptiveLoss, NetworkTrainer):
    pass


def options(line: str, **given: Any) -> Any:
    given = {"timestep_sampling": "shift", "resume": None, "steps": 10, **given}
    return kohya.add_arguments(argparse.ArgumentParser()).parse_args(line.split(), namespace=SimpleNamespace(**given))


def test_losses_are_weighted_recorded_and_logged() -> None:
    trainer = Trainer()
    trainer.train(options("--vadiff_weighting constant --vadiff_log_every 10 --vadiff_half_life inf"))
    expected, metrics = NetworkTrainer().compute_loss(None, output(9), None, None, None, torch.float32, 9)
    assert trainer.logged["loss/current"] == pytest.approx(expected.item(), rel=1e-6)
    assert trainer.logged["loss/pred"] == pytest.approx(metrics["loss/pred"], rel=1e-5)
    assert trainer.logged["own"] == 1.0
    assert any(name.startswith("vadiff/base_loss/") for name in trainer.logged)
    assert trainer.criterion.statistics.count.sum() == 40
    t = torch.cat([timesteps(seed) - 1 for seed in range(10)]) / 1000
    criterion = vadiff.DiffusionLoss.for_process("flow", weighting="constant", fine_tuning=True)
    criterion.reweight(torch.ones(40, requires_grad=True), vadiff.log_snr.from_flow_time(t))
    assert torch.equal(trainer.criterion.statistics.count > 0, criterion.statistics.count > 0)


@pytest.mark.parametrize("sampling", ["sigma", "uniform"])
def test_timesteps_of_the_samplings_of_t_are_one_higher(sampling: str) -> None:
    trainer = Trainer()
    args = options("--vadiff_bins 2 --vadiff_log_snr_range -14 14", timestep_sampling=sampling, steps=0)
    with pytest.warns(UserWarning, match="recorded no loss"):
        trainer.train(args)
    given = torch.tensor([500.5, 2.0, 900.0, 999.0])
    trainer.compute_loss(args, output(0), given, flow_scheduler(), None, torch.float32, 0)
    assert trainer.criterion.statistics.count.tolist() == ([3, 1] if sampling == "sigma" else [2, 2])


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_statistics_are_in_the_states(accelerator: Accelerator, tmp_path: Path) -> None:
    trainer = Trainer()
    trainer.train(options(""))
    assert not trainer.resume_from_local_or_hf_if_specified(accelerator, options(""))
    accelerator.save_state(str(tmp_path))
    before = {name: value.clone() for name, value in trainer.criterion.state_dict().items()}
    trainer.train(options(""))
    accelerator.load_state(str(tmp_path))
    torch.testing.assert_close(dict(trainer.criterion.state_dict()), before, rtol=0, atol=0)


# Those that can be imported without CUDA: `fpack` and `wan` ask for it as they are imported.
REAL = (
    "hv_train_network",
    "hv_1_5_train_network",
    "flux_kontext_train_network",
    "flux_2_train_network",
    "kandinsky5_train_network",
    "qwen_image_train_network",
    "zimage_train_network",
)


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [f"{CHECKOUT}/src", *sys.path])


def real_class(script: str) -> Any:
    module = importlib.import_module(f"musubi_tuner.{script}")
    return next(
        found
        for found in vars(module).values()
        if isinstance(found, type) and found.__module__ == module.__name__ and hasattr(found, "compute_loss")
    )


@on_the_real_one
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", REAL)
@pytest.mark.parametrize("sampling", ["sigma", "uniform", "shift"])
@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt"])
def test_real_trainer(checkout: None, script: str, sampling: str, weighting: str, monkeypatch: Any) -> None:
    """The script's own `process_batch`, with a network that returns its input."""
    base = real_class(script)
    noisy: list[Tensor] = []

    def call_dit(
        self: Any, args: Any, accelerator: Any, transformer: Any, latents: Tensor, batch: Any, noise: Tensor,
        noisy_model_input: Tensor, *rest: Any, **named: Any,
    ) -> Any:  # fmt: skip
        noisy.append(noisy_model_input)
        made = importlib.import_module("musubi_tuner.training.trainer_base").DiTOutput
        return made(pred=noisy_model_input.clone().requires_grad_(), target=noise - latents)

    class Recording(vadiff.DiffusionLoss):
        def reweight(self, loss_per_sample: Tensor, log_snr: Tensor, sample_weight: Tensor | None = None) -> Tensor:
            self.given = log_snr
            return super().reweight(loss_per_sample, log_snr, sample_weight)

    schedulers = importlib.import_module("musubi_tuner.modules.scheduling_flow_match_discrete")
    scheduler = schedulers.FlowMatchDiscreteScheduler(shift=3.0, reverse=True, solver="euler")
    monkeypatch.setattr(base, "call_dit", call_dit)
    trainer = type("Trainer", (kohya.MusubiAdaptiveLoss, base), {"criterion": Recording("constant")})()
    args = (
        importlib.import_module("musubi_tuner.training.parser_common")
        .setup_parser_common()
        .parse_args(["--timestep_sampling", sampling, "--weighting_scheme", weighting])
    )
    shape = (5, 16, 3, 8, 8)
    for seed in range(3):
        losses = []
        for one in (base(), trainer):
            torch.manual_seed(seed)
            latents, noise = torch.randn(2, *shape)
            loss, _ = one.process_batch(
                args, Accelerator(cpu=True), None, None, {"timesteps": None}, latents, noise, scheduler,
                torch.float32, torch.float32, None, seed,
            )  # fmt: skip
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
        t = ((noisy[-1] - latents) * (noise - latents)).flatten(1).sum(1) / (noise - latents).square().flatten(1).sum(1)
        recorded = trainer.criterion.given.div(-2).sigmoid()
        torch.testing.assert_close(recorded, t, rtol=0, atol=2e-5)


@on_the_real_one
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", REAL)
def test_real_command_line(checkout: None, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    first = importlib.import_module("musubi_tuner.training.trainer_base").NetworkTrainer
    monkeypatch.setattr(first, "train", lambda trainer, args: seen.append(args))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.delitem(sys.modules, script, raising=False)
    line = "--dit d --vadiff_weighting loss_level --vadiff_bins 12 --learning_rate 0.1"
    extra = {
        "kandinsky5_train_network": ["--task", "k5-lite-t2v-5s-sd"],
        "flux_2_train_network": ["--model_version", "klein-4b"],
    }.get(script, [])
    trainer: Any = main([f"{CHECKOUT}/{script}.py", *line.split(), *extra])
    assert seen[0].learning_rate == 0.1
    assert isinstance(trainer, real_class(script))
    assert trainer.criterion.weighting == vadiff.weighting.LossLevel()
    assert trainer.criterion.statistics.bins.size == 12


@on_the_real_one
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", ["qwen_image_train", "zimage_train"])
def test_scripts_with_a_loop_of_their_own_are_refused(checkout: None, script: str) -> None:
    with pytest.raises(SystemExit, match="has a training loop of its own, which does not call compute_loss"):
        main([f"{CHECKOUT}/src/musubi_tuner/{script}.py"])
