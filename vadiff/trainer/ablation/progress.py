"""Progress of a grid: one bar of the steps of all runs, and where each run is that is at work."""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType

from ..progress import progress_bar
from ..training.metrics import last_step
from .grid import PlannedRun


class GridProgress:
    """A progress bar in steps of all runs; in a pipe a line every half minute. A line for each run that ends.

    Args:
        runs: all runs of the grid.
        done: folders of those that were done before.
    """

    def __init__(self, runs: Sequence[PlannedRun], done: Collection[Path]) -> None:
        self._runs = runs
        self._steps = {run.path: min(last_step(run.path), run.config.steps) for run in runs}
        self._ended = len(done)
        total = sum(run.config.steps for run in runs)
        self._bar = progress_bar(total, self._name(), "step", initial=sum(self._steps.values()))

    def __enter__(self) -> "GridProgress":
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def show(self, at_work: Sequence[PlannedRun]) -> None:
        """Show the steps of the runs that are at work now."""
        before = sum(self._steps.values())
        for run in at_work:
            self._steps[run.path] = min(last_step(run.path), run.config.steps)
        self._bar.set_postfix_str(", ".join(map(self._state, at_work)), refresh=sys.stderr.isatty())
        self._bar.update(sum(self._steps.values()) - before)

    def end(self, run: PlannedRun, *, trained: bool, complete: bool) -> None:
        """Say how a run ended."""
        self._ended += complete
        self._bar.set_description_str(self._name(), refresh=False)
        if complete:
            how = "done"
        else:
            log = run.path / ("evaluate.log" if trained else "train.log")
            how = f"failed: {last_line(log)} (all of it: {log})"
        self._bar.write(f"{run.label}/seed-{run.seed}: {how}", file=sys.stderr)

    def _name(self) -> str:
        return f"{self._ended} of {len(self._runs)} runs"

    def _state(self, run: PlannedRun) -> str:
        step = self._steps[run.path]
        where = f"step {step} of {run.config.steps}" if step < run.config.steps else "measuring images"
        return f"{run.label}/seed-{run.seed} {where}"


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return "it left no log"
    return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")
