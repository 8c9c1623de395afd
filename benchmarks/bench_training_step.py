"""A whole training step with each provider as the loss: what changing the line costs in the end."""

from __future__ import annotations

import functools

import pytest
import training_step
from cases import Contest
from providers import PROVIDERS
from pytest_benchmark.fixture import BenchmarkFixture
from session import ON_REQUEST, REPLAYED, Session

_PROVIDERS = [
    pytest.param(training_step.CONTEST, name, id=name, marks=(ON_REQUEST,) if provider.compiled else ())
    for name, provider in PROVIDERS.items()
]


@REPLAYED
@pytest.mark.parametrize(("contest", "provider"), _PROVIDERS)
def test_training_step(benchmark: BenchmarkFixture, bench: Session, contest: Contest, provider: str) -> None:
    hold = functools.partial(training_step.hold, device=bench.device, quick=bench.quick)
    bench.report(benchmark, contest, provider, hold)
