"""benchmarks/experiments/sampler_steps.py: how each arm is drawn, and what its table is made of."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

import sampler_steps  # benchmarks/experiments
import torch
from sampler_steps import Arm

from vadiff.information import Profile
from vadiff.sampling import network_calls
from vadiff.trainer.cli.drawing import STATISTICS_MEASURED
from vadiff.training import open_run


@pytest.mark.parametrize("solver", sampler_steps.SOLVERS)
@pytest.mark.parametrize("spacing", sampler_steps.ARMS)
def test_every_arm_has_the_calls_it_is_named_for(trained_run: Path, solver: str, spacing: str) -> None:
    for calls in sampler_steps.CALLS:
        how = sampler_steps.generation_of(open_run(trained_run), Arm("edm", solver, spacing, calls))
        assert how.solver == solver
        assert network_calls(solver, how.steps) == (calls - 1 if solver == "heun" else calls)


@pytest.mark.parametrize(("spacing", "largest"), [("statistics", 4.0), ("bounded", 0.75**2)])
def test_only_the_arm_of_that_name_is_bounded(
    trained_run: Path, spacing: str, largest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = Profile(torch.tensor([-6.0, 0.0, 6.0]), torch.tensor([4.0, 0.3, 0.01]))
    monkeypatch.setattr(Profile, "of_criterion", lambda *_, **__: errors)
    assert open_run(trained_run).config.sigma_data == 0.75
    how = sampler_steps.generation_of(open_run(trained_run), Arm("epsilon-linear", "euler", spacing, 8))
    assert how.spacing == "statistics"
    assert how.profile is not None
    assert how.profile.x0_error.max() == largest


def test_table_compares_the_sets_that_both_arms_have() -> None:
    distances = {}
    for seed in range(5):
        for number in range(3):
            base = 10.0 + seed + number
            distances[f"edm/euler/rho/8/seed-{seed}/set-{number}/abc"] = base
            if number < 2:
                distances[f"edm/euler/statistics/8/seed-{seed}/set-{number}/abc"] = 0.5 * base
    rows = {
        (row["objective"], row["solver"], row["spacing"], row["calls"]): row
        for row in sampler_steps.summarise(distances)
    }
    row = rows["edm", "euler", "statistics", 8]
    assert row["sets"] == 2
    assert row["distance"] == pytest.approx(0.5 * (10.0 + 2.0 + 0.5))
    assert row["ln_ratio_to_rho"]["mean"] == pytest.approx(math.log(0.5))
    assert math.isnan(rows["flow", "heun", "rho", 4]["distance"])
    text = sampler_steps.as_text(rows.values())
    assert "6.25  -50 (-50 to -50)" in text


def test_distances_of_other_weights_have_other_names() -> None:
    job = sampler_steps.Job(Path("run"), Arm("flow", "euler", "rho", 8), 2, 1)
    assert sampler_steps.key(job, "0123456789abcdef") == "flow/euler/rho/8/seed-2/set-1/0123456789ab"
    assert sampler_steps.key(job, "fedcba") != sampler_steps.key(job, "0123456789abcdef")


def test_what_is_said_of_other_solvers_is_what_was_measured() -> None:
    rows = json.loads((Path(__file__).parent.parent / "benchmarks/results/sampler_steps.json").read_text())["rows"]

    def change(objective: str, solver: str, calls: int) -> str:
        """Change of the distance against rho, in whole percent."""
        arm = {"objective": objective, "solver": solver, "spacing": "statistics", "calls": calls}
        [row] = [row for row in rows if arm.items() <= row.items()]
        return f"{100 * math.expm1(row['ln_ratio_to_rho']['mean']):+.0f}"

    assert [change(name, "dpmpp_2m", calls) for calls in (4, 16) for name in ("edm", "flow")] == [
        "-65",
        "-44",
        "+9",
        "+11",
    ]
    assert (
        "44 to 65 % lower than by --rho 7 with 4 calls, and 9 to 11 % higher with 16" in STATISTICS_MEASURED["dpmpp_2m"]
    )
    assert [change(name, "heun", 16) for name in ("edm", "flow")] == ["+153", "+0"]
    assert (
        "153 % higher than by --rho 7 with 16 calls for EDM, and much the same for a flow"
        in STATISTICS_MEASURED["heun"]
    )
