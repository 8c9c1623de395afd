"""Accelerate's own save and resume, trackers, accumulation and two gloo processes, with a criterion in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker, on_main_process
from ranks import join_two_ranks, leave_two_ranks, run_two_ranks
from torch import Tensor, nn

import vadiff
from vadiff.errors import DiffusionLossWarning
from vadiff.integrations.accelerate import log_statistics, prepare, unwrap

BATCH, MICRO, STEPS = (
    16,
    2,
    3,
)  # images of a step over all ranks, micro-batches of a step, steps before and after saving
FIELDS = ("count", "mean", "variance", "mass")


class Recorder(GeneralTracker):
    """A tracker that keeps what it is given."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> list[Any]:
        return self.logged

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.logged.append((step, values))


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def a_state_of_its_own() -> Iterator[None]:
    reset()
    yield
    reset()


def micro_batch(step: int, micro: int, rank: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clean images [b, 6], noise and flow times [b]: this rank's part of a micro-batch."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    samples = BATCH // MICRO
    clean, noise = torch.randn(2, samples, 6, generator=generator)
    t = torch.rand(samples, generator=generator)
    part = slice(rank * samples // ranks, (rank + 1) * samples // ranks)
    return clean[part], noise[part], t[part]


class Run:
    """A trainer as one writes them with Accelerate: prepare, accumulate, backward, step."""

    def __init__(self, weighting: str = "variance_aware", recorder: Recorder | None = None) -> None:
        trackers = [recorder] if recorder is not None else None
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO, log_with=trackers)
        if recorder is not None:
            self.accelerator.init_trackers("test")
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(7, 16), nn.SiLU(), nn.Linear(16, 6))
        criterion = vadiff.DiffusionLoss(weighting, bins=8, log_snr_range=(-8.0, 8.0), half_life=16.0)
        parameters = [*net.parameters(), *criterion.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        self.net, self.optimizer = self.accelerator.prepare(net, optimizer)
        self.criterion = prepare(self.accelerator, criterion)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            for micro in range(MICRO):
                rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
                clean, noise, t = micro_batch(step, micro, rank, ranks)
                noisy = (1 - t[:, None]) * clean + t[:, None] * noise
                with self.accelerator.accumulate(self.net):
                    output = self.net(torch.cat([noisy, t[:, None]], 1))
                    loss = self.criterion(output, noise - clean, vadiff.log_snr.from_flow_time(t))
                    self.accelerator.backward(loss)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                log_statistics(self.accelerator, self.criterion, step + 1, every=2)

    def state(self) -> dict[str, Tensor]:
        criterion = unwrap(self.criterion)
        found = {name: getattr(criterion.statistics, name) for name in FIELDS}
        net = self.accelerator.unwrap_model(self.net).state_dict()
        return {**found, "weights": criterion.weights, **{name: value.clone() for name, value in net.items()}}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    run = Run()
    run.train(0, STEPS)
    run.accelerator.save_state(str(tmp_path))
    saved = unwrap(run.criterion).statistics.count
    run.train(STEPS, 2 * STEPS)
    reset()
    resumed = Run()
    assert resumed.criterion.statistics.count.sum() == 0
    resumed.accelerator.load_state(str(tmp_path))
    assert torch.equal(resumed.criterion.statistics.count, saved)
    resumed.train(STEPS, 2 * STEPS)
    assert_same(resumed.state(), run.state())
    assert run.criterion.weights.max() > 1.2 * run.criterion.weights.min()


def test_a_learned_weighting_is_prepared_saved_and_trained(tmp_path: Path) -> None:
    run = Run("learned")
    run.train(0, STEPS)
    head = unwrap(run.criterion).weighting.weight.clone()
    assert head.abs().max() > 0
    run.accelerator.save_state(str(tmp_path))
    reset()
    resumed = Run("learned")
    resumed.accelerator.load_state(str(tmp_path))
    assert torch.equal(unwrap(resumed.criterion).weighting.weight, head)
    assert torch.equal(unwrap(resumed.criterion).statistics.count, unwrap(run.criterion).statistics.count)


def test_a_folder_without_statistics_is_loaded_with_the_switch_alone(tmp_path: Path) -> None:
    run = Run()
    run.train(0, 1)
    run.accelerator.save_state(str(tmp_path))
    saved = tmp_path / "vadiff_criterion.pt"
    saved.unlink()  # as before the criterion was added
    with pytest.raises(RuntimeError, match=r"no statistics .*without vadiff.*fresh_statistics=True"):
        run.accelerator.load_state(str(tmp_path))
    run.criterion.fresh_statistics = True
    with pytest.warns(DiffusionLossWarning, match="the statistics start afresh"):
        run.accelerator.load_state(str(tmp_path))
    assert run.criterion.statistics.count.sum() == 0
    torch.save(run.criterion.state_dict(), tmp_path / "custom_checkpoint_0.pkl")  # as an earlier vadiff saved it
    with pytest.raises(RuntimeError, match=r"earlier version of vadiff, expected vadiff_criterion.pt: rename"):
        run.accelerator.load_state(str(tmp_path))


@pytest.mark.parametrize("weighting", ["variance_aware", "learned"])
def test_hooks_and_custom_objects_of_a_script_meet_their_own_only(weighting: str, tmp_path: Path) -> None:
    """diffusers' scripts save every prepared model by `save_pretrained`, and may register objects of their own."""
    run, models, own = Run(weighting), [], nn.Linear(1, 1)
    run.accelerator.register_for_checkpointing(own)
    run.accelerator.register_save_state_pre_hook(lambda found, weights, folder: models.extend(found))
    second = prepare(run.accelerator, vadiff.DiffusionLoss("constant"))
    run.train(0, 1)
    run.accelerator.save_state(str(tmp_path))
    assert models == [run.net]
    count = run.criterion.statistics.count
    run.criterion.statistics.reset()
    run.accelerator.load_state(str(tmp_path))
    assert torch.equal(run.criterion.statistics.count, count)
    assert second.statistics.count.sum() == 0


def test_statistics_are_logged_once_in_so_many_optimiser_steps() -> None:
    recorder = Recorder()
    run = Run(recorder=recorder)
    run.train(0, 5)
    assert [step for step, _ in recorder.logged] == [2, 4]  # not at micro-batches that only accumulate
    values = recorder.logged[-1][1]
    losses = {name: value for name, value in values.items() if name.startswith("vadiff/base_loss/log_snr_")}
    assert losses
    assert all(value > 0 for value in losses.values())
    assert values["vadiff/skipped"] == 0
    with pytest.raises(ValueError, match="every is 0, expected a positive integer"):
        log_statistics(run.accelerator, run.criterion, 4, every=0)


def test_each_micro_batch_is_recorded_and_the_step_s_gradient_is_their_mean() -> None:
    run = Run("constant")
    run.train(0, 1)
    assert run.criterion.statistics.half_life == 16.0
    criterion = vadiff.DiffusionLoss("constant", bins=8, log_snr_range=(-8.0, 8.0), half_life=16.0)
    own = Run("constant")
    net, total = own.net, torch.zeros(())
    for micro in range(MICRO):
        clean, noise, t = micro_batch(0, micro, 0, 1)
        noisy = (1 - t[:, None]) * clean + t[:, None] * noise
        output = net(torch.cat([noisy, t[:, None]], 1))
        total = total + nn.functional.mse_loss(output, noise - clean) / MICRO
        criterion(output, noise - clean, vadiff.log_snr.from_flow_time(t))
    total.backward()
    own.optimizer.optimizer.step()
    torch.testing.assert_close(run.net.state_dict(), own.net.state_dict(), rtol=1e-5, atol=1e-6)
    assert torch.equal(run.criterion.statistics.count, criterion.statistics.count)


@pytest.mark.parametrize("stranger", [nn.Linear(2, 2), "constant"])
def test_what_is_no_criterion_is_refused(stranger: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a vadiff\.DiffusionLoss"):
        prepare(Accelerator(cpu=True), stranger)
    if isinstance(stranger, nn.Module):
        with pytest.raises(TypeError, match=r"criterion is a Linear, expected .* or one wrapped"):
            unwrap(stranger)


def rank_main(rank: int, folder: str) -> None:
    """What each of two processes runs; results are saved for the tests to read."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1")
    join_two_ranks(rank, folder)
    recorder = Recorder()
    run = Run(recorder=recorder)
    run.train(0, STEPS)
    run.accelerator.save_state(f"{folder}/state")
    run.accelerator.wait_for_everyone()
    run.train(STEPS, 2 * STEPS)
    reset()
    resumed = Run()
    resumed.accelerator.load_state(f"{folder}/state")
    resumed.train(STEPS, 2 * STEPS)
    reset()
    learned = Run("learned")
    learned.train(0, STEPS)
    found = {
        "run": run.state(),
        "resumed": resumed.state(),
        "head": unwrap(learned.criterion).weighting.weight.detach(),
        "logged": [step for step, _ in recorder.logged],
    }
    torch.save(found, f"{folder}/{rank}.pt")
    leave_two_ranks()


def test_two_processes_train_as_one_and_resume_to_the_bit(tmp_path: Path) -> None:
    run_two_ranks(rank_main, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert_same(first["run"], second["run"])
    assert_same(first["resumed"], first["run"])
    assert_same(second["resumed"], second["run"])
    assert torch.equal(first["head"], second["head"])
    assert (first["logged"], second["logged"]) == ([2, 4, 6], [])  # the main process logs
    alone = Run()
    alone.train(0, 2 * STEPS)
    torch.testing.assert_close(first["run"], alone.state(), rtol=2e-4, atol=2e-5, equal_nan=True)  # sums in two halves
    learned = Run("learned")
    learned.train(0, STEPS)
    torch.testing.assert_close(first["head"], unwrap(learned.criterion).weighting.weight.detach(), rtol=1e-3, atol=1e-5)
