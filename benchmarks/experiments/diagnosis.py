"""Does the verdict of `vadiff diagnose` know who gains by balance?

The figures are those of a criterion with constant weighting at the end of its training; the outcome is what
`variance_aware` did to the held-out loss for the same objective and seed: the mean over noise levels of ln(held-out x0
loss / constant's). It counts as a gain from -0.25 %. A verdict is right if it says "try" (or "objective") and there
was a gain, or "leave" and there was none; any other verdict is not right.

The thresholds of the verdict were fixed on the seeds 0 to 4 of benchmarks/experiments/objectives_digits.toml and are
judged on its seeds 5 to 9, and on pairs of other runs. The published means of the outcome over all ten seeds were known
when the thresholds were fixed; the criteria of seeds 5 to 9 were not. The seeds of one objective give nearly the same
figures: there are six cases on digits, not sixty.

The definition of the ratio was changed after seeds 5 to 9 had been judged once: bands with less than 1 % of the samples
no longer count, and "leave" is not said while a fifth of the loss lies in bands that do not. Streams of made-up losses
on which the first definition was wrong were the reason. The thresholds were looked at again on seeds 0 to 4, and kept,
before seeds 5 to 9 were judged by the new definition. The comparison with the std was made after seeds 5 to 9 were
known.

The line that the verdict names, `LossLevel(strength=0.5)`, was run on one objective only; what `loss_level` of full
strength did is beside what `variance_aware` did.

    vadiff ablate benchmarks/experiments/objectives_digits.toml --jobs 2 --out RUNS
    for weighting in constant variance_aware; do
        for process in edm vp_linear; do
            vadiff train --preset cifar10-mini --process $process --device cpu --precision fp32 --batch-size 32
                --steps 300 --log-every 10 --held-out-images 128 --weighting $weighting --out CIFAR/$process/$weighting
        done
    done
    python benchmarks/experiments/diagnosis.py RUNS
        --pair cifar10-mini-edm CIFAR/edm/constant CIFAR/edm/variance_aware
        --pair cifar10-mini-epsilon CIFAR/vp_linear/constant CIFAR/vp_linear/variance_aware

A pair is any two runs of `vadiff train` that differ in their weighting only. Without the pairs, or with fewer seeds,
give another file by --out: rows of a file that is there are not dropped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from results import RESULTS, write_results

import vadiff
from vadiff.diagnosis import LEAVE_BELOW, TRY_FROM, Diagnosis
from vadiff.ops.reference import moments_of
from vadiff.trainer.training.held_out import level_mean
from vadiff.trainer.training.metrics import stacked
from vadiff.training import Run, open_run

FIXED_ON, JUDGED_ON = range(0, 5), range(5, 10)
GAIN = -0.0025  # ln of the held-out loss: from here it is a gain
OUTCOMES = RESULTS / "objectives-digits" / "results.json"


def figures_of(run: Run) -> dict[str, Any]:
    """Figures and verdict at the end of a run with constant weighting."""
    found = run.diagnose()
    return {
        "mean_ratio": found.spread.mean_ratio,
        "std_ratio": found.spread.std_ratio,
        "variance_aware_weights": found.variance_aware,
        "loss_level_weights": found.loss_level,
        "finding": found.finding,
        "settled_at": settled_at(run),
        "steps": run.config.steps,
    }


def settled_at(run: Run) -> int:
    """The logged step from which the finding is that of the end of the training."""
    lines = [line for line in run.metrics() if "statistics" in line]
    findings = [diagnosis_at(run, line).finding for line in lines]
    same = len(findings)
    while same and findings[same - 1] == findings[-1]:
        same -= 1
    return int(lines[same]["step"])


def diagnosis_at(run: Run, line: dict[str, Any]) -> Diagnosis:
    """The diagnosis from the statistics in a line of metrics.jsonl."""
    config = run.config
    criterion = vadiff.DiffusionLoss("constant", config.bins, config.log_snr_range)
    n, mean, variance, mass = (stacked([line], "statistics", name)[0] for name in ("count", "mean", "variance", "mass"))
    m2 = variance * torch.maximum(n - 1, n / 2)
    moments_of(criterion.statistics.state, criterion.statistics.bins).copy_(
        torch.stack([n, mean.nan_to_num(), m2.nan_to_num(), mass])
    )
    return criterion.diagnose()


def judged(figures: dict[str, Any], outcome: float) -> dict[str, Any]:
    """The figures with the outcome, and whether the verdict was right; None where it says neither "try" nor "leave"."""
    advice = {"try": True, "objective": True, "leave": False}.get(figures["finding"])
    gained = outcome <= GAIN
    return {
        **figures,
        "variance_aware_did": outcome,
        "gained": gained,
        "right": advice is not None and advice is gained,
    }


def digits(runs: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every objective and seed of the ablation on digits."""
    arms = json.loads(OUTCOMES.read_text())["arms"]
    found = []
    for name in (name for name in arms if name.endswith("/variance-aware")):
        objective = name.split("/")[0]
        for seed in seeds:
            figures = figures_of(open_run(runs / objective / "constant" / f"seed-{seed}"))
            did = {
                f"{arm.replace('-', '_')}_did": arms[f"{objective}/{arm}"]["held_out"]["per_seed"][str(seed)]
                for arm in ("loss-level", "loss-level-half")
                if f"{objective}/{arm}" in arms
            }
            outcome = arms[name]["held_out"]["per_seed"][str(seed)]
            found.append({"objective": objective, "seed": seed, **did, **judged(figures, outcome)})
    return found


def pair(name: str, constant: Path, adaptive: Path) -> dict[str, Any]:
    """Two runs that differ in their weighting only.

    Raises:
        ValueError: they differ in more.
    """
    first, second = open_run(constant), open_run(adaptive)
    one, other = (run.config.resolved().as_dict() for run in (first, second))
    differing = {field for field in one if one[field] != other[field]}
    if differing != {"weighting"} or (one["weighting"], other["weighting"]) != ("constant", "variance_aware"):
        raise ValueError(f"{constant} and {adaptive} differ in {sorted(differing)}, expected the weighting only")
    outcome = math.log(held_out(second) / held_out(first))
    about = {field: one[field] for field in ("dataset", "process", "prediction", "batch_size", "steps", "seed")}
    return {"name": name, **about, **judged(figures_of(first), outcome)}


def held_out(run: Run) -> float:
    """Mean over noise levels of the held-out x0 loss of the averaged weights, at the end."""
    last = [line["held_out"] for line in run.metrics() if line.get("held_out")][-1]
    loss, log_snr = stacked([last], "loss_ema"), stacked([last], "log_snr")[0]
    return float(level_mean(loss, log_snr, sigma_data=run.config.sigma_data)[0])


def share_right(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"right": sum(row["right"] for row in rows), "of": len(rows)}


def right_by(rows: Sequence[dict[str, Any]], field: str) -> dict[str, Any]:
    """The same by what another weighting did, over the rows where it was run."""
    return share_right([judged(row, row[field]) for row in rows if field in row])


def by_std(fixed: Sequence[dict[str, Any]], later: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same with highest ÷ lowest std in place of the mean, and one threshold: the best one on `fixed`."""
    values = sorted(row["std_ratio"] for row in fixed)

    def right(rows: Sequence[dict[str, Any]], threshold: float) -> int:
        return sum((row["std_ratio"] >= threshold) is row["gained"] for row in rows)

    middles = [(low + high) / 2 for low, high in itertools.pairwise(values)]
    best = max(middles, key=lambda threshold: right(fixed, threshold))
    return {
        "threshold": best,
        "fixed_on": {"right": right(fixed, best), "of": len(fixed)},
        "judged_on": {"right": right(later, best), "of": len(later)},
    }


def as_text(content: dict[str, Any]) -> str:
    """A line per objective and half of the seeds, and a line per pair."""
    rows: list[tuple[str, ...]] = [
        (
            "",
            "seeds",
            "mean ratio",
            "std ratio",
            "verdict",
            "from step",
            "variance_aware %",
            "loss_level %",
            "right",
        ),
    ]
    for part in (FIXED_ON, JUDGED_ON):
        for objective in dict.fromkeys(row["objective"] for row in content["digits"]):
            found = [row for row in content["digits"] if row["objective"] == objective and row["seed"] in part]
            if found:
                rows.append(_line(objective, f"{part[0]} to {part[-1]}", found))
    rows += [_line(row["name"], str(row["seed"]), [row]) for row in content["pairs"]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    thresholds = content["thresholds"]
    lines += [
        "",
        f"Rule, fixed on seeds 0 to 4: leave it below {thresholds['leave_below']:g}, try from "
        f"{thresholds['try_from']:g} (mean ratio).",
        f"Right on seeds 0 to 4: {_of(content['fixed_on'])}; on seeds 5 to 9: {_of(content['judged_on'])}; on other "
        f"runs: {_of(content['pairs_right'])}.",
    ]
    for name, by in content["by_other_outcomes"].items():
        lines.append(f"By what {name} did instead: {_of(by['fixed_on'])}; {_of(by['judged_on'])}.")
    if by := content["by_std"]:
        lines.append(
            f"By the std ratio in place of the mean, compared afterwards, try from {by['threshold']:.2f}: "
            f"{_of(by['fixed_on'])}; {_of(by['judged_on'])}."
        )
    return "\n".join(lines) + "\n"


def _line(name: str, seeds: str, rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    def span(field: str, form: str, scaled: Callable[[float], float] = float) -> str:
        values = sorted(scaled(row[field]) for row in rows)
        low, high = (format(values[place], form) for place in (0, -1))
        return low if low == high else f"{low} to {high}"

    def percent(log_ratio: float) -> float:
        return 100.0 * math.expm1(log_ratio)

    return (
        name,
        seeds,
        span("mean_ratio", ".1f"),
        span("std_ratio", ".1f"),
        ", ".join(dict.fromkeys(row["finding"] for row in rows)),
        span("settled_at", ".0f"),
        span("variance_aware_did", "+.2f", percent),
        span("loss_level_did", "+.2f", percent) if "loss_level_did" in rows[0] else "not run",
        _of(share_right(rows)),
    )


def _of(share: dict[str, Any]) -> str:
    return f"{share['right']} of {share['of']}"


def rows_dropped(path: Path, content: dict[str, Any]) -> list[str]:
    """Names of the rows of a result file that `content` lacks."""
    if not path.exists():
        return []

    def names(of: dict[str, Any]) -> list[str]:
        return [*(f"{row['objective']} {row['seed']}" for row in of["digits"]), *(row["name"] for row in of["pairs"])]

    have = names(content)
    return [name for name in names(json.loads(path.read_text())) if name not in have]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of `vadiff ablate`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*FIXED_ON, *JUDGED_ON])
    parser.add_argument("--pair", nargs=3, action="append", default=[], metavar=("NAME", "CONSTANT", "ADAPTIVE"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = digits(options.runs, options.seeds)
    pairs = [pair(name, Path(constant), Path(adaptive)) for name, constant, adaptive in options.pair]
    fixed, later = ([row for row in rows if row["seed"] in part] for part in (FIXED_ON, JUDGED_ON))
    content = {
        "thresholds": {"leave_below": LEAVE_BELOW, "try_from": TRY_FROM},
        "gain_from_log_ratio": GAIN,
        "fixed_on": share_right(fixed),
        "judged_on": share_right(later),
        "pairs_right": share_right(pairs),
        "by_other_outcomes": {
            name: {"fixed_on": right_by(fixed, field), "judged_on": right_by(later, field)}
            for name, field in (
                ("loss_level", "loss_level_did"),
                ("LossLevel(strength=0.5), on ε only,", "loss_level_half_did"),
            )
        },
        "by_std": by_std(fixed, later) if fixed and later else None,
        "digits": rows,
        "pairs": pairs,
    }
    path = options.out or RESULTS / "diagnosis.json"
    if dropped := rows_dropped(path, content):
        parser.error(
            f"{path} has {len(dropped)} rows that this call has not, from {dropped[0]} to {dropped[-1]}: give another "
            "file by --out"
        )
    write_results("diagnosis", content, path)
    text = as_text(content)
    path.with_suffix(".txt").write_text(text)
    print(text, path, sep="\n")


if __name__ == "__main__":
    main()
