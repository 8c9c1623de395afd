"""Trains and evaluates the runs of a grid, each in a process of its own, several side by side."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from ...extras import import_extra
from ..evaluation.fidelity import weights_key
from ..training.run_folder import is_in_use
from .grid import Grid, GridError, PlannedRun

_POLL_SECONDS = 1.0  # between checks of a run that another process trains


def train_all(grid: Grid, out: Path, *, jobs: int = 1, index: int | None = None) -> list[Path]:
    """Train the missing runs and resume the interrupted ones.

    A run's output goes to `train.log` in its folder. A run that needs another run's weight table waits for that run,
    also if another process trains it, for example one of a job array.

    Args:
        grid: what to train.
        out: folder of the experiment.
        jobs: processes at a time.
        index: train only this run and the run it needs.

    Returns:
        The folders of the runs that failed, or whose required run failed.

    Raises:
        GridError: no such run, or a run was trained with other settings; raised before anything is trained.
        KeyboardInterrupt: raised again after all processes were told to stop and to write a checkpoint.
    """
    runs = grid.runs(out)
    if index is not None:
        chosen = _chosen(runs, index)
        runs = [run for run in runs if run.path in (chosen.path, chosen.needs)]
    for run in runs:
        run.check()
    waiting = [run for run in runs if not run.is_done]
    done = {run.path for run in runs} - {run.path for run in waiting}
    failed: list[Path] = []
    children = _Children()
    bar = import_extra("tqdm", "train").tqdm(total=len(runs), initial=len(done), unit="run", disable=None)
    with bar, ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[bool], PlannedRun] = {}
        try:
            while waiting or running:
                for run in list(waiting):
                    if run.needs in failed:
                        waiting.remove(run)
                        failed.append(run.path)
                    elif len(running) < jobs and (run.needs is None or run.needs in done):
                        waiting.remove(run)
                        running[pool.submit(children.train, run)] = run
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    (done.add if future.result() else failed.append)(run.path)
                    bar.update()
        except BaseException:
            children.stop()
            raise
    return failed


def evaluate_all(
    grid: Grid,
    out: Path,
    *,
    jobs: int = 1,
    index: int | None = None,
    inception_weights: Path | None = None,
    cache: Path | None = None,
) -> list[Path]:
    """Measure the images of every finished run not yet measured as `grid.evaluation` says, with the same seeds for all.

    Each is measured by `vadiff evaluate`, whose output goes to `evaluate.log` in the run's folder.

    Args:
        grid: what was trained.
        out: folder of the experiment.
        jobs: processes at a time; the first run is measured alone, as it caches the features of the real images.
        index: measure this run only.
        inception_weights, cache: as in `vadiff evaluate`.

    Returns:
        The folders of the runs that could not be measured.

    Raises:
        GridError: no such run, or a run was trained with other settings; raised before anything is measured.
        KeyboardInterrupt: raised again after all processes were told to stop.
    """
    runs = grid.runs(out)
    runs = runs if index is None else [_chosen(runs, index)]
    for run in runs:
        run.check()
    key = weights_key(inception_weights)
    waiting = [
        run
        for run in runs
        if run.is_done and not grid.evaluation.was_done(run.path, run.steps_done(), run.config.process, key)
    ]
    options = grid.evaluation.arguments()
    for flag, path in (("--inception-weights", inception_weights), ("--cache", cache)):
        options += [] if path is None else [flag, str(path)]
    children = _Children()
    failed = []
    bar = import_extra("tqdm", "train").tqdm(
        total=len(runs), initial=len(runs) - len(waiting), unit="run", disable=None
    )
    with bar, ThreadPoolExecutor(jobs) as pool:

        def measure(run: PlannedRun) -> None:
            if not children.evaluate(run, options):
                failed.append(run.path)
            bar.update()

        try:
            for part in (waiting[:1], waiting[1:]):
                for future in [pool.submit(measure, run) for run in part]:
                    future.result()
        except BaseException:
            children.stop()
            pool.shutdown(cancel_futures=True)
            raise
    return [run.path for run in runs if run.path in failed]


def _chosen(runs: Sequence[PlannedRun], index: int) -> PlannedRun:
    if not 0 <= index < len(runs):
        raise GridError(f"index is {index}, expected 0 to {len(runs) - 1}: a run of the grid")
    return runs[index]


class _Children:
    """Subprocesses that train and measure runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopping = threading.Event()

    def train(self, run: PlannedRun) -> bool:
        """Train one run to its end. Returns whether it finished."""
        run.path.mkdir(parents=True, exist_ok=True)
        while not run.is_done:
            if is_in_use(run.path):
                if self._stopping.wait(_POLL_SECONDS):
                    return False
            elif run.is_done:  # it finished between the two checks
                break
            elif not self._train_once(run) and not is_in_use(run.path):  # failed, and no other process trains it
                return False
        return True

    def evaluate(self, run: PlannedRun, options: Sequence[str]) -> bool:
        """Measure a run. Returns whether that succeeded."""
        command = ["evaluate", str(run.path), *options, "--devices", run.config.device]
        return self._call(command, run.path / "evaluate.log") == 0

    def _train_once(self, run: PlannedRun) -> bool:
        """Train a run in a subprocess. Returns whether the run finished."""
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "config.yaml"
            run.config.save(config)
            command = ["train", "--config", str(config), "--resume", "--out", str(run.path)]
            return self._call(command, run.path / "train.log") == 0 and run.is_done

    def _call(self, command: Sequence[str], log_file: Path) -> int | None:
        """Exit status of a `vadiff` command; None if `stop` was called before it started."""
        environment = {"OMP_NUM_THREADS": "1", **os.environ}  # parallel runs would compete for the cores
        with log_file.open("ab") as log:
            with self._lock:
                if self._stopping.is_set():
                    return None
                process = subprocess.Popen(
                    [sys.executable, "-m", "vadiff", *command],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
                )  # fmt: skip
                self._processes.add(process)
            process.wait()
            with self._lock:
                self._processes.discard(process)
        return process.returncode

    def stop(self) -> None:
        """Send SIGTERM to all subprocesses; those that train write a checkpoint."""
        with self._lock:
            self._stopping.set()
            for process in self._processes:
                process.send_signal(signal.SIGTERM)
