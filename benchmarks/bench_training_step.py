"""Benchmark of a whole training step with each provider as its loss."""

from __future__ import annotations

import functools

import pytest
import training_step
from cases import Contest
from providers import PROVIDERS
from pytest_benchmark.fixture import BenchmarkFixture
from session import ON_REQUEST, REPLAYED, Session, device_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rows = [
        pytest.param(contest, name, id=f"{contest}-{name}", marks=(ON_REQUEST,) if provider.compiled else ())
        for contest in training_step.SIZES[device_of(metafunc.config).type]
        for name, provider in PROVIDERS.items()
    ]
    metafunc.parametrize(("contest", "provider"), rows)


@REPLAYED
def test_training_step(benchmark: BenchmarkFixture, bench: Session, contest: Contest, provider: str) -> None:
    hold = functools.partial(training_step.hold, contest, device=bench.device, quick=bench.quick)
    bench.report(benchmark, contest, provider, hold)
