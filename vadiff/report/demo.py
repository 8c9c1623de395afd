"""`vadiff demo`: three weightings of one loss, trained alike and compared."""

import dataclasses
import sys
import time
from pathlib import Path

from ..data import load_digits
from ..extras import import_extra
from ..sampling import heun
from ..training import TrainConfig, train
from .figure import comparison_figure
from .table import held_out_table

# loss_level and variance_aware go together: a picture of one alone would credit it with what both do.
WEIGHTINGS = ("constant", "loss_level", "variance_aware")
SAMPLES = 48


def run_demo(config: TrainConfig, out: Path) -> None:
    """Train with each of WEIGHTINGS from the same weights on the same noise; write `out`/report.png, print a table.

    Args:
        config: of all three runs, whose `weighting` it replaces.
        out: folder; each run's metrics and checkpoint go to a folder of its name in it.

    Raises:
        MissingExtraError: a package of the extras `train` or `report` is not installed.
    """
    import_extra("matplotlib", "report")  # before minutes of training, not after
    started = time.monotonic()
    print(f"Training a small U-Net on handwritten digits, {len(WEIGHTINGS)} times {config.steps} steps.", flush=True)
    runs, samples = {}, {}
    for name in WEIGHTINGS:
        run = train(dataclasses.replace(config, weighting=name), out=out / name, overwrite=True)
        device = next(run.denoiser.parameters()).device
        runs[name] = run
        samples[name] = heun(run.denoiser, (1, 8, 8), range(SAMPLES), device=device)
        print(f"{name}: trained, {time.monotonic() - started:.0f} s so far", file=sys.stderr)

    comparison_figure(runs, samples, load_digits().held_out).savefig(out / "report.png")
    print()
    print("Loss on 297 held-out digits per noise level (EDM's objective without weights; same noise for all):")
    print(held_out_table({name: run.held_out for name, run in runs.items()}))
    print("\nBelow 1: better than constant weighting at that noise level. ±: standard error over images, one seed.")
    print(f"Pictures: {out / 'report.png'}   ({time.monotonic() - started:.0f} s)")
