"""benchmarks/training_loop.py: what the loop adds is measured in turns with the bare step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import figures
import gpu_run
import pytest
import torch
import training_loop

from vadiff.training import PRESETS


@pytest.mark.parametrize("preset", ["digits", "digits-edm2"])
def test_figures_are_printed_and_written(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_loop.training_loop, "load_images", None)  # it is replaced, and put back after the test
    command = ["training_loop.py", "--preset", preset, "--batch-size", "4", "--log-every", "2", "--rounds", "3"]
    monkeypatch.setattr("sys.argv", [*command, "--device", "cpu", "--out", str(tmp_path / "found.json")])
    trying, seconds = set(), training_loop.seconds

    def timed(*of: object) -> training_loop.Seconds:
        trying.add(torch.backends.cudnn.benchmark)
        return seconds(*of)

    monkeypatch.setattr(training_loop, "seconds", timed)
    training_loop.main()
    assert trying == {True}  # as `train` sets it
    assert not torch.backends.cudnn.benchmark
    printed = capsys.readouterr().out
    assert gpu_run.telling(printed, 0).startswith("figures: 0 held, 0 missed, 2 not measured")
    assert "images/s: eager" in printed.splitlines()[-1]
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


def test_a_mode_is_timed_beside_eager_and_a_captured_one_beside_mse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loop.training_loop, "load_images", training_loop.random_images)
    config = training_loop.dataclasses.replace(PRESETS["digits"], batch_size=4, device="cpu")
    found = dict(training_loop.speeds_of_modes(config, ["captured", "eager"], steps=1, rounds=2))
    assert list(found) == ["eager", "captured"]  # a mode is compared with what came first
    assert not {"times_eager", "criterion_percent"} & found["eager"].keys()
    assert {"times_eager", "criterion_percent"} <= found["captured"].keys()


def test_an_interrupt_leaves_the_modes_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def until_the_limit(*of: object) -> Iterator[tuple[str, dict[str, float]]]:
        speed = {"images_per_second": 1e4, "step_ms": 25.6, "seconds_of_first_steps": 1.0}
        yield "eager", speed
        yield "captured", {**speed, "images_per_second": 2e4, "times_eager": 2.0, "criterion_percent": 0.4}
        raise KeyboardInterrupt

    monkeypatch.setattr(training_loop, "speeds_of_modes", until_the_limit)
    monkeypatch.setattr(training_loop.training_loop, "load_images", None)
    command = ["training_loop.py", "--preset", "digits", "--device", "cpu", "--out", str(tmp_path / "found.json")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(KeyboardInterrupt):
        training_loop.main()
    assert list(json.loads((tmp_path / "found.json").read_text())["modes"]) == ["eager", "captured"]
    printed = f"{capsys.readouterr().out}Traceback (most recent call last):\nKeyboardInterrupt\n"
    assert gpu_run.telling(printed, None) == (
        "figures: 2 held, 0 missed, 0 not measured; images/s: eager 10,000, captured 20,000 (2.00 ×, criterion +0.40 %)"
    )


def test_there_are_as_many_random_images_as_cifar_has() -> None:
    images = training_loop.random_images(PRESETS["cifar10-mini"])
    assert images.train.shape == (50_000, 3, 32, 32)
    assert len(images.train_labels) == 50_000


@pytest.mark.parametrize(
    ("compiled", "verdicts", "line"),
    [
        ({"images_per_second": 3.0, "times_eager": 1.5}, [True, True], "figures: 2 held, 0 missed, 0 not measured"),
        ({"images_per_second": 1.4, "times_eager": 1.4}, [False, True], "figures: 1 held, 1 missed, 0 not measured"),
    ],
)
def test_the_training_step_is_judged_by_its_fastest_mode(
    compiled: dict[str, float], verdicts: list[bool], line: str
) -> None:
    captured = {"images_per_second": 1.45, "times_eager": 1.45, "criterion_percent": 0.99}
    modes = {"eager": {"images_per_second": 1.0, "criterion_percent": 9.0}}
    nothing = figures.judge_training_loop("step", modes)
    assert [figure.passed for figure in nothing] == [None, None]
    assert figures.verdict(nothing) == (
        "figures: 0 held, 0 missed, 2 not measured (step: images/s over eager; step: criterion's share)"
    )
    found = figures.judge_training_loop("step", {**modes, "captured": captured, "compiled": compiled})
    assert [figure.passed for figure in found] == verdicts
    assert figures.verdict(found) == line
    captured["criterion_percent"] = 1.0
    assert figures.judge_training_loop("step", {"captured": captured})[1].passed is False
