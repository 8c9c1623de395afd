"""Benchmark of every provider's loss on every shape, dtype and mode. cases.py lists what runs without --all.

make bench
pytest benchmarks -n 0 --all -k "video-bf16"
"""

from __future__ import annotations

import functools

import contest as contests
import pytest
from cases import Contest, runs_by_default
from cases import contests as all_contests
from providers import PROVIDERS
from pytest_benchmark.fixture import BenchmarkFixture
from session import ON_REQUEST, REPLAYED, Session, device_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = device_of(metafunc.config).type
    rows = []
    for contest in all_contests(device):
        for name, provider in PROVIDERS.items():
            if name == "hand_written_reduce_overhead" and contest.mode == "graph":
                continue  # captures CUDA graphs itself
            marks = () if runs_by_default(contest, provider.compiled, device) else (ON_REQUEST,)
            rows.append(pytest.param(contest, name, id=f"{contest}-{name}", marks=marks))
    metafunc.parametrize(("contest", "provider"), rows)


@REPLAYED
def test_loss(benchmark: BenchmarkFixture, bench: Session, contest: Contest, provider: str) -> None:
    hold = functools.partial(contests.hold, contest, device=bench.device, copy=bench.copy_bandwidth, quick=bench.quick)
    bench.report(benchmark, contest, provider, hold)
