"""The examples run as they are, with few steps."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("diffusers_unconditional", "diffusers_flow", "kohya_post_process_loss", "accelerate_loop")

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="examples/ is not beside these tests: an installed copy")


@pytest.fixture(autouse=True)
def a_state_of_its_own() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("name", NAMES)
def test_an_example_trains_both_ways_and_prints_losses_and_time(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--steps", "4"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    header, own, ours, *summary = capsys.readouterr().out.splitlines()
    assert header.split()[-7:] == ["loss", "before", "loss", "after", "ms", "per", "step"]
    (before, after, milliseconds), (ours_before, ours_after, _) = (
        [float(number) for number in re.findall(r"\d+\.\d+", line)[-3:]] for line in (own, ours)
    )
    assert before == ours_before
    assert 0 < after < 3
    assert 0 < ours_after < 3
    assert milliseconds > 0
    assert re.search(r"base loss by noise level, \d", summary[0])
