"""Every example runs as it is, with few steps."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONAL = ("denoising_diffusion_pytorch", "k_diffusion", "lightning", "peft", "torchcfm")

pytestmark = [
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="examples/ is not beside these tests: an installed copy"),
    # Lightning's
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec", "ignore:The number of training batches"),
    # torchvision 0.15.2's, where transformers imports it, which PEFT brings
    pytest.mark.filterwarnings("ignore:The torchvision.datapoints and torchvision.transforms.v2 namespaces"),
]


@pytest.fixture(autouse=True)
def a_state_of_its_own() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_trains_both_ways_and_prints_losses_and_time_and_how_to_read_them(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in OPTIONAL:
        if package in path.read_text() and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.setattr(sys, "argv", [path.name, "--steps", "4"])
    runpy.run_path(str(path), run_name="__main__")
    header, own, ours, *summary = capsys.readouterr().out.splitlines()
    assert header.split()[-7:] == ["loss", "before", "loss", "after", "ms", "per", "step"]
    (before, after, milliseconds), (ours_before, ours_after, ours_milliseconds) = (
        [float(number) for number in re.findall(r"\d+\.\d+", line)[-3:]] for line in (own, ours)
    )
    assert before == ours_before
    assert before > after > 0
    assert before > ours_after > 0
    assert milliseconds > 0
    assert ours_milliseconds > 0
    assert re.search(r"base loss by noise level, \d", summary[0])
    assert summary[-1].endswith("One seed, few steps: a small difference shows nothing.")
