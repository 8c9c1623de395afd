"""sd-scripts' own trainers, imported from a checkout: VADIFF_SD_SCRIPTS=FOLDER, with what they require installed.

A network in place of the model records what it is given, and so the noise level that the trainer really used.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import vadiff
from vadiff.integrations import kohya
from vadiff.integrations.kohya.__main__ import main

CHECKOUT = os.environ.get("VADIFF_SD_SCRIPTS")
pytestmark = [
    pytest.mark.skipif(CHECKOUT is None, reason="VADIFF_SD_SCRIPTS names no checkout of sd-scripts"),
    pytest.mark.filterwarnings("ignore"),  # those of the scripts and of what they import
]

DDPM = ("train_network", "sdxl_train_network")
FLOW = {
    "flux_train_network": "--model_prediction_type raw",
    "sd3_train_network": "",
    "lumina_train_network": "",
    "anima_train_network": "",
    "hunyuan_image_train_network": "--model_prediction_type raw",
}
SAMPLING = ("sigma", "uniform", "shift")


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkout's modules, of which `networks` has the name of a module of this project's benchmarks."""
    others = [folder for folder in sys.path if not (Path(folder) / "networks.py").exists()]
    monkeypatch.setattr(sys, "path", [str(CHECKOUT), *others])
    if not hasattr(sys.modules.get("networks"), "__path__"):
        monkeypatch.delitem(sys.modules, "networks", raising=False)


@pytest.fixture(autouse=True)
def noise(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What torch.randn_like returned."""
    drawn: list[Tensor] = []
    own = torch.randn_like

    def randn_like(*given: Any, **options: Any) -> Tensor:
        drawn.append(own(*given, **options))
        return drawn[-1]

    monkeypatch.setattr(torch, "randn_like", randn_like)
    return drawn


class Model(nn.Module):
    """In place of a U-Net or a transformer: any call, a multiple of the noisy latents."""

    def __init__(self, packed: bool, wrapped: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.packed, self.wrapped = packed, wrapped
        self.noisy: Tensor | None = None

    def forward(self, *given: Any, **named: Any) -> Any:
        noisy = given[0] if given else named["img"] if "img" in named else named["x"]
        self.noisy = noisy.detach()
        output = self.scale * noisy
        return SimpleNamespace(sample=output) if self.wrapped else output

    def get_mod_vectors(self, **given: Any) -> None:
        return None

    def latents(self, shape: torch.Size) -> Tensor:
        """The noisy latents of the last call, [B, C, H, W]."""
        assert self.noisy is not None
        if self.packed:
            utilities = importlib.import_module("library.flux_utils")
            unpacked: Tensor = utilities.unpack_latents(self.noisy, shape[2] // 2, shape[3] // 2)
            return unpacked
        return self.noisy.reshape(shape)


class Recording(vadiff.DiffusionLoss):
    """A criterion that keeps the log-SNR that it was given."""

    def reweight(self, loss_per_sample: Tensor, log_snr: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        self.given = log_snr
        return super().reweight(loss_per_sample, log_snr, sample_weight)


def trainer_class(script: str) -> Any:
    module = importlib.import_module(script)
    return next(
        found
        for found in vars(module).values()
        if isinstance(found, type) and found.__module__ == script and hasattr(found, "post_process_loss")
    )


def arguments(script: str, line: str = "") -> argparse.Namespace:
    parser = kohya.add_arguments(importlib.import_module(script).setup_parser())
    parsed: argparse.Namespace = parser.parse_args(line.split())
    return parsed


def text_conditions(script: str, samples: int) -> list[Tensor]:
    ones = torch.ones(samples, 3, 8)
    mask = torch.ones(samples, 3)
    conditions: dict[str, list[Any]] = {
        "train_network": [ones],
        "sdxl_train_network": [ones, ones, ones[:, 0]],
        "flux_train_network": [ones[:, 0], ones, torch.zeros(3, 3), mask],
        "sd3_train_network": [ones, torch.ones(samples, 3, 4096), ones[:, 0], mask, mask, mask],
        "lumina_train_network": [ones, mask, mask],
        "anima_train_network": [ones, mask, mask, mask, torch.zeros(samples)],
        "hunyuan_image_train_network": [ones, mask, ones, mask, [False] * samples],
    }
    return conditions[script]


def loss_of(
    trainer: Any, script: str, args: Any, samples: int, seed: int, train: bool = True, dtype: Any = None
) -> Any:
    """(loss, its gradient, model, latents) of one batch, through the script's own `process_batch`."""
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True)
    model = Model(packed=script.startswith("flux"), wrapped=script == "train_network")
    if script.startswith("sd3"):
        strategies = importlib.import_module("library.strategy_base")
        strategy = importlib.import_module("library.strategy_sd3").Sd3TextEncodingStrategy()
        strategies.TextEncodingStrategy._strategy = strategy
    else:
        strategy = SimpleNamespace(drop_cached_text_encoder_outputs=lambda *given, caption_dropout_rates: list(given))
    sizes = torch.full((samples, 2), 64)
    batch = {
        "latents": torch.randn(samples, 4, 8, 8),
        "text_encoder_outputs_list": text_conditions(script, samples),
        "loss_weights": torch.linspace(0.5, 1.5, samples),
        "original_sizes_hw": sizes,
        "crop_top_lefts": 0 * sizes,
        "target_sizes_hw": sizes,
    }
    scheduler = trainer.get_noise_scheduler(args, accelerator.device)
    latents: list[Tensor] = []
    own = type(trainer).shift_scale_latents

    def shift_scale_latents(*given: Any) -> Tensor:
        latents.append(own(trainer, *given))
        return latents[-1]

    trainer.shift_scale_latents = shift_scale_latents
    loss = trainer.process_batch(
        batch, [], model, None, None, scheduler, torch.float32, dtype or torch.float32, accelerator, args, strategy,
        None, is_train=train, train_text_encoder=False, train_unet=True,
    )  # fmt: skip
    if train:
        loss.backward()
    return loss.detach(), model.scale.grad, model, latents[0]


def true_log_snr(noisy: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """ln(alpha²/sigma²) of noisy = alpha·latents + sigma·noise, by least squares, [B] float64."""
    pairs = torch.stack([latents.flatten(1), noise.flatten(1)], 2).double()
    found = torch.linalg.lstsq(pairs, noisy.flatten(1).double()[..., None]).solution[..., 0]
    return 2 * (found[:, 0].abs() / found[:, 1].abs()).log()


def settings() -> Iterator[tuple[str, str]]:
    for script in DDPM:
        for flags in ("", "--v_parameterization --min_snr_gamma 5", "--zero_terminal_snr --debiased_estimation_loss"):
            yield script, flags
        yield script, "--zero_terminal_snr --v_parameterization --min_snr_gamma 5 --scale_v_pred_loss_like_noise_pred"
    for script, flags in FLOW.items():
        for sampling in SAMPLING if script != "sd3_train_network" else ("",):
            yield script, f"{flags} --timestep_sampling {sampling}" if sampling else flags


@pytest.mark.parametrize(("script", "flags"), list(settings()))
def test_trainer_of_networks(script: str, flags: str, noise: list[Tensor]) -> None:
    """Constant weighting is the trainer's own loss and gradient, and the recorded level is the one it used."""
    base, args = trainer_class(script), arguments(script, flags)
    adaptive = type("Trainer", (kohya.AdaptiveLoss, base), {"criterion": Recording("constant")})
    trainer = adaptive()
    for seed, samples in enumerate((4, 1, 1, 1, 4)):
        expected, expected_gradient, *_ = loss_of(base(), script, args, samples, seed)
        noise.clear()
        found, gradient, model, latents = loss_of(trainer, script, args, samples, seed)
        assert found == expected
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
        level = true_log_snr(model.latents(latents.shape), latents, noise[0])
        whole = "hunyuan" in script  # its timesteps are whole: half a step off at most
        t, recorded = level.div(-2).sigmoid(), trainer.criterion.given.double().div(-2).sigmoid()
        torch.testing.assert_close(recorded, t, rtol=0, atol=5.1e-4 if whole else 2e-5)
    before = trainer.criterion.statistics.state.clone()
    validation, *_ = loss_of(trainer, script, args, 4, 9, train=False)
    assert validation == loss_of(base(), script, args, 4, 9, train=False)[0]
    assert torch.equal(trainer.criterion.statistics.state, before)


@pytest.mark.parametrize("script", [*DDPM, *FLOW])
def test_trainer_of_networks_in_bfloat16_and_by_its_command_line(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`-m vadiff.integrations.kohya SCRIPT` reaches `train` with a criterion, which then weights and records."""
    base, seen = trainer_class(script), []
    first = importlib.import_module("train_network").NetworkTrainer
    monkeypatch.setattr(first, "train", lambda trainer, args: seen.append(args))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    line = "--vadiff_weighting loss_level --vadiff_weighting_args strength=0.5 --vadiff_bins 12 --learning_rate 0.1"
    trainer: Any = main([f"{CHECKOUT}/{script}.py", *line.split(), *FLOW.get(script, "").split()])
    args = seen[0]
    assert isinstance(trainer, base)
    assert args.learning_rate == 0.1
    assert trainer.criterion.weighting == vadiff.weighting.LossLevel(strength=0.5)
    assert trainer.criterion.statistics.bins.size == 12
    for seed in range(20):
        loss, *_ = loss_of(trainer, script, args, 4, seed, dtype=torch.bfloat16 if script in FLOW else None)
        assert loss.isfinite()
    assert trainer.criterion.statistics.count.sum() > 70
    assert trainer.criterion.weights.max() > 1.01 * trainer.criterion.weights.min()


# The scripts without `post_process_loss`: the line before which, or in place of which, one is inserted, and the name
# of the scheduler there.
OTHERS = {
    "fine_tune": "noise_scheduler",
    "train_db": "noise_scheduler",
    "sdxl_train": "noise_scheduler",
    "train_textual_inversion": "noise_scheduler",
    "train_control_net": "noise_scheduler",
    "sdxl_train_control_net": "noise_scheduler",
    "sdxl_train_control_net_lllite": "noise_scheduler",
    "sdxl_train_control_net_lllite_old": "noise_scheduler",
    "flux_train": "noise_scheduler",
    "flux_train_control_net": "noise_scheduler",
    "sd3_train": "dummy_scheduler",
    "lumina_train": "noise_scheduler",
    "anima_train": "noise_scheduler",
}
LINE = "loss = kohya.post_process_loss(criterion, loss, args, {timesteps}, {scheduler})"
ALWAYS = ("fine_tune", "sdxl_train")  # have losses of each sample only with flags such as --min_snr_gamma


def lines_of_the_loss(script: str) -> str:
    """From the script's residual to the mean of the loss, with the line of docs/trainers/kohya.md before that."""
    source = (Path(str(CHECKOUT)) / f"{script}.py").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        texts = [ast.get_source_segment(source, part) or "" for part in body]
        first = [
            n for n, text in enumerate(texts) if text.startswith(("huber_c =", "loss = train_util.conditional_loss"))
        ]
        last = [n for n, text in enumerate(texts) if text == "loss = loss.mean()"]
        if script in ALWAYS:
            last = [n for n, text in enumerate(texts) if text.startswith("if ") and "conditional_loss" in text]
        if first and last:
            break
    kept = body[first[0] : last[0] + 1]
    lines = [textwrap.dedent(" " * part.col_offset + (ast.get_source_segment(source, part) or "")) for part in kept]
    timesteps = "1000 * timesteps" if script == "anima_train" else "timesteps"
    ours = LINE.format(timesteps=timesteps, scheduler=OTHERS[script])
    assert source.count("train_util.resume_from_local_or_hf_if_specified(accelerator, args)") == 1
    *before, final = lines
    if script in ALWAYS:
        branch = body[last[0]]
        assert isinstance(branch, ast.If)
        branch.test = ast.Constant(True)  # `if True:`
        final = ast.unparse(branch)
        assert final.count("    loss = loss.mean()") == 1
        return "\n".join([*before, final.replace("    loss = loss.mean()", f"    {ours}\n    loss = loss.mean()")])
    assert source.count("loss = loss.mean()\n") + source.count("loss = loss.mean() ") == 1
    return "\n".join([*before, ours, final])


@pytest.mark.parametrize("script", OTHERS)
def test_line_for_the_other_scripts(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's own lines between residual and mean, with ours: the loss of constant weights is the script's."""
    module = importlib.import_module(script)
    args = module.setup_parser().parse_args([])
    flow = script.startswith(("flux", "sd3", "lumina", "anima"))
    line = trainer_class("sd3_train_network" if flow else "train_network")()
    options = arguments("sd3_train_network" if flow else "train_network")
    scheduler = line.get_noise_scheduler(options, torch.device("cpu"))
    torch.manual_seed(0)
    prediction = torch.randn(6, 4, 8, 8, requires_grad=True)
    timesteps = torch.tensor([1, 100, 300, 500, 800, 999])
    if flow:
        timesteps = timesteps.float() / (1000 if script == "anima_train" else 1)
    lines = lines_of_the_loss(script)
    losses = []
    criterion = vadiff.DiffusionLoss("constant")
    for text in (lines, "\n".join(text for text in lines.splitlines() if "kohya.post_process_loss" not in text)):
        names = {
            **vars(module), "args": args, "timesteps": timesteps, OTHERS[script]: scheduler, "criterion": criterion,
            "kohya": kohya, "batch": {"loss_weights": torch.linspace(0.5, 1.5, 6)}, "weighting": None,
            "noise_pred": prediction, "model_pred": prediction, "target": torch.zeros_like(prediction),
        }  # fmt: skip
        exec(text, names)
        losses.append(names["loss"])
    assert losses[0].dim() == 0
    assert losses[0] == losses[1]
    recorded = criterion.statistics.count.nonzero().flatten().tolist()
    assert len(recorded) >= 5
    assert criterion.statistics.count.sum() == 6
