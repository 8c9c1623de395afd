"""Trains the runs of a grid, each in a process of its own, several side by side."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from ..extras import import_extra
from ..training.run_folder import is_in_use
from .grid import Grid, GridError, PlannedRun

_POLL_SECONDS = 1.0  # between two looks at a run that another process trains


def train_all(grid: Grid, out: Path, *, jobs: int = 1, index: int | None = None) -> list[Path]:
    """Train what is missing, and go on with what broke off.

    A run's output goes to `train.log` in its folder. A run whose weight table comes from another one waits for that,
    also where another process, as that of a job array, is training it.

    Args:
        grid: what to train.
        out: folder of the experiment.
        jobs: processes at a time.
        index: train this run only, and the one it needs.

    Returns:
        The folders of the runs that failed, or could not begin because one that they need did.

    Raises:
        GridError: no such run, or one that was trained with other settings than it should be; nothing is trained then.
        KeyboardInterrupt: all processes were told to stop, and left a checkpoint.
    """
    runs = grid.runs(out)
    if index is not None:
        if not 0 <= index < len(runs):
            raise GridError(f"index is {index}, expected 0 to {len(runs) - 1}: a run of the grid")
        chosen = runs[index]
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


class _Children:
    """The processes that train."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopping = threading.Event()

    def train(self, run: PlannedRun) -> bool:
        """Train one run to its end; whether it got there."""
        run.path.mkdir(parents=True, exist_ok=True)
        while not run.is_done:
            if is_in_use(run.path):
                if self._stopping.wait(_POLL_SECONDS):
                    return False
            elif run.is_done:  # it ended between the two looks
                break
            elif not self._train_once(run) and not is_in_use(run.path):  # it failed, and not for another's being faster
                return False
        return True

    def _train_once(self, run: PlannedRun) -> bool:
        """Train a run in a process; whether that came to the run's end."""
        with tempfile.TemporaryDirectory() as folder, (run.path / "train.log").open("ab") as log:
            config = Path(folder) / "config.yaml"
            run.config.save(config)
            command = [sys.executable, "-m", "vadiff", "train", "--config", str(config)]
            command += ["--resume", "--out", str(run.path)]
            environment = {"OMP_NUM_THREADS": "1", **os.environ}  # side by side, more threads get in each other's way
            with self._lock:
                if self._stopping.is_set():
                    return False
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
                )
                self._processes.add(process)
            process.wait()
            with self._lock:
                self._processes.discard(process)
        return process.returncode == 0 and run.is_done

    def stop(self) -> None:
        """Tell all of them to write a checkpoint and end."""
        with self._lock:
            self._stopping.set()
            for process in self._processes:
                process.send_signal(signal.SIGTERM)
