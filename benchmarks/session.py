"""How the benchmarks run under pytest: options, the contests of a run, its table and its result file.

pytest-benchmark times one function per test, one test after the other. On a machine whose speed drifts, ratios between
providers are then worthless. Here each provider is a test, as pytest-benchmark requires (its JSON, `--benchmark-json`,
comparison and history work), but the first test of a contest measures all its providers in turns, and each test then
passes its share of the times to pytest-benchmark through a clock that replays them. Results that it cannot
store (ratios of paired rounds, device time, refusals) go to the result file and the table here. Providers deselected
with -k are not measured.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import figures
import pytest
import result_table
import torch
from cases import Contest
from copy_bandwidth import Yardstick
from measurements import Measurement, NotMeasured, Results
from providers import describe_error
from pytest_benchmark.fixture import BenchmarkFixture

Outcomes = list[Measurement | NotMeasured]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vadiff benchmarks")
    group.addoption("--all", action="store_true", help="every case, dtype, mode and provider (an hour or two on a CPU)")
    group.addoption(
        "--quick", action="store_true", help="only check that everything runs: too few rounds for reliable figures"
    )
    group.addoption("--results", type=Path, metavar="FOLDER", help="write <device>-<date>.json there")
    group.addoption("--device", choices=("cpu", "cuda"), help="where to measure (default: cuda if torch sees a GPU)")


def device_of(config: pytest.Config) -> torch.device:
    """The device under measurement."""
    name = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch.cuda.is_available() is False. See `vadiff doctor`")
    return torch.device(name)


class Session:
    """One run: its results, and for each contest the outcome of each provider."""

    def __init__(self, config: pytest.Config) -> None:
        self.device = device_of(config)
        self.quick = bool(config.getoption("--quick"))
        self.all = bool(config.getoption("--all"))
        self.folder: Path | None = config.getoption("--results")
        asked = [config.getoption("-k"), *(arg for arg in config.args if "::" in arg)]
        asked = [part for part in asked if part]
        self.selection = "; ".join([*(["all"] if self.all else ["default"]), *asked])
        self.entered: dict[Contest, list[str]] = {}  # contest → providers selected for it
        self._outcomes: dict[Contest, Outcomes] = {}
        self._results: Results | None = None

    @functools.cached_property
    def _yardstick(self) -> Yardstick:
        return Yardstick(self.device, self.quick)

    @property
    def results(self) -> Results:
        """The results, created at the first measurement."""
        if self._results is None:
            copy = self._yardstick.measure()
            self._results = Results.begin(self.device, self.selection, self.quick, copy)
        return self._results

    def copy_bandwidth(self) -> float:
        """Current copy bandwidth in bytes per second; the results keep the best of the run."""
        copy = self._yardstick.measure()
        if copy.best > self.results.copy.best:
            self.results.copy = copy
        return copy.best

    @property
    def has_results(self) -> bool:
        return self._results is not None

    def outcomes(self, contest: Contest, provider: str, hold: Callable[[Iterable[str]], Outcomes]) -> Outcomes:
        """The outcome of one provider from `hold`, which is called once per contest with all providers selected for it.

        A provider with more than one call has several outcomes, named "<provider>, <call>"."""
        if contest not in self._outcomes:
            try:
                found = hold(self.entered[contest])
            except Exception as error:  # e.g. buffers too large: the other contests go on
                reason = describe_error(error)
                found = [NotMeasured(*contest, name, "failed", reason) for name in self.entered[contest]]
            self._outcomes[contest] = found
            for outcome in found:
                self.results.add(outcome)
            self.write(finished=False)
        return [outcome for outcome in self._outcomes[contest] if outcome.provider.split(",")[0] == provider]

    def write(self, *, finished: bool) -> Path | None:
        """Write the result file, if requested. Called after each contest, as a long run may be killed."""
        if self.folder is None:
            return None
        self.results.selection = self.selection if finished else f"{self.selection}; interrupted"
        return self.results.write(self.folder)

    def report(
        self, benchmark: BenchmarkFixture, contest: Contest, provider: str, hold: Callable[[Iterable[str]], Outcomes]
    ) -> None:
        """Pass a provider's times to pytest-benchmark; fail if its results are wrong, skip if it cannot run here."""
        found = self.outcomes(contest, provider, hold)
        benchmark.group = str(contest)
        for outcome in found:
            if isinstance(outcome, NotMeasured) and outcome.kind != "not usable":
                pytest.fail(f"{outcome.provider}, {outcome.kind}: {outcome.reason}", pytrace=False)
        measured = [outcome for outcome in found if isinstance(outcome, Measurement)]
        if not measured:
            pytest.skip("; ".join(f"{o.provider}: {o.reason}" for o in found if isinstance(o, NotMeasured)))
        benchmark.extra_info |= {"device": self.results.machine["device"], "call": measured[0].provider}
        CLOCK.into(benchmark, measured[0].wall_times)


ON_REQUEST = pytest.mark.on_request
_SESSION = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{ON_REQUEST.name}: runs with --all only")
    # Compiler warnings are not failures here, unlike in tests/.
    config.addinivalue_line("filterwarnings", "default")
    config.stash[_SESSION] = Session(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --all, deselect what does not run by default; put the contests of the design's figures first."""
    if not config.stash[_SESSION].all:
        left_out = [item for item in items if item.get_closest_marker(ON_REQUEST.name)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker(ON_REQUEST.name)]
    first = figures.CONTESTS[config.stash[_SESSION].device.type]
    rank = {contest: index for index, contest in enumerate(first)}
    items.sort(key=lambda item: rank.get(_parameters(item).get("contest"), len(first)))


def pytest_collection_finish(session: pytest.Session) -> None:
    entered = session.config.stash[_SESSION].entered
    for item in session.items:
        parameters = _parameters(item)
        if "contest" in parameters:
            entered.setdefault(parameters["contest"], []).append(parameters["provider"])


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


@pytest.fixture(scope="session")
def bench(pytestconfig: pytest.Config) -> Session:
    return pytestconfig.stash[_SESSION]


class Replay:
    """A clock for pytest-benchmark that replays recorded times: each `advance` moves it by the next one."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps: list[float] = []

    def time(self) -> float:
        return self.now

    def advance(self) -> None:
        self.now += self.steps.pop(0)

    def into(self, benchmark: BenchmarkFixture, seconds: list[float]) -> None:
        """Replay recorded times in a benchmark whose timer is this clock's `time`."""
        self.steps = list(seconds)
        benchmark.pedantic(self.advance, rounds=len(seconds))


CLOCK = Replay()
REPLAYED = pytest.mark.benchmark(timer=CLOCK.time)  # for every test that calls `Session.report`


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: pytest.ExitCode, config: pytest.Config
) -> None:
    session = config.stash[_SESSION]
    if not session.has_results:
        return
    path = session.write(finished=exitstatus != pytest.ExitCode.INTERRUPTED)  # first: the tables may take too long
    terminalreporter.section("vadiff benchmarks")
    terminalreporter.write_line(result_table.text_of(session.results))
    if path is not None:
        terminalreporter.write_line(f"written to {os.path.relpath(path)}")
