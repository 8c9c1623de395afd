"""A CPU kernel past the last-level cache against copies: into an existing gradient buffer, and as users call it."""

from __future__ import annotations

import functools

import past_cache
import pytest
from cases import Contest
from pytest_benchmark.fixture import BenchmarkFixture
from session import ON_REQUEST, REPLAYED, Session

_PROVIDERS = [
    pytest.param(past_cache.CONTEST, "native", id="native"),
    pytest.param(past_cache.CONTEST, "reference", id="reference", marks=ON_REQUEST),
]


@REPLAYED
@pytest.mark.parametrize(("contest", "provider"), _PROVIDERS)
def test_past_the_cache(benchmark: BenchmarkFixture, bench: Session, contest: Contest, provider: str) -> None:
    if bench.device.type != "cpu":
        pytest.skip("a row for CPUs; GPUs have the case 'huge'")
    bench.report(benchmark, contest, provider, functools.partial(past_cache.hold, quick=bench.quick))
