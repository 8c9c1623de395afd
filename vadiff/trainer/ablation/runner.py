"""Trains and evaluates the runs of a grid, each in a process of its own, several side by side."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from ..evaluation.fidelity import content_key, find_network
from ..training.run import open_run
from ..training.run_folder import is_in_use
from .evaluation import Evaluation, drawn_with
from .grid import Grid, GridError, PlannedRun
from .progress import GridProgress

_POLL_SECONDS = 1.0  # between checks of a run that another process trains
_SHOW_SECONDS = 1.0  # between looks at the steps of the runs


GOING_ON = "the runs at work wrote checkpoints: the same command goes on with them, and keeps those that are done"


def failures(failed: Sequence[Path]) -> str:
    """What failed, where to look, and how to go on."""
    return (
        f"{len(failed)} runs failed: {', '.join(map(str, failed))}. Their train.log and evaluate.log say why; the same "
        "command tries them again"
    )


def train_all(
    grid: Grid,
    out: Path,
    *,
    jobs: int = 1,
    index: int | None = None,
    evaluate: bool = False,
    inception_weights: Path | None = None,
    cache: Path | None = None,
) -> list[Path]:
    """Train the missing runs and resume the interrupted ones; then, in the same job, measure the images of each.

    A run's output goes to `train.log` and `evaluate.log` in its folder. A run that needs another run's weight table
    waits for that run, also if another process trains it, for example one of a job array. Runs that are finished, and
    measurements that are there, are kept: after a kill, a further call goes on with what was in work.

    Args:
        grid: what to train.
        out: folder of the experiment.
        jobs: processes at a time.
        index: train only this run and the run it needs, and measure only this run.
        evaluate: measure images of each run by `vadiff evaluate`, as `grid.evaluation` says, from the same seeds.
        inception_weights, cache: as in `vadiff evaluate`.

    Returns:
        The folders of the runs that failed, whose required run failed, or that could not be measured.

    Raises:
        GridError: no such run, or a run was trained with other settings; raised before anything is trained, as are the
            errors of missing weights of the network that images are compared by.
        KeyboardInterrupt: raised again after all processes were told to stop and to write a checkpoint.
    """
    runs = grid.runs(out)
    if index is not None:
        chosen = _chosen(runs, index)
        runs = [run for run in runs if run.path in (chosen.path, chosen.needs)]
    for run in runs:
        run.check()
    measured = [run for run in runs if index is None or run == chosen] if evaluate else []
    children = _Children()
    work = _Work(grid.evaluation, [run.path for run in measured], inception_weights, cache, children)
    if evaluate:
        work.prepare({run.config.dataset for run in measured})
    waiting = [run for run in runs if not work.is_complete(run)]
    trained = {run.path for run in runs if run.is_done}
    failed: list[Path] = []
    complete = {run.path for run in runs} - {run.path for run in waiting}
    with GridProgress(runs, complete) as shown, ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[tuple[bool, bool]], PlannedRun] = {}
        try:
            while waiting or running:
                for run in list(waiting):
                    if run.needs in failed and run.needs not in trained:
                        waiting.remove(run)
                        failed.append(run.path)
                    elif len(running) < jobs and (run.needs is None or run.needs in trained):
                        waiting.remove(run)
                        running[pool.submit(work.do, run)] = run
                if not running:
                    break
                shown.show(list(running.values()))
                for future in wait(running, timeout=_SHOW_SECONDS, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    is_trained, is_complete = future.result()
                    if is_trained:
                        trained.add(run.path)
                    if not is_complete:
                        failed.append(run.path)
                    shown.end(run, trained=is_trained, complete=is_complete)
        except BaseException:
            children.stop()
            raise
    return failed


class _Work:
    """What is done with one run: training, then measuring.

    Args:
        evaluation: how runs are measured.
        measured: folders of the runs to measure.
        inception_weights, cache: as in `vadiff evaluate`.
        children: the processes that do it.
    """

    def __init__(
        self, evaluation: Evaluation, measured: Sequence[Path], inception_weights: Path | None, cache: Path | None,
        children: "_Children",
    ) -> None:  # fmt: skip
        self.evaluation, self.measured, self.children = evaluation, measured, children
        self.weights, self.cache = inception_weights, cache
        self._networks: dict[str, str] = {}  # features → key of the network
        self._references: dict[tuple[object, ...], str] = {}  # fields that name a data set → key of its images
        self._first, self._cached = threading.Lock(), threading.Event()

    def prepare(self, datasets: Iterable[str]) -> None:
        """Find, download or train the networks that images are compared by.

        Raises:
            GridError: the options [evaluate] do not go with a data set.
            UserError: weights are missing and cannot be downloaded.
        """
        try:
            for features in {self.evaluation.features_of(dataset) for dataset in datasets}:
                network = find_network(features, inception_weights=self.weights, cache=self.cache)
                self._networks[features] = network.key
        except ValueError as error:
            raise GridError(f"evaluate: {error}") from error

    def is_complete(self, run: PlannedRun) -> bool:
        """Whether the run is trained and, if it is to be, measured."""
        if not run.is_done:
            return False
        return run.path not in self.measured or self._is_measured(run)

    def do(self, run: PlannedRun) -> tuple[bool, bool]:
        """Do what is missing. Returns whether the run is trained, and whether it is complete."""
        if not run.is_done and not self.children.train(run):
            return False, False
        if run.path not in self.measured or self.is_complete(run):
            return True, True
        if self._cached.is_set():
            return True, self._measure(run)
        with self._first:  # the first measurement is alone: it caches the features of the real images
            complete = self._measure(run)
            if complete:
                self._cached.set()
        return True, complete

    def _is_measured(self, run: PlannedRun) -> bool:
        step = run.steps_done()
        if drawn_with(run.path, step) is None:  # which needs no data set
            return False
        opened = open_run(run.path)
        config = opened.config
        data = (config.dataset, config.data, config.image_size)
        if data not in self._references:
            self._references[data] = content_key(opened.images().train[:])
        network = self._networks[self.evaluation.features_of(config.dataset)]
        return self.evaluation.was_done(run.path, config, step, network, self._references[data])

    def _measure(self, run: PlannedRun) -> bool:
        options = self.evaluation.arguments(run.config.dataset)
        for flag, path in (("--inception-weights", self.weights), ("--cache", self.cache)):
            options += [] if path is None else [flag, str(path)]
        return self.children.evaluate(run, options)


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
