"""Run by test_checkpoint.py: saves a checkpoint again and again, killed (SIGKILL) at another point each time.

The points are every operation on the file system that Python reports while saving, and the middle of the data. After
each kill the checkpoints of the folder are read back; what is found is printed, one line of JSON for each point.

    python kill_while_saving.py FOLDER [again]

Saved is step 3, after steps 1 and 2; with `again` step 2, where only another step 2 is there and kept.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import IO, Any

import torch

from vadiff.trainer.training.checkpoint import FOLDER, load_checkpoint, save_checkpoint, steps_saved

EVENTS = ("open", "os.", "shutil.")


def state(step: int) -> dict[str, Any]:
    return {"step": step, "values": torch.full((1000,), float(step))}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(point: int) -> None:
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event.startswith(EVENTS):
            seen += 1
            if seen == point:
                die()

    sys.addaudithook(hook)


def kill_in_the_data(content: object, file: IO[bytes]) -> None:
    file.write(b"half of the data")
    file.flush()
    die()


def save_in_child(run: Path, point: int, step: int, keep: int) -> bool:
    """Save a step, to be killed at `point`; whether the child came to its end."""
    child = os.fork()
    if child == 0:
        if point == 0:
            torch.save = kill_in_the_data  # type: ignore[assignment]
        else:
            kill_at(point)
        save_checkpoint(run, step, state(step), keep)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return status == 0


def main() -> None:
    folder = Path(sys.argv[1])
    before, step, keep = ((2,), 2, 1) if sys.argv[2:] == ["again"] else ((1, 2), 3, 2)
    point, ended = 0, False
    while not ended:
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        for earlier in before:
            save_checkpoint(run, earlier, state(earlier), keep)
        ended = save_in_child(run, point, step, keep)
        latest = load_checkpoint(run)
        sound = all(torch.equal(load_checkpoint(run, s)["values"], state(s)["values"]) for s in steps_saved(run))
        save_checkpoint(run, 4, state(4), keep)  # and training goes on, over what was left behind
        left = sorted(entry.name for entry in (run / FOLDER).iterdir())
        line = {"point": point, "ended": ended, "latest": latest["step"], "sound": sound, "left": left}
        print(json.dumps(line), flush=True)
        point += 1


if __name__ == "__main__":
    main()
