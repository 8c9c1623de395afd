"""benchmarks/training_loop.py: what the loop adds is measured in turns with the bare step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import training_loop


@pytest.mark.parametrize("preset", ["digits", "digits-edm2"])
def test_figures_are_printed_and_written(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_loop.training_loop, "load_images", None)  # it is replaced, and put back after the test
    command = ["training_loop.py", "--preset", preset, "--batch-size", "4", "--log-every", "2", "--rounds", "3"]
    monkeypatch.setattr("sys.argv", [*command, "--device", "cpu", "--out", str(tmp_path / "found.json")])
    training_loop.main()
    printed = capsys.readouterr().out
    assert "the loop adds" in printed
    assert "power-function averages: " in printed
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["bare_step_ms"] > 0
    assert list(content["modes"]) == ["eager"]  # on a CPU
    assert content["modes"]["eager"]["images_per_second"] > 0
    assert "the criterion" in printed
    for name in ("overhead_percent", "processor_time_overhead_percent"):
        values = content[name]
        assert values["low_quartile"] <= values["median"] <= values["high_quartile"]
    assert content["averages_percent"]["running"] > 0


def test_both_take_turns_and_are_summed() -> None:
    order = []
    totals = training_loop.one_round(lambda: order.append("one"), lambda: order.append("other"), 4, torch.device("cpu"))
    assert order == ["other", "one", "one", "other", "other", "one", "one", "other"]
    assert len(totals) == 2
    assert all(total.wall > 0 for total in totals)


def test_overhead_is_the_median_of_the_rounds() -> None:
    found = training_loop.overhead([1.02, 1.04, 1.03, 9.0, 1.01])  # one round that something else ran beside
    assert found["median"] == pytest.approx(3.0)
