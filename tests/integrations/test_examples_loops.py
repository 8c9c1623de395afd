"""The examples of these trainers run as they are, with few steps."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDED = {
    "edm_loop": "sklearn",
    "k_diffusion_loop": "k_diffusion",
    "lucidrains_ddpm": "denoising_diffusion_pytorch",
    "flow_matching_loop": "torchcfm",
    "lightning_module": "lightning",
}

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="examples/ is not beside these tests: an installed copy")


@pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec, LeafSpec", "ignore:The number of training batches"
)  # Lightning
@pytest.mark.parametrize("name", NEEDED)
def test_an_example_trains_both_ways_and_prints_losses_and_time(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec(NEEDED[name]) is None:
        pytest.skip(f"{NEEDED[name]} is not installed")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--steps", "4"])
    with warnings.catch_warnings():
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    header, own, ours, *summary = capsys.readouterr().out.splitlines()
    assert header.split() == ["trainer", "loss", "before", "loss", "after", "ms", "per", "step"]
    (before, after, milliseconds), (ours_before, ours_after, _) = (
        [float(number) for number in re.findall(r"\d+\.\d+", line)[-3:]] for line in (own, ours)
    )
    assert before == ours_before
    assert before > after > 0.0
    assert before > ours_after > 0.0
    assert milliseconds > 0.0
    assert re.search(r"base loss by noise level, \d", summary[0])
