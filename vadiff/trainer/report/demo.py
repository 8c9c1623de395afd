"""`vadiff demo`: three runs that differ only in the weighting, compared."""

import dataclasses
import signal
import sys
import time
from pathlib import Path

from ...errors import Stopped
from ...extras import import_extra
from ...files import check_writable
from ...pixels import pixels
from ...sampling import dpmpp_2m, noise_levels
from ..data import load_digits
from ..evaluation import image_metrics
from ..evaluation.fidelity import find_network
from ..next_steps import next_steps
from ..training import TrainConfig, open_run, train
from ..training.stopping import stoppable
from .comparison import Record
from .figure import comparison_figure, spread_of
from .page import write_report
from .runs import group_runs, read_history
from .table import held_out_table

# With loss_level next to variance_aware one sees what both have in common.
WEIGHTINGS = ("constant", "loss_level", "variance_aware")
SAMPLES = 48  # shown
COMPARED = 1797  # as many as there are real digits


def run_demo(config: TrainConfig, out: Path) -> None:
    """`_compare`, which a signal stops with the advice to start again.

    Raises:
        Stopped: SIGTERM or SIGINT.
    """
    told = f"the demo is not complete; the same command with --overwrite starts it anew in {out}"
    try:
        with stoppable(told):
            _compare(config, out)
    except Stopped as stop:  # a training's advice is to resume it alone
        raise Stopped(f"stopped by {signal.Signals(stop.signal).name}; {told}", stop.signal) from None


def _compare(config: TrainConfig, out: Path) -> None:
    """Train with each of WEIGHTINGS from the same weights on the same noise, and compare them.

    Writes `out`/report.png, one picture, and `out`/report.html, the page of `vadiff report`; prints tables.

    Args:
        config: of all three runs, except for `weighting`.
        out: folder, in which each run directory is named after its weighting.

    Raises:
        MissingExtraError: a package of the extras `train`, `report` or `eval` is not installed.
    """
    check_writable(out, folder=True)  # fail before minutes of training
    for module in ("jinja2", "matplotlib", "plotly"):
        import_extra(module, "report")
    find_network("digits")
    on_the_way = max(1, config.steps // 2)
    config = dataclasses.replace(config, samples_every=on_the_way, held_out_every=on_the_way, sample_count=SAMPLES)
    started = time.monotonic()
    print(
        f"Training a small U-Net to predict the noise in handwritten digits, {len(WEIGHTINGS)} times {config.steps} "
        "steps: linear betas, uniform timesteps, as DDPM.",
        flush=True,
    )
    data = load_digits()
    runs, samples, distances = {}, {}, {}
    for name in WEIGHTINGS:
        run = train(dataclasses.replace(config, weighting=name), out=out / name, overwrite=True)
        device = next(run.denoiser.parameters()).device
        runs[name] = run
        drawn = dpmpp_2m(run.denoiser, (1, 8, 8), range(COMPARED), levels=noise_levels(16), device=device)
        samples[name] = drawn[:SAMPLES]
        found = image_metrics(
            pixels(drawn), pixels(data.train), metrics=("fid",), features="digits", device=device, progress=False
        )
        distances[name] = found["fd-digits"]
        settings = {"step": config.steps, "images_seen": config.steps * config.batch_size, "features": "digits"}
        folder = out / name / "evaluation" / f"step-{config.steps}"
        Record(folder / "metrics.json", {**settings, "images": COMPARED}, [0]).add(0, found)  # for the page
        print(f"{name}: trained, {time.monotonic() - started:.0f} s so far", file=sys.stderr)

    comparison_figure(runs, samples, data.held_out).savefig(out / "report.png")
    print(f"\n{'':28}" + "".join(f"{name:>16}" for name in WEIGHTINGS))
    spreads = {name: spread_of(run) for name, run in runs.items()}
    print(f"{'spread of the loss, × ':28}" + "".join(f"{spreads[name]:16.1f}" for name in WEIGHTINGS))
    print(f"{'Fréchet distance of samples ':28}" + "".join(f"{distances[name]:16.2f}" for name in WEIGHTINGS))
    print(
        "\nThe weighted loss's standard deviation differs between noise levels by the factor in the first line; "
        "variance_aware aims at 1. The second line says how far generated digits are from real ones, in the features "
        "of a small classifier; less is better. It is one seed: repeat it with others before you believe a difference."
    )
    print("\nLoss on held-out digits per noise level (the error of x0 with EDM's weight; same noise for all):")
    print(held_out_table({name: run.held_out for name, run in runs.items()}))
    print("\nBelow 1: better than constant weighting at that noise level. ±: standard error over images, one seed.")
    title = f"Handwritten digits: {len(WEIGHTINGS)} weightings of one loss, compared"
    write_report(
        group_runs([read_history(open_run(out / name)) for name in WEIGHTINGS]), out / "report.html", title=title
    )
    print(f"Page: {out / 'report.html'}   picture: {out / 'report.png'}   ({time.monotonic() - started:.0f} s)")
    print(next_steps(("diagnose", out / WEIGHTINGS[0]), ("sample", out / WEIGHTINGS[-1])))
