"""vadiff.trainer.ablation.gaps: the loss of every arm above the optimal one."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import pytest
import torch

from vadiff.optimal_loss import model_gap
from vadiff.process import loss_ratio
from vadiff.trainer.ablation import collect_gaps, read_grid
from vadiff.trainer.ablation.gaps import Gaps, LevelGap
from vadiff.trainer.ablation.grid import GridError
from vadiff.trainer.ablation.output import arm_style
from vadiff.trainer.ablation.statistics import Interval
from vadiff.trainer.cli import main
from vadiff.trainer.training.optimal_curve import estimate_curve
from vadiff.training import open_run, train

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

GRID = """
name = "tiny"
preset = "digits"
baseline = "constant"
seeds = [0, 1, 2, 3, 4]
[config]
steps = 3
batch_size = 8
channels = [8, 8]
held_out_images = 8
held_out_levels = 3
held_out_sigma = [0.3, 5.0]
tensorboard = false
device = "cpu"
backend = "reference"
[arms.constant]
weighting = "constant"
[arms.fast]
weighting = "constant"
learning_rate = { times = 2.0 }
"""


def test_gaps_are_those_of_the_runs_in_edms_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "grid.toml").write_text(GRID)
    grid = read_grid(tmp_path / "grid.toml")
    out = tmp_path / "out"
    with pytest.raises(GridError, match=r"no run in .* is done"):
        collect_gaps(grid, out)
    runs = {(run.arm, run.seed): run for run in grid.runs(out)}
    for seed in (1, 2, 3, 4):
        del runs["fast", seed]  # not trained
    for run in runs.values():
        train(run.config, out=run.path, progress=False)
    assert (
        main(["ablate", str(tmp_path / "grid.toml"), "--out", str(out), "--collect", "--gap", "--gap-images", "32"])
        == 0
    )
    rows = list(csv.DictReader((out / "gaps.csv").read_text().splitlines()))
    assert [(row["arm"], row["seeds"]) for row in rows] == [("constant", "5")] * 3 + [("fast", "1")] * 3
    assert [float(row["sigma"]) for row in rows[:3]] == pytest.approx([0.3, math.sqrt(1.5), 5.0])

    opened = open_run(runs["fast", 0].path)
    images = opened.images()
    sigmas = [float(row["sigma"]) for row in rows[:3]]
    optimal = estimate_curve(
        opened.config, images, torch.device("cpu"), sigmas=sigmas, relative=0.01, absolute=1e-4, limit=16384
    )
    chosen = torch.randperm(1500, generator=torch.Generator().manual_seed(0))[:32]
    gap = model_gap(opened.denoiser("ema"), images.train[chosen].float() / 127.5 - 1.0, optimal)
    unit = loss_ratio("edm", -2.0 * gap.sigma.log(), sigma_data=0.75)
    held_out = opened.metrics()[-1]["held_out"]["loss_ema"]
    for place, row in enumerate(rows[3:]):
        assert float(row["gap"]) == pytest.approx(float(unit[place] * gap.gap[place]), rel=1e-5)
        assert float(row["training"]) - float(row["optimal"]) == pytest.approx(float(row["gap"]), abs=1e-6)
        assert float(row["optimal_stderr"]) == pytest.approx(float(unit[place] * optimal.stderr[place] / 64), rel=1e-5)
        assert float(row["held_out"]) == pytest.approx(held_out[place])
        assert row["gap_low"] == ""  # one seed has no interval
    assert float(rows[0]["gap_low"]) < float(rows[0]["gap"]) < float(rows[0]["gap_high"])
    printed = capsys.readouterr().out
    assert printed.count(f"{float(rows[4]['gap']):9.5f}") >= 1
    weights = [float(level) + 1 / 0.75**2 for level in (-2.0 * torch.tensor(sigmas).log()).exp()]
    x0 = math.prod(loss / weight for loss, weight in zip(held_out, weights, strict=True)) ** (1 / 3)
    (held_out_line, _) = (line for line in printed.splitlines() if re.match(r"fast( +0\.\d+)+$|fast( +1\.\d+)+", line))
    assert float(held_out_line.split()[-1]) == pytest.approx(x0, abs=1e-5)
    assert (out / "gaps.txt").read_text().strip() in printed
    assert (out / "gaps.png").read_bytes().startswith(b"\x89PNG")


def test_no_two_arms_look_the_same() -> None:
    assert len({tuple(arm_style(row).values()) for row in range(56)}) == 56


def test_arms_with_other_levels_have_a_header_of_their_own() -> None:
    def level(sigma: float) -> LevelGap:
        return LevelGap(sigma, Interval(0.4, 0.3, 0.5, 5), 0.3, 0.2, 0.01, Interval(0.1, 0.0, 0.2, 5), 0.5)

    levels = {"edm/a": (level(0.5),), "edm/b": (level(0.5),), "flow/a": (level(0.3), level(2.0))}
    text = Gaps("two", (0,), levels).as_text()
    assert [line.split()[0] for line in text.splitlines() if line.startswith(("arm", "edm", "flow"))] == [
        "arm", "edm/a", "edm/b", "arm", "flow/a",
    ] * 2  # fmt: skip
    assert "σ 0.3      σ 2" in text
