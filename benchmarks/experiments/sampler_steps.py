"""Do steps placed by a network's own training statistics draw better samples? Fréchet distance by solver and calls.

Digits, the U-Net of the preset digits, the runs of objectives_digits.toml with constant weighting: EDM, flow, and
epsilon with linear betas; training seeds 0 to 4 of each, averaged weights.

Fixed before the run: FD in the features of the digits classifier against the 1,500 training images, of 1,797 images
from each of three sets of sampling seeds, which all arms share, mean over the sets; 4, 8, 16 and 32 network calls
(heun: one less); solvers euler, dpmpp_2m, heun. Primary figure: ln(FD / FD of the arm "rho") with euler, paired by
training seed, mean and 95 % interval over the five. Arms:

| arm | noise levels |
|---|---|
| rho | EDM's, ρ = 7, from 80 to 0.002, then 0: the default of `vadiff.sampling.noise_levels` |
| uniform | evenly spaced times: t = σ/(1 + σ) from σ 80 for EDM, from 1,000 for the flow; for epsilon its timesteps |
| statistics | equal steps of ∫ min(m/σ², 1) dσ from 80 to 0.002, then 0; m of the run's criterion at its last step |
| bounded | the same with m at most σ_data², the error of a constant guess; σ_data = .75. For epsilon only |

"bounded" was added after a look at the profiles and at a network of training seed 9, which is not part of the
experiment: an epsilon network's x0 error at σ above 10 is larger than the variance of the data, so that "statistics"
puts most of its steps there. The errors of the EDM and flow networks are below the bound at every level.

    python benchmarks/experiments/sampler_steps.py [RUNS] [--jobs 2]  # hours on two CPU cores; goes on after a stop
    python benchmarks/experiments/sampler_steps.py --picture          # table and picture of what is measured so far

RUNS is the folder of `vadiff ablate benchmarks/experiments/objectives_digits.toml`; runs that it lacks are trained.

Each distance is written to the result file as soon as it is measured, and is not measured again for the same weights.
Writes benchmarks/results/sampler_steps.json and .txt, and docs/sampler-steps.png.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from results import RESULTS, write_results

from vadiff.files import replacing
from vadiff.information import Profile
from vadiff.pixels import pixels
from vadiff.sampling import steps_for_calls
from vadiff.sampling.generation import Generation, solve
from vadiff.trainer.ablation.grid import PlannedRun, read_grid
from vadiff.trainer.ablation.statistics import Interval, interval
from vadiff.trainer.evaluation.fidelity import image_metrics
from vadiff.training import Run, open_run, train

ROOT = Path(__file__).parent.parent.parent
GRID = Path(__file__).parent / "objectives_digits.toml"
OBJECTIVES = {"edm": "EDM", "flow": "flow", "epsilon-linear": "ε, linear betas"}
TRAINING_SEEDS = range(5)
IMAGES, SETS = 1797, 3
CALLS = (4, 8, 16, 32)
SOLVERS = {"euler": "Euler (DDIM)", "dpmpp_2m": "DPM-Solver++(2M)", "heun": "Heun"}
ARMS = {  # name, colour of Okabe and Ito's palette, marker
    "rho": ("EDM's, ρ = 7", "#000000", "o"),
    "uniform": ("uniform time", "#E69F00", "s"),
    "statistics": ("statistics", "#0072B2", "D"),
    "bounded": ("statistics, error at most σ_data²", "#56B4E9", "^"),
}


class Arm(NamedTuple):
    """One row of the results."""

    objective: str
    solver: str
    spacing: str
    calls: int


class Job(NamedTuple):
    """One distance."""

    run: Path
    arm: Arm
    seed: int  # of the training
    number: int  # of the set of sampling seeds


def arms_of(objective: str) -> list[str]:
    return [arm for arm in ARMS if arm != "bounded" or objective == "epsilon-linear"]


ROWS = [
    Arm(objective, solver, spacing, calls)
    for objective in OBJECTIVES
    for solver in SOLVERS
    for spacing in arms_of(objective)
    for calls in CALLS
]


def generation_of(run: Run, arm: Arm) -> Generation:
    """How the images of an arm are drawn from a run."""
    steps = steps_for_calls(arm.solver, arm.calls)
    if arm.spacing == "rho":
        return Generation(arm.solver, steps, "edm")
    if arm.spacing == "uniform":
        if arm.objective == "epsilon-linear":
            return Generation(arm.solver, steps, "timesteps")
        return Generation(arm.solver, steps, "flow", sigma_max=80.0 if arm.objective == "edm" else None)
    sigma_data = run.config.sigma_data
    profile = Profile.of_criterion(run.criterion(), run.config.form().prediction, sigma_data=sigma_data)
    if arm.spacing == "bounded":
        profile = profile.bounded(sigma_data)
    return Generation(arm.solver, steps, "statistics", profile=profile)


@functools.lru_cache(maxsize=1)
def _opened(path: Path) -> tuple[Run, Any, torch.Tensor]:
    run = open_run(path)
    return run, run.denoiser(), run.images().train[:]


def measure(job: Job) -> float:
    """Fréchet distance of one set of images."""
    torch.set_num_threads(1)
    run, denoiser, real = _opened(job.run)
    seeds = range(job.number * IMAGES, (job.number + 1) * IMAGES)
    images = pixels(solve(denoiser, seeds, generation_of(run, job.arm), torch.device("cpu")))
    return image_metrics(images, real, metrics=("fid",), features="digits", batch_size=256, progress=False)["fd-digits"]


def planned(runs: Path) -> dict[tuple[str, int], PlannedRun]:
    """The runs, (objective, training seed) → plan; one with other settings raises."""
    wanted = {}
    for run in read_grid(GRID).runs(runs):
        if run.arm == "constant" and run.objective in OBJECTIVES and run.seed in TRAINING_SEEDS:
            run.check()
            wanted[run.objective, run.seed] = run
    return wanted


def train_missing(run: PlannedRun) -> None:
    torch.set_num_threads(1)
    if not run.is_done:
        train(run.config, out=run.path, resume=True, progress=False)


def read_distances(path: Path) -> dict[str, float]:
    """Distances measured before, by `key`."""
    return dict(json.loads(path.read_text())["distances"]) if path.exists() else {}


def key(job: Job, weights: str) -> str:
    """Name of a distance in the result file: equal for the same weights, arm and sampling seeds only."""
    return "/".join([*map(str, job.arm), f"seed-{job.seed}", f"set-{job.number}", weights[:12]])


def summarise(distances: dict[str, float]) -> list[dict[str, Any]]:
    """A row per arm: distance of each training seed, and ln ratio to "rho" with its interval."""
    each: dict[Arm, dict[int, dict[int, float]]] = {}
    for name, value in distances.items():
        objective, solver, spacing, calls, seed, number, _ = name.split("/")
        arm = Arm(objective, solver, spacing, int(calls))
        sets = each.setdefault(arm, {}).setdefault(int(seed.removeprefix("seed-")), {})
        sets[int(number.removeprefix("set-"))] = value
    rows = []
    for arm in ROWS:
        own, rho = each.get(arm, {}), each.get(arm._replace(spacing="rho"), {})
        # Sets that both arms have: all three at the end, fewer while the experiment runs.
        both = {seed: sorted(own[seed].keys() & rho.get(seed, {}).keys()) for seed in sorted(own)}
        both = {seed: sets for seed, sets in both.items() if sets}
        means = {seed: float(np.mean([own[seed][number] for number in sets])) for seed, sets in both.items()}
        base = {seed: float(np.mean([rho[seed][number] for number in sets])) for seed, sets in both.items()}
        ratios = [math.log(means[seed] / base[seed]) for seed in means]
        rows.append(
            {
                **arm._asdict(),
                "distance": float(np.mean(list(means.values()))) if means else math.nan,
                "ln_ratio_to_rho": interval(ratios)._asdict(),
                "per_seed": means,
                "sets": min((len(sets) for sets in both.values()), default=0),
            }
        )
    return rows


def as_text(rows: Iterable[dict[str, Any]]) -> str:
    """The table of the docs: distance, its change against "rho" in percent, and in brackets the change's interval."""
    lines = [f"  {'steps':10}" + "".join(f" {f'{calls} calls':<26}" for calls in CALLS).rstrip()]
    by_arm = {Arm(row["objective"], row["solver"], row["spacing"], row["calls"]): row for row in rows}
    for objective, solver in itertools.product(OBJECTIVES, SOLVERS):
        lines.append(f"{OBJECTIVES[objective]}, {SOLVERS[solver]}")
        for spacing in arms_of(objective):
            cells = [_cell(by_arm[Arm(objective, solver, spacing, calls)]) for calls in CALLS]
            lines.append(f"  {spacing:10}" + "".join(f" {cell:<26}" for cell in cells).rstrip())
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    if not row["per_seed"]:
        return "not measured"
    if row["spacing"] == "rho":
        return f"{row['distance']:6.2f}"
    ratio = Interval(**row["ln_ratio_to_rho"]).exp()
    low, mean, high = (100.0 * (value - 1.0) for value in (ratio.low, ratio.mean, ratio.high))
    return f"{row['distance']:6.2f} {mean:+4.0f} ({low:+.0f} to {high:+.0f})"


def draw(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Distance over network calls, a panel per objective and solver."""
    looks = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(looks):
        figure = Figure(figsize=(8.4, 7.2), facecolor="white", layout="constrained")
        panels = figure.subplots(len(OBJECTIVES), len(SOLVERS), sharex=True, sharey="row")
        for panel, (objective, solver) in zip(panels.flat, itertools.product(OBJECTIVES, SOLVERS), strict=True):
            for spacing in arms_of(objective):
                own = [
                    row
                    for row in rows
                    if (row["objective"], row["solver"], row["spacing"]) == (objective, solver, spacing)
                ]
                name, color, marker = ARMS[spacing]
                panel.plot(
                    CALLS, [row["distance"] for row in own], color=color, marker=marker, markersize=4, label=name
                )
            panel.set_title(f"{OBJECTIVES[objective]}, {SOLVERS[solver]}", fontsize=9)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(CALLS, [str(calls) for calls in CALLS])
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_locator(LogLocator(subs=(2.0, 3.0, 5.0)))
            panel.yaxis.set_minor_formatter("{x:g}")
            panel.grid(alpha=0.3, which="both")
        for panel in panels[:, 0]:
            panel.set_ylabel("Fréchet distance (digits)")
        for panel in panels[-1]:
            panel.set_xlabel("network calls")
        lines = panels[-1, 0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside upper center", ncols=len(ARMS), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)


def report(out: Path, distances: dict[str, float], jobs: int, picture: Path) -> None:
    """Write the result file with its summary, the table and the picture."""
    rows = summarise(distances)
    figures = {"images": IMAGES, "jobs": jobs, "measured": len(distances), "rows": rows, "distances": distances}
    write_results("sampler_steps", figures, out)
    out.with_suffix(".txt").write_text(as_text(rows))
    draw(rows, picture)
    print(as_text(rows), end="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", type=Path, nargs="?", default=Path("runs/objectives-digits"), help="default: %(default)s"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--out", type=Path, default=RESULTS / "sampler_steps.json", help="default: %(default)s")
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "sampler-steps.png", help="default: %(default)s")
    parser.add_argument("--picture", action="store_true", help="table and picture of the result file only")
    options = parser.parse_args()
    distances = read_distances(options.out)
    if options.picture:
        rows = summarise(distances)
        options.out.with_suffix(".txt").write_text(as_text(rows))
        draw(rows, options.image)
        return
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        plan = planned(options.runs)
        list(pool.map(train_missing, plan.values()))
        weights = {place: open_run(run.path).fingerprint()[1] for place, run in plan.items()}
        jobs = {}  # set by set, solver by solver: an experiment that is cut short lacks no network of what it has
        for number, solver, (objective, seed) in itertools.product(range(SETS), SOLVERS, plan):
            for arm in (arm for arm in ROWS if (arm.objective, arm.solver) == (objective, solver)):
                job = Job(plan[objective, seed].path, arm, seed, number)
                jobs[key(job, weights[objective, seed])] = job
        distances = {name: value for name, value in distances.items() if name in jobs}
        missing = {name: job for name, job in jobs.items() if name not in distances}
        for name, value in zip(missing, pool.map(measure, missing.values()), strict=True):
            distances[name] = value
            print(f"{len(distances)} of {len(jobs)}: {name} {value:.3f}", flush=True)
            with replacing(options.out) as partial:
                partial.write_text(json.dumps({"distances": distances}) + "\n")
    report(options.out, distances, len(jobs), options.image)


if __name__ == "__main__":
    main()
