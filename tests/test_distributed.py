"""Two gloo processes keep the same statistics as one process that sees both their batches.

Each rank reduces its own samples and the ranks' (n, mean, M2, mass) are merged by Chan's formula, where a
single process takes one mean over all: the same real numbers, rounded at other places. A merge rounds each of
them fewer than four times, M2 only by adding what is not negative: four folds stay within ULPS = 8 units.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import numpy as np
import pytest
import torch
import triton_interpreter
from conftest import BACKENDS, usable
from filelock import FileLock
from ranks import join_two_ranks, leave_two_ranks, run_two_ranks

STEPS, BATCH, ULPS = 4, 64, 8
FIELDS = ("count", "mean", "variance", "mass")
SPLITS = {"even": 32, "uneven": 40, "poisoned rank": 32, "idle rank": 32, "not synchronised": 32}

State = dict[str, torch.Tensor]


def criterion_for(backend: str, sync: bool = True) -> torch.nn.Module:
    import vadiff

    rule = vadiff.weighting.VarianceAware(prior=2.0)
    return vadiff.DiffusionLoss(rule, bins=16, log_snr_range=(-8.0, 8.0), half_life=8.0, backend=backend, sync=sync)


def samples(step: int, scenario: str) -> dict[str, torch.Tensor]:
    """The global batch of one step."""
    generator = torch.Generator().manual_seed(step)
    log_snr = 4 * torch.randn(BATCH, generator=generator)
    values = {
        "prediction": torch.exp(-0.2 * log_snr)[:, None] * torch.randn(BATCH, 12, generator=generator),
        "target": torch.zeros(BATCH, 12),
        "log_snr": log_snr,
        "base_weight": 0.5 + torch.rand(BATCH, generator=generator),
        "sample_weight": 0.5 + torch.rand(BATCH, generator=generator),
    }
    if scenario == "poisoned rank":
        values["log_snr"][32:] = torch.nan
    if scenario == "idle rank":
        values["sample_weight"][32:] = 0.0
    return values


def train(criterion: torch.nn.Module, scenario: str, part: slice) -> tuple[State, torch.Tensor]:
    """All steps of a scenario on a share of each batch; all but the third go through reweight."""
    losses = []
    for step in range(STEPS):
        batch = {name: value[part] for name, value in samples(step, scenario).items()}
        if step != 2:
            given = batch["prediction"].square().mean(1)
            loss = criterion.reweight(given, batch["log_snr"], batch["sample_weight"]).mean()
        else:
            prediction = batch.pop("prediction").requires_grad_()
            loss = criterion(prediction, batch.pop("target"), batch.pop("log_snr"), **batch)
            loss.backward()
        losses.append(loss.detach())
    s = criterion.statistics
    state = {name: getattr(s, name) for name in (*FIELDS, "skipped")} | {"weights": criterion.weights}
    return state, torch.stack(losses)


def rank_main(rank: int, folder: str, backends: list[str]) -> None:
    """What each process runs; results are saved for the tests to read."""
    os.environ["TRITON_INTERPRET"] = "1"  # gloo moves CPU tensors, also where a GPU is
    if "triton" in backends:
        triton_interpreter.read_arrays_of_one_element()
        triton_interpreter.remember()
    join_two_ranks(rank, folder)
    results = {}
    for backend in backends:
        for scenario, split in SPLITS.items():
            criterion = criterion_for(backend, sync=scenario != "not synchronised")
            part = slice(0, split) if rank == 0 else slice(split, BATCH)
            results[backend, scenario] = train(criterion, scenario, part)
            if rank == 0:  # evaluation records nothing, so one rank may do it alone
                batch = samples(0, "even")
                criterion.eval().reweight(batch["log_snr"].exp(), batch["log_snr"])
    torch.save(results, f"{folder}/{rank}.pt")
    leave_two_ranks()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What both processes saved, for every backend: {(backend, scenario): (state, losses)}."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the first worker to come runs the processes, the others read
    with FileLock(folder / "gloo.lock"):
        if not (folder / "1.pt").exists():
            backends = [name for name in BACKENDS if name != "triton" or importlib.util.find_spec("triton")]
            run_two_ranks(rank_main, str(folder), backends)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(params=BACKENDS)
def cpu_backend(request: pytest.FixtureRequest) -> str:
    return usable(request.param)


@functools.cache
def single(backend: str, scenario: str, first: int = 0, last: int = BATCH) -> tuple[State, torch.Tensor]:
    if backend == "triton" and torch.cuda.is_available():
        backend = "reference"  # the interpreter is not at hand in this process
    return train(criterion_for(backend), scenario, slice(first, last))


def assert_close(got: State, expected: State) -> None:
    for name in FIELDS:
        x, y = got[name].numpy(), expected[name].numpy()
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y), err_msg=name)
        allowed = ULPS * np.spacing(np.abs(y))
        assert (np.abs(x - y) <= allowed)[~np.isnan(y)].all(), name
    torch.testing.assert_close(got["weights"], expected["weights"], rtol=2**-20, atol=0)
    assert got["weights"].max() > 1.2 * got["weights"].min()


@pytest.mark.parametrize("scenario", ["even", "uneven", "poisoned rank", "idle rank"])
def test_two_ranks_keep_the_statistics_of_one_process(ranks, cpu_backend, scenario):
    expected, _ = single(cpu_backend, scenario)
    for rank in ranks:
        assert_close(rank[cpu_backend, scenario][0], expected)


@pytest.mark.parametrize("scenario", ["even", "uneven", "poisoned rank", "idle rank"])
def test_all_ranks_hold_the_same_bits(ranks, cpu_backend, scenario):
    first, second = (rank[cpu_backend, scenario][0] for rank in ranks)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("scenario", "split"), [("even", 32), ("uneven", 40)])
def test_each_rank_averages_its_own_samples(ranks, cpu_backend, scenario, split):
    """The mean over all samples is what one process would report."""
    _, expected = single(cpu_backend, scenario)
    first, second = (rank[cpu_backend, scenario][1] for rank in ranks)
    torch.testing.assert_close((split * first + (BATCH - split) * second) / BATCH, expected, rtol=2e-6, atol=0)


def test_skipped_samples_are_summed_over_ranks(ranks, cpu_backend):
    for rank in ranks:
        assert int(rank[cpu_backend, "poisoned rank"][0]["skipped"]) == 32 * STEPS
    healthy, poisoned = (rank[cpu_backend, "poisoned rank"][1] for rank in ranks)
    assert healthy.isfinite().all()  # a rank's own loss shows its own poison only
    assert poisoned.isnan().all()


def test_without_sync_each_rank_keeps_its_own(ranks, cpu_backend):
    for rank, part in zip(ranks, ((0, 32), (32, 64)), strict=True):
        expected, _ = single(cpu_backend, "even", *part)
        assert_close(rank[cpu_backend, "not synchronised"][0], expected)
