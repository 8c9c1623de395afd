"""A result file as text: the table, the missing contests of a run that was stopped early, the design's figures, on a
GPU which backend a measured choice would be, and how many figures hold.

python benchmarks/result_table.py benchmarks/results/<device>-<date>.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cases
import choice
import figures
import table
import training_step
from cases import Contest
from measurements import Measurement, NotMeasured, Results, read


def left_out(results: Results) -> list[Contest]:
    """Missing contests of the default selection; empty for another selection."""
    if not set(results.selection.split("; ")) <= {"default", "interrupted"}:
        return []
    device_type = "cuda" if "compute_capability" in results.machine else "cpu"
    wanted: list[Contest] = [*figures.CONTESTS[device_type], *training_step.SIZES[device_type]]
    wanted += [c for c in cases.contests(device_type) if cases.runs_by_default(c, False, device_type)]
    outcomes: list[Measurement | NotMeasured] = [*results.measurements, *results.not_measured]
    held = {Contest(outcome.case, outcome.dtype, outcome.mode) for outcome in outcomes}
    return [contest for contest in dict.fromkeys(wanted) if contest not in held]


def text_of(results: Results) -> str:
    """The text that a run prints at its end."""
    missing = left_out(results)
    judged = figures.judge(results)
    return "\n".join(
        [
            table.render(results),
            "",
            *([f"left out: {len(missing)} contests: {', '.join(map(str, missing))}"] if missing else []),
            table.render_figures(judged),
            *choice.lines(results),
            figures.verdict(judged),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a result file of the benchmarks")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the text to FILE")
    options = parser.parse_args(arguments)
    results = read(options.results)
    if results is None:
        parser.error(f"{options.results} is not a result file of the benchmarks")
    text = text_of(results)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
