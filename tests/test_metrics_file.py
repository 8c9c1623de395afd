"""vadiff.MetricsFile: what killed and resumed trainings leave in it, and what is read of it."""

from __future__ import annotations

import json
import math
import multiprocessing
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
    assert found["vadiff/weighting"] == str(criterion.weighting)
    assert found["vadiff/verdict"] == criterion.diagnose().verdict


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
def test_line_that_a_killed_process_left_incomplete_is_ignored(file: vadiff.MetricsFile, cut: int) -> None:
    file.log({"loss": 1}, step=1)
    file.log({"loss": 2}, step=2)
    file.path.write_bytes(file.path.read_bytes()[:-cut])
    assert file.read() == [{"step": 1, "loss": 1.0}]
    vadiff.MetricsFile(file.path).log({"loss": 3}, step=2)
    assert file.read() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 3.0}]


@pytest.mark.parametrize("left", ['{"st', '{"step": 1, "lo'])
def test_incomplete_line_at_the_start_is_ignored(file: vadiff.MetricsFile, left: str) -> None:
    file.path.parent.mkdir()
    file.path.write_text(left)
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


def test_value_logged_late_or_by_another_count_leaves_other_names_alone(file: vadiff.MetricsFile) -> None:
    for step in (100, 200):
        file.log({"loss": step}, step=step)
        file.log({"epoch_loss": step}, step=step // 100)
    file.log({"fid": 3}, step=100)
    assert file.read() == [
        {"step": 1, "epoch_loss": 100.0},
        {"step": 2, "epoch_loss": 200.0},
        {"step": 100, "loss": 100.0, "fid": 3.0},
        {"step": 200, "loss": 200.0},
    ]


@pytest.mark.parametrize("content", ["precious", "precious\n", "1,2\n3,4", '{"loss": 1}\n', '{"step"=1'])
def test_file_of_others_is_refused_and_unchanged(file: vadiff.MetricsFile, content: str) -> None:
    file.path.parent.mkdir()
    file.path.write_text(content)
    with pytest.raises(ValueError, match=r"log\.jsonl begins with b'.*, expected a file of vadiff\.MetricsFile"):
        file.log({"loss": 1}, step=1)
    assert file.path.read_text() == content


def _log_many(path: Path, name: str) -> None:
    for step in range(300):
        vadiff.MetricsFile(path).log({name: step}, step)


def test_two_processes_lose_no_line(file: vadiff.MetricsFile) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_log_many, args=(file.path, name)) for name in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert file.read() == [{"step": step, "a": float(step), "b": float(step)} for step in range(300)]


def test_text_is_kept_and_blank_lines_are_ignored(file: vadiff.MetricsFile) -> None:
    file.log({"note": "warm-up over"}, step=1)
    with file.path.open("a") as opened:
        opened.write("\n\n")
    file.log({"loss": 1}, step=2)
    assert file.read() == [{"step": 1, "note": "warm-up over"}, {"step": 2, "loss": 1.0}]


@pytest.mark.parametrize(
    ("values", "step", "error", "message"),
    [
        ({"loss": [1.0]}, 1, TypeError, r"loss is \[1.0\], expected a number, a tensor of one element or text"),
        ({"loss": 10**400}, 1, TypeError, "loss is an integer beyond 1e308, expected a number"),
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
