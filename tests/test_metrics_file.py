"""vadiff.MetricsFile: what killed and resumed trainings leave in it, and what is read of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import vadiff


@pytest.fixture
def file(tmp_path: Path) -> vadiff.MetricsFile:
    return vadiff.MetricsFile(tmp_path / "new" / "log.jsonl")


def test_criterion_logs_to_it(file: vadiff.MetricsFile) -> None:
    criterion = vadiff.DiffusionLoss("constant")
    criterion.reweight(torch.ones(10), torch.zeros(10))
    criterion.log_to(file, 7)
    ((found),) = file.read()
    assert found["step"] == 7
    assert found["vadiff/base_loss/log_snr_0_to_2"] == 1.0
    assert (found["vadiff/samples"], found["vadiff/skipped"]) == (10.0, 0.0)


def test_numbers_are_one_json_object_a_line(file: vadiff.MetricsFile) -> None:
    file.log({"loss": torch.tensor(0.5, requires_grad=True), "count": 3, "bad": math.nan}, step=1)
    file.log({"loss": math.inf}, step=2)
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5, "count": 3.0, "bad": None}, {"step": 2, "loss": None}]


def test_lines_of_one_step_are_read_as_one_and_the_last_value_counts(file: vadiff.MetricsFile) -> None:
    file.log({"a": 1, "b": 2}, step=1)
    file.log({"b": 3, "c": 4}, step=1)
    assert file.read() == [{"step": 1, "a": 1.0, "b": 3.0, "c": 4.0}]


@pytest.mark.parametrize("cut", range(1, 21, 4))
def test_line_that_a_killed_process_left_incomplete_is_ignored_then_removed(file: vadiff.MetricsFile, cut: int) -> None:
    file.log({"loss": 1}, step=1)
    file.log({"loss": 2}, step=2)
    file.path.write_bytes(file.path.read_bytes()[:-cut])
    assert file.read() == [{"step": 1, "loss": 1.0}]
    vadiff.MetricsFile(file.path).log({"loss": 3}, step=2)
    assert file.read() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 3.0}]


def test_file_with_an_incomplete_line_alone_is_begun_anew(file: vadiff.MetricsFile) -> None:
    file.path.parent.mkdir()
    file.path.write_text('{"step": 1, "lo')
    assert file.read() == []
    file.log({"loss": 1}, step=1)
    assert file.read() == [{"step": 1, "loss": 1.0}]


def test_resumed_training_replaces_the_steps_after_its_first_and_loses_no_line(file: vadiff.MetricsFile) -> None:
    for step in (100, 200, 300):
        file.log({"loss": step}, step=step)
    resumed = vadiff.MetricsFile(file.path)
    resumed.log({"loss": -200}, step=200)
    assert file.read() == [{"step": 100, "loss": 100.0}, {"step": 200, "loss": -200.0}]
    resumed.log({"loss": -250}, step=250)
    assert [line["step"] for line in file.read()] == [100, 200, 250]
    assert len(file.path.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("values", "step", "error", "message"),
    [
        ({"loss": "low"}, 1, TypeError, "loss is 'low', expected a number or a tensor of one element"),
        ({"loss": torch.ones(2)}, 1, TypeError, r"loss is tensor\(\[1., 1.\]\), expected a number"),
        ({"loss": None}, 1, TypeError, "loss is None, expected a number"),
        ({"loss": 1.0}, 1.5, TypeError, "step is 1.5, expected an integer"),
        ({"loss": 1.0}, True, TypeError, "step is True, expected an integer"),
        ({"step": 1.0}, 1, ValueError, 'values has the name "step"'),
    ],
)
def test_what_is_no_number_is_refused_and_nothing_is_written(
    file: vadiff.MetricsFile, values: dict[str, Any], step: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        file.log(values, step)
    assert not file.path.exists()


@pytest.mark.parametrize("line", ["no json", "[1]", '{"loss": 1}', '{"step": "1"}'])
def test_damaged_line_is_named(file: vadiff.MetricsFile, line: str) -> None:
    file.log({"loss": 1}, step=1)
    with file.path.open("a") as opened:
        opened.write(line + "\n")
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: "):
        file.read()
