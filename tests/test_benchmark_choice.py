"""The benchmarks' section on what a measured choice between native and Triton would be."""

from __future__ import annotations

import choice
import pytest
import result_table
from cases import Contest
from copy_bandwidth import CopyBandwidth
from measure import Ratio, Times
from measurements import Measurement, Results


def results_of(*measurements: Measurement, gpu: bool = True) -> Results:
    machine = {"device": "A device", "torch": "2.6", "vadiff": "0.1"}
    if gpu:
        machine["compute_capability"] = "9.0"
    copy = CopyBandwidth({"copy_": 8e9}, {})
    return Results(machine, "2026-01-02", "0123456789abcdef", False, "default", False, copy, list(measurements))


def measured(provider: str, case: str, seconds: float, **times_as_fast_as: Ratio) -> Measurement:
    times = Times([seconds] * 5, [seconds] * 5, None, 1)
    contest = Contest(case, "fp32", "fused")
    return Measurement.of(contest, provider, (1, 8), times, bytes=96, sets=2, times_as_fast_as=times_as_fast_as)


def both(case: str, native_time: float, triton_time: float, **times_as_fast_as: Ratio) -> list[Measurement]:
    return [measured("native", case, native_time, **times_as_fast_as), measured("triton", case, triton_time)]


def test_each_contest_of_both_has_the_faster_one_and_by_how_much() -> None:
    results = results_of(
        *both("one", 1e-4, 1e-3, triton=Ratio(2.0, 0.1)),  # of paired rounds, which the medians do not replace
        *both("two", 2e-4, 1e-4),
        *both("three", 1e-4, 1e-4, triton=Ratio(1.01, 0.02)),
        measured("native", "four", 1e-4),
    )
    blank, title, _, *rows, verdict = choice.lines(results)
    assert (blank, title) == ("", "what a measured choice would be")
    assert [row.split() for row in rows] == [
        ["one", "fp32,", "fused", "native", "2.00", "0.10"],
        ["two", "fp32,", "fused", "triton", "2.00"],
        ["three", "fp32,", "fused", "neither", "1.01", "0.02"],
    ]
    assert verdict == "verdict: native, faster in 1 of 3 contests, 1.00 × as fast in the geometric mean"


def test_the_verdict_names_triton_where_it_is_faster() -> None:
    results = results_of(*both("one", 4e-4, 1e-4), *both("two", 1e-4, 1e-4, triton=Ratio(0.999, 0.001)))
    text = result_table.text_of(results)
    assert "verdict: triton, faster in 1 of 2 contests, 2.00 × as fast in the geometric mean" in text.splitlines()


@pytest.mark.parametrize(
    "results",
    [results_of(*both("one", 1e-4, 2e-4), gpu=False), results_of(measured("native", "one", 1e-4)), results_of()],
    ids=["CPU", "one of them", "nothing"],
)
def test_without_both_on_a_gpu_there_is_no_such_section(results: Results) -> None:
    assert list(choice.lines(results)) == []
    assert "measured choice" not in result_table.text_of(results)
