"""vadiff.training: paired seeds, the objective, what is logged and saved, held-out loss."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vadiff
from vadiff.data import load_digits
from vadiff.data.digits import SIGMA_DATA
from vadiff.extras import MissingExtraError
from vadiff.models import Denoiser
from vadiff.process import edm_preconditioning
from vadiff.training import Objective, TrainConfig, TrainedRun, edm_objective, held_out_loss, load_denoiser, train
from vadiff.training.checkpoint import save_checkpoint
from vadiff.training.loop import _batches

TINY = TrainConfig(
    steps=5, batch_size=8, channels=(8, 16), log_every=2, held_out_draws=1, device="cpu", backend="reference"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "tiny"


@pytest.fixture(scope="module")
def run(folder: Path) -> TrainedRun:
    return train(TINY, out=folder, progress=False)


@pytest.fixture
def recorded() -> tuple[list[tuple[Tensor, ...]], Objective]:
    """A list, and an objective that puts (F, x0, eps, sigma) of every step into it."""
    steps: list[tuple[Tensor, ...]] = []

    def objective(
        criterion: vadiff.DiffusionLoss, output: Tensor, x0: Tensor, eps: Tensor, sigma: Tensor, sigma_data: float
    ) -> Tensor:
        steps.append(tuple(value.detach().clone() for value in (output, x0, eps, sigma)))
        return edm_objective(criterion, output, x0, eps, sigma, sigma_data)

    return steps, objective


def parameters(denoiser: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in denoiser.parameters()])


def test_same_seed_gives_the_same_run_to_the_bit(run: TrainedRun) -> None:
    again = train(TINY, progress=False)
    assert torch.equal(parameters(run.denoiser), parameters(again.denoiser))
    assert run.history.loss == again.history.loss
    assert torch.equal(run.criterion.statistics.state, again.criterion.statistics.state)
    assert torch.equal(run.held_out.per_image, again.held_out.per_image)


def test_runs_that_differ_in_the_weighting_see_the_same_noise(recorded) -> None:
    steps, objective = recorded
    for weighting in ("constant", "variance_aware"):
        train(dataclasses.replace(TINY, weighting=weighting), objective, progress=False)
    first, second = steps[: TINY.steps], steps[TINY.steps :]
    assert torch.equal(first[0][0], second[0][0])  # F of the first step: the same initial weights
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))


def test_data_seed_changes_the_data_and_nothing_else(recorded) -> None:
    steps, objective = recorded
    short = dataclasses.replace(TINY, steps=1)
    for data_seed in (None, 0, 1):
        train(dataclasses.replace(short, data_seed=data_seed), objective, progress=False)
    same, explicit, other = steps
    assert torch.equal(same[1], explicit[1])
    assert not any(torch.equal(a, b) for a, b in zip(same[1:], other[1:], strict=True))
    one, two = (
        parameters(train(dataclasses.replace(short, learning_rate=1e-30, data_seed=s), progress=False).denoiser)
        for s in (0, 1)
    )
    assert torch.allclose(one, two, rtol=0, atol=1e-20)


def test_training_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    train(dataclasses.replace(TINY, steps=1), progress=False)
    assert torch.equal(before, torch.get_rng_state())


def test_every_pass_sees_every_image_once() -> None:
    batches = _batches(size=10, batch_size=4, seed=0)
    seen = torch.cat([next(batches) for _ in range(5)])
    assert seen[:10].sort().values.tolist() == seen[10:].sort().values.tolist() == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_training_lowers_the_loss() -> None:
    config = dataclasses.replace(TINY, steps=60, learning_rate=1e-2, weighting="constant", log_every=10)
    losses = train(config, progress=False).history.loss
    assert losses[-1] < 0.9 * losses[0]


def test_edm_objective_is_the_weighted_squared_error_of_the_denoiser() -> None:
    random = torch.Generator().manual_seed(0)
    output, x0, eps = torch.randn(3, 16, 1, 8, 8, generator=random, dtype=torch.float64)
    sigma = (1.2 * torch.randn(16, generator=random, dtype=torch.float64) - 1.2).exp()
    c_skip, c_out, _, _ = (factor.view(-1, 1, 1, 1) for factor in edm_preconditioning(sigma, SIGMA_DATA))
    denoised = c_skip * (x0 + sigma.view(-1, 1, 1, 1) * eps) + c_out * output
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    expected = (weight * (denoised - x0).square().flatten(1).mean(1)).mean()
    criterion = vadiff.DiffusionLoss("constant", backend="reference")
    loss = edm_objective(criterion, output, x0, eps, sigma, SIGMA_DATA)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_min_snr_by_name_is_that_of_edms_objective() -> None:
    criterion = train(dataclasses.replace(TINY, steps=1, weighting="min_snr"), progress=False).criterion
    log_snr = torch.tensor([-3.0, 0.0, 3.0])
    snr = log_snr.exp()
    expected = snr.clamp(max=5.0) / (snr + 1 / SIGMA_DATA**2)
    assert torch.allclose(criterion.weight_at(log_snr), expected, rtol=1e-5)


def test_history_has_an_entry_every_few_steps_and_the_last(run: TrainedRun) -> None:
    assert run.history.steps == [2, 4, 5]
    history = run.history.as_dict()
    assert history["loss"].shape == (3,)
    assert {history[name].shape for name in ("count", "mean", "variance", "weights")} == {(3, TINY.bins)}
    assert torch.equal(history["weights"][-1], run.criterion.weights)


def test_metrics_are_one_json_object_per_line(run: TrainedRun, folder: Path) -> None:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["images"]) for entry in entries] == [(2, 16), (4, 32), (5, 40), (5, 40)]
    assert [entry["loss"] for entry in entries[:3]] == run.history.loss
    assert all(entry["base_loss"] > 0 and entry["skipped"] == 0 for entry in entries)
    assert entries[-1]["held_out"]["loss"] == pytest.approx(run.held_out.mean.tolist())


def test_checkpoint_gives_back_the_averaged_denoiser_without_running_code(run: TrainedRun, folder: Path) -> None:
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert content["step"] == TINY.steps
    assert content["config"]["weighting"] == "variance_aware"
    assert content["history"]["weights"].shape == (3, TINY.bins)
    assert torch.equal(parameters(load_denoiser(folder / "checkpoint.pt")), parameters(run.denoiser))
    criterion = vadiff.DiffusionLoss(half_life=TINY.half_life)
    criterion.load_state_dict(content["criterion"])
    assert torch.equal(criterion.weights, run.criterion.weights)


def test_crash_while_saving_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def crash(content: object, file: Path) -> None:
        Path(file).write_bytes(b"half a fi")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}


class Unhelpful(Denoiser):
    """A denoiser that returns what it was given."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(1, 1), SIGMA_DATA)

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        return noisy


def test_held_out_loss_of_a_denoiser_that_leaves_the_noise_in() -> None:
    images = torch.zeros(50, 1, 8, 8)
    loss = held_out_loss(Unhelpful(), images, log_snr_levels=(-2.0, 4.0), draws=8)
    sigma = torch.tensor([math.e, math.exp(-2.0)])
    expected = sigma**2 * (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    assert loss.per_image.shape == (2, 50)
    assert torch.allclose(loss.mean, expected, rtol=0.03)


def test_ratio_of_held_out_losses_carries_the_error_of_the_paired_difference() -> None:
    loss = held_out_loss(Unhelpful(), torch.zeros(50, 1, 8, 8), draws=1)
    twice = loss._replace(per_image=2.0 * loss.per_image)
    ratio, error = twice.ratio_to(loss)
    assert torch.allclose(ratio, torch.full_like(ratio, 2.0))
    assert torch.allclose(error, torch.zeros_like(error), atol=1e-6)


def test_digits_are_scaled_and_split_without_overlap() -> None:
    digits = load_digits()
    assert digits.train.shape == (1500, 1, 8, 8)
    assert digits.held_out.shape == (297, 1, 8, 8)
    assert digits.train.dtype == torch.float32
    assert (digits.train.min().item(), digits.train.max().item()) == (-1.0, 1.0)
    assert digits.train.std().item() == pytest.approx(SIGMA_DATA, rel=0.01)
    trained_on = {image.numpy().tobytes() for image in digits.train}
    assert not any(image.numpy().tobytes() in trained_on for image in digits.held_out)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"batch_size": -1}, "batch_size is -1, expected at least 1"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
        ({"learning_rate": math.nan}, "learning_rate is nan, expected a positive number"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0, expected a number from 0 to below 1"),
        ({"weighting": "variance"}, "weighting is 'variance', expected one of constant"),
        ({"device": "toaster"}, "device is 'toaster', expected auto, cpu, cuda"),
        ({"device": "cuda:99"}, "device is 'cuda:99', but torch sees"),
    ],
)
def test_config_names_what_does_not_fit(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **fields)


def test_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"sklearn does not import .*pip install 'vadiff\[train\]'"):
        train(TINY, progress=False)
