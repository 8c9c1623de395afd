"""`vadiff demo`: three runs that differ only in the weighting, compared."""

import dataclasses
import sys
import time
from pathlib import Path

from ...extras import import_extra
from ...sampling import heun
from ..data import load_digits
from ..training import TrainConfig, open_run, train
from .figure import comparison_figure
from .page import write_report
from .runs import group_runs, read_history
from .table import held_out_table

# With loss_level next to variance_aware one sees what both have in common.
WEIGHTINGS = ("constant", "loss_level", "variance_aware")
SAMPLES = 48


def run_demo(config: TrainConfig, out: Path) -> None:
    """Train with each of WEIGHTINGS from the same weights on the same noise, and compare them.

    Writes `out`/report.png, one picture, and `out`/report.html, the page of `vadiff report`; prints a table.

    Args:
        config: of all three runs, except for `weighting`.
        out: folder, in which each run directory is named after its weighting.

    Raises:
        MissingExtraError: a package of the extras `train` or `report` is not installed.
    """
    for module in ("jinja2", "matplotlib"):
        import_extra(module, "report")  # fail before minutes of training
    on_the_way = max(1, config.steps // 2)
    config = dataclasses.replace(config, samples_every=on_the_way, held_out_every=on_the_way, sample_count=SAMPLES)
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
    title = f"Handwritten digits: {len(WEIGHTINGS)} weightings of one loss, compared"
    write_report(
        group_runs([read_history(open_run(out / name)) for name in WEIGHTINGS]), out / "report.html", title=title
    )
    print(f"Page: {out / 'report.html'}   picture: {out / 'report.png'}   ({time.monotonic() - started:.0f} s)")
