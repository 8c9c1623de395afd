"""Stopping and going on: bit for bit, on one process and on two; the same batch on one rank and on two."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import join_two_ranks, leave_two_ranks, run_two_ranks
from torch import Tensor

from vadiff.ema import reconstruct
from vadiff.errors import CheckpointError, RunError, TrainingError
from vadiff.optimal_loss import OptimalLoss
from vadiff.trainer.training import run_folder
from vadiff.trainer.training.checkpoint import load_checkpoint, save_checkpoint
from vadiff.training import Objective, Stopped, TrainConfig, edm_objective, open_run, train

CONFIG = TrainConfig(
    steps=6, batch_size=64, channels=(8, 16), log_every=2, checkpoint_every=2, held_out_images=20, held_out_levels=3,
    tensorboard=False, device="cpu", backend="reference", deterministic=True,
)  # fmt: skip
EVERYTHING = dataclasses.replace(
    CONFIG, batch_size=16, accumulate=2, flips=True, class_conditional=True, dropout=0.2, clip=1.0,
    levels="second_moment", levels_every=1, stratified=True, precision="bf16", log_every=4, checkpoint_every=100,
)  # fmt: skip
# Levels that move within these few steps.
INFORMATION = dataclasses.replace(
    CONFIG, levels="information", levels_every=1, bins=16, uniform_share=0.1, shift="sd3", stratified_epoch=True,
    levels_options={"gate": 0.0, "prior": 0.1, "half_life": 0.1},
)  # fmt: skip

GAP = dataclasses.replace(CONFIG, weighting="gap", levels="gap", batch_size=8, levels_every=1)
LEARNED = dataclasses.replace(CONFIG, weighting="learned", learning_rate=8e-3, batch_size=8)

AVERAGES = dataclasses.replace(CONFIG, model="edm2", weighting="learned", sigma_rel=(0.05, 0.1), snapshot_every=2)

TIMED = ("images_per_second", "seconds", "memory_bytes")


def stopping_at(call: int, number: signal.Signals = signal.SIGTERM) -> Objective:
    """EDM's objective; at its n-th call the process gets a signal."""
    calls = 0

    def objective(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return edm_objective(*arguments)

    return objective


def assert_same(one: Any, other: Any) -> None:
    """Equal to the bit, whatever it is made of."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, Tensor):
        assert isinstance(other, Tensor)
        assert one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()
    else:
        assert one == other


def outcome(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The last checkpoint and the metrics of a run, without what depends on time."""
    state = {name: value for name, value in load_checkpoint(run).items() if name not in TIMED}
    if "power_averages" in state:
        del state["power_averages"]["run"]  # another one in each training run
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return state, [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


@pytest.mark.parametrize("config", [CONFIG, EVERYTHING, INFORMATION], ids=["plain", "everything", "information"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_is_as_never_stopped(tmp_path: Path, config: TrainConfig, number: signal.Signals) -> None:
    train(config, out=tmp_path / "whole", progress=False)
    handler = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"stopped by {number.name} after step 3; go on with --resume") as stopped:
        train(config, stopping_at(2 * config.accumulate + 1, number), out=tmp_path / "parted", progress=False)
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is handler
    assert open_run(tmp_path / "parted").checkpoints()[-1] == 3
    train(config, out=tmp_path / "parted", resume=True, progress=False)
    for one, other in zip(outcome(tmp_path / "whole"), outcome(tmp_path / "parted"), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("lost", [(4, 6), (2, 4, 6)], ids=["after a checkpoint", "before the first one"])
def test_killed_and_resumed_is_as_never_killed(tmp_path: Path, lost: tuple[int, ...]) -> None:
    train(CONFIG, out=tmp_path / "whole", progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for step in lost:
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / f"step-{step}")
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "los')  # a line that was being written
    train(CONFIG, out=tmp_path / "killed", resume=True, progress=False)
    for one, other in zip(outcome(tmp_path / "whole"), outcome(tmp_path / "killed"), strict=True):
        assert_same(one, other)


def test_resume_starts_a_missing_run_and_keeps_a_finished_one(tmp_path: Path) -> None:
    first = train(CONFIG, out=tmp_path, resume=True, progress=False)
    before = outcome(tmp_path)
    again = train(CONFIG, out=tmp_path, resume=True, progress=False)
    assert_same(list(before), list(outcome(tmp_path)))
    assert torch.equal(first.held_out.per_image, again.held_out.per_image)


def test_longer_run_goes_on_and_another_config_does_not(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, schedule="constant")
    train(dataclasses.replace(config, steps=4), out=tmp_path / "parted", progress=False)
    train(config, out=tmp_path / "parted", resume=True, progress=False)
    train(config, out=tmp_path / "whole", progress=False)
    assert_same(outcome(tmp_path / "whole")[0], outcome(tmp_path / "parted")[0])
    with pytest.raises(RunError, match=r"another config: ema_decay was 0\.99, is 0\.9\. Leave out --preset"):
        train(dataclasses.replace(config, ema_decay=0.9), out=tmp_path / "parted", resume=True, progress=False)


def test_number_of_steps_that_sets_the_schedule_stays(tmp_path: Path) -> None:
    train(dataclasses.replace(CONFIG, steps=2), out=tmp_path, progress=False)
    with pytest.raises(RunError, match="steps was 2, is 6, which changes the linear schedule"):
        train(CONFIG, out=tmp_path, resume=True, progress=False)


def test_remedies_against_non_finite_steps_can_be_changed_on_resume(tmp_path: Path) -> None:
    train(CONFIG, out=tmp_path, progress=False)
    shutil.rmtree(tmp_path / "checkpoints" / "step-6")
    changed = dataclasses.replace(CONFIG, learning_rate=1e-4, clip=0.5, precision="bf16")
    assert train(changed, out=tmp_path, resume=True, progress=False).metrics[-1]["learning_rate"] < 1e-4
    assert open_run(tmp_path).config == changed.resolved()


def nothing_finite_after(calls: int) -> Objective:
    """EDM's objective, NaN from its n-th call on."""
    seen = 0

    def objective(*arguments: Any) -> Tensor:
        nonlocal seen
        seen += 1
        return edm_objective(*arguments) * (math.nan if seen > calls else 1.0)

    return objective


def test_row_of_non_finite_steps_ends_the_run_between_lines_and_is_not_saved(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=12, log_every=30, checkpoint_every=1, max_skipped_steps=5)
    with pytest.raises(TrainingError, match=r"7 steps in a row .* up to step 10. .* Go on with --resume"):
        train(config, nothing_finite_after(3), out=tmp_path, progress=False)
    assert open_run(tmp_path).checkpoints() == [1, 2, 3]
    with pytest.raises(TrainingError, match=r"5 steps in a row .* up to step 5"):  # the row of before does not count
        train(config, nothing_finite_after(-1), out=tmp_path / "new", progress=False)
    state = load_checkpoint(tmp_path, 3)
    state["totals"][6] = 5.0
    save_checkpoint(tmp_path, 3, state, 3)
    gentle = dataclasses.replace(config, learning_rate=1e-3)
    assert train(gentle, out=tmp_path, resume=True, progress=False).metrics[-1]["step"] == 12


def test_checkpoint_that_is_due_in_a_row_of_non_finite_steps_is_written_after_it(tmp_path: Path) -> None:
    calls = 0

    def objective(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return edm_objective(*arguments) * (math.nan if calls in (3, 4) else 1.0)

    train(dataclasses.replace(CONFIG, checkpoint_every=4), objective, out=tmp_path, progress=False)
    assert open_run(tmp_path).checkpoints() == [5, 6]


def test_stopped_where_a_checkpoint_was_due_it_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []

    def save(run: Path, step: int, *rest: Any) -> None:
        saved.append(step)
        save_checkpoint(run, step, *rest)

    monkeypatch.setattr("vadiff.trainer.training.loop.save_checkpoint", save)
    with pytest.raises(Stopped):
        train(CONFIG, stopping_at(4), out=tmp_path, progress=False)
    assert saved == [2, 4]


def test_files_from_after_the_resumed_step_are_removed(tmp_path: Path) -> None:
    train(CONFIG, out=tmp_path, progress=False)
    shutil.rmtree(tmp_path / "checkpoints" / "step-6")
    (tmp_path / "samples").mkdir()
    for step in (4, 6):
        for folder in ("evaluation", "evaluation/ema-0.1", "ema"):
            (tmp_path / folder / f"step-{step}").mkdir(parents=True)
        (tmp_path / "samples" / f"step-{step}.png").touch()
    train(CONFIG, out=tmp_path, resume=True, progress=False)
    for folder in ("evaluation", "evaluation/ema-0.1", "ema"):
        assert [entry.name for entry in (tmp_path / folder).glob("step-*")] == ["step-4"]
    assert [entry.name for entry in (tmp_path / "samples").iterdir()] == ["step-4.png"]


def test_overwritten_run_leaves_nothing_behind(tmp_path: Path) -> None:
    train(CONFIG, out=tmp_path, progress=False)
    for folder in ("evaluation/step-6", "generated", "report"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("report.html", "notes.txt"):
        (tmp_path / file).touch()
    train(CONFIG, out=tmp_path, overwrite=True, progress=False)
    left = {entry.name for entry in tmp_path.iterdir()} - {"config.yaml", "data.json", "metrics.jsonl", "checkpoints"}
    assert left == {"notes.txt", ".lock"}


def test_resume_with_another_number_of_images_is_refused(tmp_path: Path) -> None:
    train(CONFIG, out=tmp_path, progress=False)
    facts = json.loads((tmp_path / "data.json").read_text())
    assert facts["held_out_is_test"] is False
    (tmp_path / "data.json").write_text(json.dumps(facts | {"train": facts["train"] + 1}))
    with pytest.raises(RunError, match=r"began with 1,[0-9]+ training and [0-9]+ held-out images, the data set now"):
        train(CONFIG, out=tmp_path, resume=True, progress=False)


def test_only_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    with run_folder.lock(tmp_path):
        assert run_folder.is_in_use(tmp_path)
        with pytest.raises(RunError, match="is in use: another process trains there"):
            train(CONFIG, out=tmp_path, progress=False)
    assert not run_folder.is_in_use(tmp_path)
    train(CONFIG, out=tmp_path, progress=False)


def test_corrupt_checkpoint_stops_the_resume_and_offers_the_last_good_one(tmp_path: Path) -> None:
    train(CONFIG, out=tmp_path, progress=False)
    (tmp_path / "checkpoints" / "step-6" / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-6 is corrupt.*last good one is step 4"):
        train(CONFIG, out=tmp_path, resume=True, progress=False)
    with pytest.raises(CheckpointError, match=r"step-6 is corrupt.*last good one is step 4"):
        open_run(tmp_path).denoiser()
    assert open_run(tmp_path).denoiser(step=4).image_shape == (1, 8, 8)


def test_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    def twice(*arguments: Any) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return edm_objective(*arguments)

    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, twice, out=tmp_path, progress=False)


def test_training_works_outside_of_the_main_thread() -> None:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(train(CONFIG, progress=False)))
    thread.start()
    thread.join(60)
    assert len(results) == 1


def rank_main(rank: int, folder: str) -> None:
    """What each of two processes runs."""
    join_two_ranks(rank, folder)
    out = Path(folder)
    train(CONFIG, out=out / "two ranks", progress=False)
    train(LEARNED, out=out / "learned", progress=False)
    own = out / f"disk of machine {rank}"  # only that of rank 0 is written
    train(CONFIG, out=own, progress=False)
    with pytest.raises(RunError, match=r"rank 0 has checkpoint: step 6, .* rank 1 has checkpoint: none; .* shared"):
        train(CONFIG, out=own, resume=True, progress=False)
    twin = dataclasses.replace(CONFIG, weighting="table", table=str(out / f"source {rank}"))
    source = out / f"source {rank}"
    source.mkdir(exist_ok=True)
    CONFIG.save(source / "config.yaml")
    (source / "metrics.jsonl").write_text(json.dumps({"step": 6, "weights": [1.0 + rank] * 4}) + "\n")
    with pytest.raises(RunError, match=r"the ranks do not start from the same state: .* weight table"):
        train(twin, out=out / "twin", progress=False)
    assert not (out / "twin").exists()
    curve = out / "curve of the first.csv"
    scheduled = dataclasses.replace(GAP, optimal_loss=str(curve) if rank == 0 else "nowhere.csv")
    if rank == 0:
        sigma, loss = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64), torch.tensor([1e-9, 7.0, 20.0])
        ones = torch.ones(3, dtype=torch.int64)
        OptimalLoss(sigma, loss.double(), 0.0 * loss, ones, 64, 20.0, samples=1500).save(curve)
    train(scheduled, out=out / "gap", progress=False)
    torch.distributed.barrier()
    if rank == 0:
        curve.write_text("nothing")
    with pytest.raises(RunError, match="is not an optimal-loss curve"):  # on both: none waits for the other
        train(scheduled, out=out / "no gap", progress=False)
    everything = dataclasses.replace(EVERYTHING, precision="fp32")
    for config, name in (
        (CONFIG, "plain"), (everything, "everything"), (AVERAGES, "averages"), (INFORMATION, "information"),
    ):  # fmt: skip
        train(config, out=out / name / "whole", progress=False)
        objective: Callable[..., Tensor] = edm_objective
        if rank == 1:  # the signal reaches one rank only: both stop after the same step
            objective = stopping_at(2 * config.accumulate + 1)
        with pytest.raises(Stopped) as stopped:
            train(config, objective, out=out / name / "parted", progress=False)
        assert stopped.value.exit_code == 143
        train(config, out=out / name / "parted", resume=True, progress=False)
    for non_finite in (False, True):
        config = dataclasses.replace(CONFIG, steps=3, ema_decay=0.0, log_every=1)
        trained = train(config, infinite_loss_of_steps_2_and_3(non_finite and rank == 1), progress=False)
        found = {"denoiser": trained.denoiser.state_dict(), "metrics": trained.metrics}
        torch.save(found, out / f"non_finite {non_finite}, rank {rank}.pt")
    leave_two_ranks()


def infinite_loss_of_steps_2_and_3(non_finite: bool) -> Objective:
    """Huber's loss; where `non_finite`, of an infinite output after the first step: its gradient is finite."""
    calls = 0

    def objective(criterion: Any, output: Tensor, x0: Tensor, *rest: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if non_finite and calls > 1:
            output = output.clone()
            output[0, 0, 0, 0] = math.inf
        return torch.nn.functional.huber_loss(output.float(), x0)

    return objective


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_two_ranks(rank_main, str(folder))
    return folder


@pytest.mark.parametrize("name", ["plain", "everything", "averages", "information"])
def test_two_ranks_resumed_are_as_never_stopped(two_ranks: Path, name: str) -> None:
    whole, parted = outcome(two_ranks / name / "whole"), outcome(two_ranks / name / "parted")
    assert_same(list(whole), list(parted))


def test_two_ranks_resumed_leave_the_snapshots_of_one_run_that_was_never_stopped(two_ranks: Path) -> None:
    whole, parted = (
        [torch.load(two_ranks / "averages" / run / "snapshots" / f"{step}.pt") for step in (2, 4, 6)]
        for run in ("whole", "parted")
    )
    for one, other in zip(whole, parted, strict=True):
        assert_same({**one, "run": ""}, {**other, "run": ""})
    assert len({snapshot["run"] for snapshot in parted}) == 1
    mixed = [reconstruct(two_ranks / "averages" / run / "snapshots", [0.15])[0.15] for run in ("whole", "parted")]
    assert_same(*mixed)


def test_ranks_are_trained_with_the_optimal_loss_that_the_first_one_has(two_ranks: Path) -> None:
    assert open_run(two_ranks / "gap").metrics()[-1]["step"] == GAP.steps
    assert OptimalLoss.load(two_ranks / "gap" / "optimal_loss.csv").loss.tolist()[1:] == [7.0, 20.0]
    assert not (two_ranks / "no gap").exists()


def test_one_rank_of_64_trains_as_two_of_32(two_ranks: Path, tmp_path: Path) -> None:
    """The same numbers, rounded at other places: losses within 1e-5 over these few steps, counts exact."""
    train(CONFIG, out=tmp_path, progress=False)
    lines, others = open_run(tmp_path).metrics(), open_run(two_ranks / "two ranks").metrics()
    for line, other in zip(lines, others, strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)
        assert other["statistics"]["count"] == line["statistics"]["count"]
        assert other["weights"] == pytest.approx(line["weights"], rel=1e-4)
        for name in ("mean", "variance"):
            pairs = zip(line["statistics"][name], other["statistics"][name], strict=True)
            assert all(a == b or b == pytest.approx(a, rel=1e-3) for a, b in pairs)


def test_levels_by_information_move_alike_on_one_rank_and_two(two_ranks: Path, tmp_path: Path) -> None:
    train(INFORMATION, out=tmp_path, progress=False)
    one, two = open_run(tmp_path).metrics(), open_run(two_ranks / "information" / "whole").metrics()
    assert one[-1]["levels"]["moved"] > 0.02
    for line, other in zip(one, two, strict=True):
        assert other["levels"]["moved"] == pytest.approx(line["levels"]["moved"], rel=1e-3)
        assert other["statistics"]["count"] == line["statistics"]["count"]


def test_learned_weighting_is_trained_alike_on_one_rank_and_two(two_ranks: Path, tmp_path: Path) -> None:
    one, two = train(LEARNED, out=tmp_path, progress=False).metrics, open_run(two_ranks / "learned").metrics()
    learned, as_learned = (torch.tensor(lines[-1]["weights"]).log() for lines in (one, two))
    assert learned.abs().max() > 0.005
    assert (learned - as_learned).abs().max() < 0.02 * learned.abs().max()


def test_step_with_an_infinite_loss_on_one_rank_is_skipped_on_both(two_ranks: Path, tmp_path: Path) -> None:
    found = {
        (non_finite, rank): torch.load(two_ranks / f"non_finite {non_finite}, rank {rank}.pt")
        for non_finite in (False, True)
        for rank in (0, 1)
    }
    assert [line["skipped_steps"] for line in found[False, 0]["metrics"]] == [0, 0, 0]
    assert [line["skipped_steps"] for line in found[True, 0]["metrics"]] == [0, 1, 2]
    assert_same(found[True, 0]["denoiser"], found[True, 1]["denoiser"])
    # That is, what they were after the first step: a run of one step on one rank ends with the same, to rounding.
    first = dataclasses.replace(CONFIG, steps=1, ema_decay=0.0)
    alone = train(first, infinite_loss_of_steps_2_and_3(False), progress=False).denoiser.state_dict()
    for name, value in alone.items():
        torch.testing.assert_close(found[True, 0]["denoiser"][name], value, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(value, found[False, 0]["denoiser"][name]) for name, value in alone.items())


def test_what_is_not_known_to_be_a_run_is_never_removed(tmp_path: Path) -> None:
    mine = tmp_path / "samples" / "mine.png"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(RunError, match=r"holds samples and no config\.yaml"):
        train(CONFIG, out=tmp_path, overwrite=True, progress=False)
    (tmp_path / "config.yaml").write_text("name: another program's\n")
    with pytest.raises(RunError, match=r"is not replaced, as its config\.yaml is of no run.*name: no such field"):
        train(CONFIG, out=tmp_path, overwrite=True, progress=False)
    assert mine.read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "samples"]


def test_a_run_with_a_linked_folder_or_whose_weights_are_transferred_is_not_replaced(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    train(CONFIG, out=run, progress=False)
    with pytest.raises(RunError, match="which --overwrite would remove"):
        train(dataclasses.replace(CONFIG, transfer=str(run)), out=run, overwrite=True, progress=False)
    (run / "checkpoints").rename(elsewhere)
    (run / "checkpoints").symlink_to(elsewhere)
    with pytest.raises(RunError, match=r"checkpoints in it is a link to .*elsewhere"):
        train(CONFIG, out=run, overwrite=True, progress=False)
    assert open_run(run).checkpoints() == [2, 4, 6]


def test_a_disk_that_is_full_at_the_beginning_leaves_a_folder_to_begin_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "no space", "config.yaml")

    with monkeypatch.context() as patch:
        patch.setattr(type(CONFIG), "save", full)
        with pytest.raises(OSError, match="no space"):
            train(CONFIG, out=tmp_path, progress=False)
    train(CONFIG, out=tmp_path, progress=False)
