"""Do networks trained on different objectives and levels suggest the same noise levels for one data set?

A suggestion should depend on the data, not on how the network was trained. For each run the levels that `vadiff levels
suggest` gives, from its training statistics and from its held-out images, on the runs of the objectives experiment:

    vadiff ablate benchmarks/experiments/objectives_digits.toml --jobs 2 --out RUNS
    python benchmarks/experiments/suggested_levels.py RUNS
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import write_results

from vadiff.trainer.training.level_evidence import NUMBERS, Evidence, of_held_out, of_statistics
from vadiff.training import open_run

OBJECTIVES = ("edm", "flow", "v-cosine", "epsilon-linear", "x0-cosine")


def numbers(evidence: Evidence) -> dict[str, float]:
    return {name: round(getattr(evidence.suggestion, name), 4) for name in NUMBERS}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS", help="folder of the experiment")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="which runs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="result file; default: the committed one")
    options = parser.parse_args(arguments)
    found: dict[str, list[dict[str, Any]]] = {}
    for objective in OBJECTIVES:
        runs = [open_run(options.runs / objective / "constant" / f"seed-{seed}") for seed in options.seeds]
        found[objective] = [
            {"seed": seed, "statistics": numbers(of_statistics(run)), "held_out": numbers(of_held_out(run))}
            for seed, run in zip(options.seeds, runs, strict=True)
        ]
        for row in found[objective]:
            print(objective, row, flush=True)
    write_results("suggested_levels", {"objectives": found}, options.out)


if __name__ == "__main__":
    main()
