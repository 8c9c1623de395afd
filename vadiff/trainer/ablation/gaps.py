"""Held-out loss and gap to the optimal loss of every arm, per noise level, averaged over seeds.

All in EDM's unit, λ(σ)·mean((D - x0)²), which puts all levels on one scale. The gap is measured on training images,
with averaged weights in eval mode; held-out images have no optimal loss to subtract.
"""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...extras import import_extra
from ...files import replacing
from ...optimal_loss import OptimalLoss
from ...process import loss_ratio
from ..data import Images
from ..progress import progress_bar
from ..training.data_set import load_images
from ..training.held_out import held_out_log_snr, level_mean
from ..training.metrics import stacked
from ..training.optimal_curve import estimate_curve
from ..training.run import Run, open_run
from ..training.run_gap import gap_of_run
from .grid import Grid, GridError, PlannedRun, arm_label
from .output import arm_style, plain_axes
from .statistics import LEAST_SEEDS, Interval, interval

_COLUMNS = ("arm", "sigma", "log_snr", "seeds", "held_out", "held_out_low", "held_out_high", "training", "optimal",
            "optimal_stderr", "gap", "gap_low", "gap_high")  # fmt: skip


class LevelGap(NamedTuple):
    """One arm at one noise level, in EDM's unit."""

    sigma: float
    held_out: Interval
    training: float  # on images trained on, mean over seeds
    optimal: float  # J*/D
    optimal_stderr: float
    gap: Interval  # training - optimal; the interval is over seeds, which share the error of J*
    sigma_data: float  # of EDM's unit


@dataclass(frozen=True)
class Gaps:
    """The arms of a grid, level by level."""

    name: str
    seeds: tuple[int, ...]
    arms: dict[str, tuple[LevelGap, ...]]

    def as_text(self) -> str:
        """Two text tables, arms by noise levels, without a trailing newline.

        The held-out losses end with their geometric mean over levels in x0 form, see `level_mean`. Gaps have none: at
        memorised levels they are 0 or, within their error, below. Arms with other levels than those above them have a
        header of their own.
        """
        width = max(len(arm) for arm in self.arms)
        held_out: list[str] = []
        gaps: list[str] = []
        above: list[float] = []
        for arm, levels in self.arms.items():
            sigmas = [level.sigma for level in levels]
            if sigmas != above:
                header = f"{'arm':<{width}}" + "".join(f"  {f'σ {sigma:.3g}':<9}" for sigma in sigmas)
                held_out.append(f"{header}  {'x0, all':>9}")
                gaps.append(header.rstrip())
                above = sigmas
            losses = torch.tensor([level.held_out.mean for level in levels])
            log_snr = -2.0 * torch.tensor([level.sigma for level in levels]).log()
            mean = float(level_mean(losses, log_snr, sigma_data=levels[0].sigma_data))
            held_out.append(f"{arm:<{width}}" + "".join(f"  {number:9.5f}" for number in [*losses.tolist(), mean]))
            gaps.append(f"{arm:<{width}}" + "".join(f"  {level.gap.mean:9.5f}" for level in levels))
        lines = [f"{self.name}: EDM's loss per noise level, mean over seeds", ""]
        lines += ["Held-out images; at the end the geometric mean over levels of the x0 loss", *held_out, ""]
        return "\n".join([*lines, "Gap to the optimal loss on training images", *gaps])

    def as_csv(self) -> str:
        """One line per arm and noise level."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for arm, levels in self.arms.items():
            for level in levels:
                numbers = (
                    level.sigma, -2.0 * math.log(level.sigma), level.held_out.number, *level.held_out[:3],
                    level.training, level.optimal, level.optimal_stderr, *level.gap[:3],
                )  # fmt: skip
                writer.writerow([arm, *("" if math.isnan(number) else f"{number:.8g}" for number in numbers)])
        return text.getvalue()

    def figure(self) -> Any:
        """A `matplotlib.figure.Figure`: held-out loss per noise level on the left, the gap on the right."""
        figure = import_extra("matplotlib.figure", "report").Figure(figsize=(15, 7), dpi=100, facecolor="white")
        panels = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.06, right=0.84, top=0.82, bottom=0.1, wspace=0.15)
        for row, (arm, levels) in enumerate(self.arms.items()):
            sigmas = [level.sigma for level in levels]
            for panel, values in zip(
                panels, ([level.held_out for level in levels], [level.gap for level in levels]), strict=True
            ):
                style = arm_style(row)
                panel.plot(sigmas, [value.mean for value in values], label=arm, markersize=5, **style)
                panel.fill_between(
                    sigmas, [value.low for value in values], [value.high for value in values],
                    color=style["color"], alpha=0.12, linewidth=0,
                )  # fmt: skip
        enough = len(self.seeds) >= LEAST_SEEDS
        band = "Band: 95 % interval over seeds." if enough else f"No intervals from fewer than {LEAST_SEEDS} seeds."
        panels[0].set_title(f"Held-out loss.\n{band}", loc="left")
        panels[1].set_title(
            "Gap: loss on training images − optimal loss.\nHow much training could still lower it.", loc="left"
        )
        panels[1].axhline(0.0, color="black", linewidth=1)
        for panel in panels:
            panel.set_xscale("log")
            panel.set_xlabel("noise level σ      ← less noise · more noise →")
            plain_axes(panel)
        panels[0].set_ylabel("λ(σ) · mean squared error of D")
        panels[1].legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
        figure.suptitle(f"{self.name}: {len(self.seeds)} seeds", x=0.02, ha="left", fontsize=16, weight="bold")
        return figure


def collect_gaps(grid: Grid, out: Path, *, images: int = 1000, progress: bool = True) -> Gaps:
    """Measure the finished runs of a grid, at the noise levels of their held-out loss.

    J* of each data set is estimated first, to 1 % or 1e-4 of the total variance: some seconds on digits.

    Args:
        grid: the experiment; at least one run must be finished.
        out: its folder.
        images: training images to measure each run on; the same images and noise for every run.
        progress: show a progress bar.

    Raises:
        UserError: no run is finished, a run was trained with other settings, or a checkpoint or the data set is missing
            or corrupt.
    """
    done = [run for run in grid.runs(out) if run.is_done]
    if not done:
        raise GridError(f"no run in {out} is done, expected one at least: train them first")
    for run in done:
        run.check()
    sigma_data: dict[str, float] = {}  # of each arm
    known: dict[tuple[object, ...], tuple[Images, OptimalLoss]] = {}
    found: dict[str, list[dict[str, Tensor]]] = {
        arm_label(objective, arm): []
        for objective in grid.objectives
        for arm in sorted(grid.arms_of(objective), key=lambda arm: arm != grid.baseline)  # the baseline first
    }
    for run in _counted(done, progress):
        opened = open_run(run.path)
        config = opened.config
        device = run.config.torch_device()  # data and device of this machine are in the grid's config
        key = (
            config.dataset, run.config.data, config.image_size, config.mirrored_data, config.class_conditional,
            config.held_out_levels, config.held_out_range(),
        )  # fmt: skip
        if key not in known:
            data = load_images(run.config)
            sigmas = (-0.5 * held_out_log_snr(config)).exp().tolist()
            optimal = estimate_curve(config, data, device, sigmas=sigmas, relative=0.01, absolute=1e-4, limit=16384)
            known[key] = (data, optimal)
        data, optimal = known[key]
        gap = gap_of_run(opened, optimal, images=data, number=images, device=device)
        unit = loss_ratio("edm", -2.0 * gap.sigma.log(), sigma_data=config.sigma_data)
        sigma_data[run.label] = config.sigma_data
        found[run.label].append(
            {
                "sigma": gap.sigma,
                "held_out": _held_out(opened),
                "training": unit * gap.loss,
                "optimal": unit * gap.optimal,
                "optimal_stderr": unit * optimal.stderr / optimal.elements,
                "gap": unit * gap.gap,
            }
        )
    arms = {label: _levels(seeds, sigma_data[label]) for label, seeds in found.items() if seeds}
    return Gaps(grid.name, grid.seeds, arms)


def _counted(runs: Sequence[PlannedRun], progress: bool) -> Iterator[PlannedRun]:
    with progress_bar(len(runs), "gaps", "run", shown=progress) as bar:
        for run in runs:
            bar.set_postfix_str(f"{run.label}/seed-{run.seed}", refresh=False)
            yield run
            bar.update()


def write_gaps(gaps: Gaps, out: Path) -> None:
    """Write gaps.csv, gaps.txt and gaps.png to a folder, creating it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    for name, text in {"gaps.csv": gaps.as_csv(), "gaps.txt": gaps.as_text() + "\n"}.items():
        with replacing(out / name) as partial:
            partial.write_text(text)
    with replacing(out / "gaps.png") as partial:
        gaps.figure().savefig(partial, format="png")


def _held_out(run: Run) -> Tensor:
    """Final held-out loss of the averaged weights, [L]."""
    last = [entry for entry in run.metrics() if "held_out" in entry][-1]
    return stacked([last], "held_out", "loss_ema")[0]


def _levels(seeds: list[dict[str, Tensor]], sigma_data: float) -> tuple[LevelGap, ...]:
    """Aggregate over seeds, level by level."""
    values = {name: torch.stack([seed[name] for seed in seeds]) for name in seeds[0]}  # [S, L]
    return tuple(
        LevelGap(
            float(values["sigma"][0, level]),
            interval(values["held_out"][:, level].tolist()),
            float(values["training"][:, level].mean()),
            float(values["optimal"][0, level]),
            float(values["optimal_stderr"][0, level]),
            interval(values["gap"][:, level].tolist()),
            sigma_data,
        )
        for level in range(values["sigma"].shape[1])
    )
