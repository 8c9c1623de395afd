"""benchmarks/experiments/diagnosis.py: what a right verdict is; the committed table is made of committed figures."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("diffusers")

import diagnosis  # benchmarks/experiments
from results import RESULTS


@pytest.mark.parametrize(
    ("finding", "did", "right"),
    [
        ("try", -0.01, True),
        ("try", 0.0, False),
        ("objective", -0.01, True),
        ("leave", 0.0, True),
        ("leave", -0.0024, True),
        ("leave", -0.01, False),
        ("unclear", -0.01, False),
        ("few", 0.0, False),
    ],
)
def test_verdict_is_right_if_it_says_what_the_weighting_did(finding: str, did: float, right: bool) -> None:
    assert diagnosis.judged({"finding": finding}, did)["right"] is right


def test_committed_table_is_made_of_the_committed_figures() -> None:
    content = json.loads((RESULTS / "diagnosis.json").read_text())
    assert diagnosis.as_text(content) == (RESULTS / "diagnosis.txt").read_text()
    for row in content["digits"] + content["pairs"]:
        assert diagnosis.judged(row, row["variance_aware_did"]) == row


def test_committed_rows_are_not_dropped_by_a_call_with_fewer(tmp_path: Path) -> None:
    content = json.loads((RESULTS / "diagnosis.json").read_text())
    assert diagnosis.rows_dropped(RESULTS / "diagnosis.json", content) == []
    lost = diagnosis.rows_dropped(RESULTS / "diagnosis.json", {"digits": content["digits"][1:], "pairs": []})
    assert lost == ["epsilon-linear 0", "cifar10-mini-edm", "cifar10-mini-epsilon"]
    assert diagnosis.rows_dropped(tmp_path / "new.json", {"digits": [], "pairs": []}) == []


def test_pair_is_two_runs_that_differ_in_their_weighting_only(trained_run: Path, tmp_path: Path) -> None:
    def run(name: str, **fields: Any) -> Path:
        path = shutil.copytree(trained_run, tmp_path / name)
        config = yaml.safe_load((path / "config.yaml").read_text())
        (path / "config.yaml").write_text(yaml.safe_dump(config | fields))
        return path

    constant, adaptive = run("constant", weighting="constant"), run("adaptive", weighting="variance_aware")
    lines = [json.loads(line) for line in (adaptive / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "held_out" in line:
            line["held_out"]["loss_ema"] = [2.0 * loss for loss in line["held_out"]["loss_ema"]]
    (adaptive / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = diagnosis.pair("mine", constant, adaptive)
    assert found["variance_aware_did"] == pytest.approx(math.log(2.0))
    assert (found["finding"], found["right"], found["gained"]) == ("few", False, False)
    with pytest.raises(ValueError, match=r"differ in \['seed', 'weighting'\], expected the weighting only"):
        diagnosis.pair("mine", constant, run("other", weighting="variance_aware", seed=7))
