"""What the benchmarks count, and what they refuse to time."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cases
import contest
import copy_bandwidth
import measure
import past_cache
import pytest
import sanitize
import torch
import training_step
from cases import Contest
from measure import Effort, Ratio, Spread
from measurements import Measurement, NotMeasured
from providers import PROVIDERS, Batch, Provider, obstacle
from torch import Tensor

import vadiff

CPU = torch.device("cpu")
SMALL = Contest("tiny", "fp32", "fused")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


# bytes and selection


@pytest.mark.parametrize(
    ("dtype", "mode", "moves"),
    [
        ("fp32", "forward", 2),
        ("fp32", "fused", 3),
        ("bf16", "graph", 3),
        ("fp32", "noise", 4),
        ("fp32", "deferred", 5),
        ("fp16", "deferred", 5),
        ("fp16", "noise", 7),  # float16 has no fused gradient
        ("fp16", "forward", 2),
    ],
)
def test_moves_are_what_the_mode_has_to_read_and_write(dtype: str, mode: str, moves: int) -> None:
    assert cases.moves_of(Contest("cifar-128", dtype, mode)) == moves


def test_bytes_are_moves_times_elements_times_their_size() -> None:
    assert cases.bytes_of(Contest("cifar-128", "bf16", "fused"), "cpu") == 3 * 128 * 3 * 32 * 32 * 2


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_huge_tensors_have_their_size_in_every_dtype(device_type: str, dtype: str) -> None:
    elements = torch.Size(cases.shape_of("huge", dtype, device_type)).numel()
    assert elements * cases.DTYPES[dtype].itemsize == cases.HUGE_BYTES[device_type] >= 2**28


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_what_runs_by_default_exists_and_covers_every_case(device_type: str) -> None:
    everything = cases.contests(device_type)
    chosen = {c for c in everything if cases.runs_by_default(c, False, device_type)}
    assert {c.case for c in chosen} == set(cases.CASES)
    assert {c.mode for c in chosen} == {c.mode for c in everything}
    assert {c.dtype for c in chosen} == set(cases.DTYPES)
    for compiled in (c for c in everything if cases.runs_by_default(c, True, device_type)):
        assert compiled in chosen  # or there would be nothing to compare it with


def test_a_default_row_that_names_nothing_would_be_seen() -> None:
    for device_type, rows in cases._DEFAULT.items():
        existing = set(cases.contests(device_type))
        for names, dtypes, modes in rows:
            for named in itertools.product(names.split(), dtypes.split(), modes.split()):
                assert named in existing


def test_buffers_in_rotation_exceed_what_was_asked_for_or_are_many() -> None:
    wanted = 2**28
    for contest_ in (Contest("cifar-128", "fp32", "fused"), Contest("video", "bf16", "noise")):
        sets = contest.sets_for(contest_, CPU, wanted)
        inputs = (3 if contest_.mode == "noise" else 2) * torch.Size(cases.SHAPES[contest_.case]).numel()
        assert sets * inputs * cases.DTYPES[contest_.dtype].itemsize >= wanted
    assert contest.sets_for(Contest("huge", "fp32", "fused"), CPU, wanted) == 2
    assert contest.sets_for(SMALL, CPU, wanted) == 512


# timing


def test_ratio_is_of_paired_rounds() -> None:
    assert measure.ratio([1.0, 30.0, 4.0], [1.0, 10.0, 1.0]).value == 3.0  # not 4: the quotient of the medians
    slow_machine_in_some_rounds = [1.0, 10.0, 1.0, 100.0, 1.0]
    twice = [2 * seconds for seconds in slow_machine_in_some_rounds]
    assert measure.ratio(twice, slow_machine_in_some_rounds) == Ratio(2.0, 0.0)


def test_error_of_a_ratio_shrinks_with_the_number_of_rounds() -> None:
    few, many = ([1.0 + 0.01 * (i % 5) for i in range(n)] for n in (5, 500))
    assert measure.ratio(few, [1.0] * 5).error == pytest.approx(10 * measure.ratio(many, [1.0] * 500).error, rel=0.05)


def test_spread_is_median_and_fifths() -> None:
    assert Spread.of([float(i) for i in range(11)]) == Spread(5.0, 2.0, 8.0)


def test_functions_take_turns_and_each_round_calls_all() -> None:
    called: list[str] = []
    runs = {name: lambda name=name: called.append(name) for name in "abc"}
    times = measure.race(runs, CPU, Effort(0.0, 8, 8, 0.0))
    rounds = [called[-24:][i : i + 3] for i in range(0, 24, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1  # drawn anew: nobody always runs behind the same one
    assert all(len(found.wall) == 8 for found in times.values())


class Gpu:
    """What `measure` asks of torch.cuda: a GPU that is `late` to be held up the first so many times."""

    def __init__(self, late: int) -> None:
        self.late = late
        self.holds: list[int] = []

    def _sleep(self, cycles: int) -> None:
        self.holds.append(cycles)

    def Event(self, enable_timing: bool) -> Gpu:
        return self

    def record(self) -> None: ...

    def synchronize(self, device: torch.device | None = None) -> None: ...

    def query(self) -> bool:
        return len(self.holds) <= self.late

    def elapsed_time(self, end: Gpu) -> float:
        return 6.0  # ms


def test_device_time_is_taken_again_when_the_gpu_did_not_wait_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", gpu := Gpu(late=2))
    called: list[int] = []
    assert measure._device_seconds(lambda: called.append(1), 3, 1e-3) == pytest.approx(2e-3)
    assert len(called) == 9  # three times three
    assert gpu.holds == pytest.approx([gpu.holds[0], 2 * gpu.holds[0], 4 * gpu.holds[0]])


def test_calls_within_a_round_fit_in_the_queue_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", Gpu(late=0))
    monkeypatch.setattr(measure, "launches_of", lambda run: run())
    runs = {"one kernel": lambda: 1, "many": lambda: 200, "too many": lambda: 9999}
    times = measure.race(runs, torch.device("cuda"), Effort(0.0, 2, 2, 1.0))
    assert {name: found.calls for name, found in times.items()} == {"one kernel": 512, "many": 2, "too many": 1}
    assert [found.launches for found in times.values()] == [1, 200, 9999]
    assert times["many"].device == [3e-3] * 2


def test_a_profiler_that_sees_nothing_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", Gpu(late=0))
    with monkeypatch.context() as patch:  # without its permission, CUPTI leaves the list empty and raises nothing
        nothing = SimpleNamespace(events=lambda: [])
        patch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext(nothing))
        assert measure.launches_of(lambda: None) is None
    monkeypatch.setattr(measure, "launches_of", lambda run: None)
    times = measure.race({"uncounted": lambda: None}, torch.device("cuda"), Effort(0.0, 2, 2, 1.0))["uncounted"]
    assert times.launches is None
    assert times.calls <= 4  # as if it were many


# providers and their check


def test_a_provider_that_cannot_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> None:
        raise ImportError("libsomething.so is missing\nand more")

    monkeypatch.setitem(PROVIDERS, "broken", Provider("broken", broken))
    assert obstacle("broken", "cpu") == "ImportError: libsomething.so is missing"
    assert obstacle("triton", "cpu") == "runs on CUDA devices only"
    assert obstacle("reference", "cpu") is None


class Wrong:
    """hand_written with one thing spoiled."""

    def __init__(self, spoil: str) -> None:
        self.right = PROVIDERS["hand_written"].make(CPU)
        self.spoil = spoil

    def __call__(self, batch: Batch, deferred: bool) -> Tensor:
        loss = self.right(batch, deferred)
        if self.spoil == "loss":
            return loss + 1e-4 * loss.detach()
        if self.spoil == "gradient":
            return loss.detach() + 1.0001 * (loss - loss.detach())
        return loss * float("nan") if self.spoil == "nan" else loss

    def moments(self) -> dict[str, Tensor] | None:
        found = self.right.moments()
        assert found is not None
        return {**found, "m2": 1.001 * found["m2"]} if self.spoil == "statistics" else found


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        ("loss", "loss of step 1"),
        ("gradient", "gradient of step 1"),
        ("statistics", "statistics, m2,"),
        ("nan", "gradient of step 1"),
    ],
)
def test_a_wrong_provider_is_refused_and_the_others_are_timed(
    spoil: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROVIDERS, "wrong", Provider("wrong", lambda device: Wrong(spoil)))
    monkeypatch.setitem(PROVIDERS, "right", Provider("right", lambda device: Wrong("")))
    obstacle.cache_clear()
    outcomes = {
        outcome.provider: outcome
        for outcome in contest.hold(
            Contest("cifar-64", "fp32", "fused"), ["wrong", "right"], CPU, lambda: 1e10, quick=True
        )
    }
    refused, right = outcomes["wrong"], outcomes["right"]
    assert isinstance(refused, NotMeasured)
    assert refused.kind == "wrong"
    assert complaint in refused.reason
    assert isinstance(right, Measurement)
    assert right.wall.median > 0


class Graph:
    """Stands in for a CUDA graph: a replay calls the step again and copies its results to where they were."""

    def __init__(self, spoil: str) -> None:
        self.spoil = spoil
        self.captured = 0

    def capture(self, step: Callable[[], tuple[Tensor, ...]]) -> contest.Captured:
        results = torch.zeros(()), torch.zeros(64, 3, 32, 32)
        # Replays begin with the sixth of twelve graphs, as five steps came before, and end with the fifth.
        nothing = self.spoil == "nothing" or (self.spoil == "the last" and self.captured % 12 == 4)
        self.captured += 1

        def replay() -> None:
            if self.spoil == "statistics":
                step()
            for kept, found in zip(results, step(), strict=True):
                if self.spoil != "loss" or kept.ndim:
                    kept.copy_(1.1 * found if self.spoil == "gradient" and kept.ndim else found)

        return contest.Captured((lambda: None) if nothing else replay, results)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        ("", None),
        ("nothing", "gradient of step 6 is off by nan"),
        ("the last", "gradient of step 17 is off by nan"),  # of the twelve
        ("loss", "loss of step 6 is off by nan"),
        ("gradient", "gradient of step 6"),
        ("statistics", "step 6"),  # one step further: other weights
    ],
)
def test_a_graph_whose_replay_is_wrong_is_not_timed(
    spoil: str, complaint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest, "_on_side_stream", lambda run: run())
    monkeypatch.setattr(contest, "_capture", Graph(spoil).capture)
    names = ["mse_loss", "reference"] if spoil != "statistics" else ["reference"]
    outcomes = contest.hold(Contest("cifar-64", "fp32", "graph"), names, CPU, lambda: 1e10, quick=True)
    assert [outcome.provider for outcome in outcomes] == names
    for outcome in outcomes:
        if complaint is None:
            assert isinstance(outcome, Measurement)
        else:
            assert isinstance(outcome, NotMeasured)
            assert outcome.kind == "wrong"
            assert "CUDA graph replay: the " in outcome.reason
            assert complaint in outcome.reason


def test_the_sanitizers_look_at_every_loop_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole vectors and none; whole samples, one that is split, and more than one block settles. Not all recorded."""
    whole = {shape[0]: torch.Size(shape[1:]).numel() % 16 == 0 for shape in sanitize.SHAPES.values()}
    assert {samples > 2048 for samples, vectors in whole.items() if vectors} == {True, False}
    assert {torch.Size(shape[1:]).numel() % 8 == 0 for shape in sanitize.SHAPES.values() if shape[0] > 2048} == {
        True,
        False,
    }
    calls: list[str] = []
    forward = vadiff.DiffusionLoss.forward

    def recording(self: vadiff.DiffusionLoss, *arguments: Tensor, **options: str) -> Tensor:
        calls.append("training" if self.training else "eval")
        return forward(self, *arguments, **options)

    monkeypatch.setattr(vadiff.DiffusionLoss, "forward", recording)
    sanitize.exercise("reference", "cpu")
    assert calls.count("training") == 3 * 2 * len(sanitize.SHAPES)
    assert calls.count("eval") == 3 * len(sanitize.SHAPES)


def test_sets_that_fit_in_the_cache_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    rotated = 512 * 2 * 4 * 3 * 32 * 32
    for cache, cached in ((rotated, True), (rotated - 1, False)):
        monkeypatch.setattr("machine.last_level_cache", lambda device, cache=cache: cache)
        (found,) = contest.hold(SMALL, ["mse_loss"], CPU, lambda: 1e10, quick=True)
        assert isinstance(found, Measurement)
        assert found.sets == 512
        assert found.cached is cached


@pytest.mark.parametrize("small", [c for c in cases.contests("cpu") if c.case == "cifar-64"], ids=str)
def test_uncompiled_providers_pass_their_check(small: Contest) -> None:
    entered = ["mse_loss", "hand_written", "reference", "native"]
    outcomes = contest.hold(small, entered, CPU, lambda: 1e10, quick=True)
    assert not [outcome for outcome in outcomes if isinstance(outcome, NotMeasured) and outcome.kind != "not usable"]
    found = {outcome.provider: outcome for outcome in outcomes if isinstance(outcome, Measurement)}
    assert {"mse_loss", "hand_written", "reference"} <= set(found)
    hand_written = found["hand_written"]
    assert hand_written.bandwidth == pytest.approx(hand_written.bytes / hand_written.wall.median)
    assert hand_written.share_of_copy == pytest.approx(hand_written.bandwidth / 1e10)
    there, back = hand_written.times_as_fast_as["mse_loss"], found["mse_loss"].times_as_fast_as["hand_written"]
    assert there.value == pytest.approx(1 / back.value, rel=0.5)  # medians of quotients, not quotients of medians


def test_past_the_cache_has_copies_and_both_calls() -> None:
    outcomes = past_cache.hold(["reference"], quick=True)
    found = {outcome.provider: outcome for outcome in outcomes if isinstance(outcome, Measurement)}
    assert {"copy_", "reference, kernel alone", "reference, whole call"} <= set(found)
    elements = 512 * 3 * 32 * 32
    assert found["copy_"].bytes == 2 * 4 * elements
    assert found["reference, whole call"].bytes == 3 * 4 * elements
    shares = [found[kind].share_of_copy or 0.0 for kind in ("copy_", "streaming") if kind in found]
    assert max(shares) == pytest.approx(1.0)  # of the faster one


def test_a_kernel_that_ignores_the_buffer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vadiff.ops.reference._gradient", lambda *_: torch.zeros(512, 3, 32, 32))
    monkeypatch.setattr(past_cache, "refuse_wrong", lambda *_: [])
    outcomes = past_cache.hold(["reference"], quick=True)
    (missing,) = (o for o in outcomes if isinstance(o, NotMeasured) and "kernel" in o.provider)
    assert "empty_like" in missing.reason


@pytest.mark.parametrize("size", training_step.SIZES["cpu"], ids=str)
def test_training_steps_of_all_providers_are_compared(size: Contest) -> None:
    outcomes = training_step.hold(size, ["mse_loss", "reference"], CPU, quick=True)
    mse, reference = outcomes
    assert isinstance(mse, Measurement)
    assert isinstance(reference, Measurement)
    assert set(reference.times_as_fast_as) == {"mse_loss"}
    assert mse.bandwidth is None


def test_copies_copy() -> None:
    source = torch.randn(100_003 * 16)
    for kind, run in copy_bandwidth.copies(source, destination := torch.zeros_like(source))[0].items():
        destination.zero_()
        run()
        assert torch.equal(source, destination), kind
