"""Caveats at the head of a report."""

from collections.abc import Sequence

import numpy as np

from . import held_out_charts, training_charts
from .equal_images import at_equal_images, lengths_differ, measurements
from .overview import measured_alike, seed_of
from .runs import Group, History


def notes_of(groups: Sequence[Group]) -> list[str]:
    """Caveats to read before the charts."""
    notes = []
    equal, images = at_equal_images(groups)
    runs = [run for group in groups for run in group.runs]
    cut = [until for group in equal for until in group.runs]
    folders = [run.path.name for run in runs]
    name_of = {run.path: run.name if folders.count(run.path.name) == 1 else str(run.path) for run in runs}
    if images is not None:
        notes.append(
            "The runs are of different length. The table, and the charts of the end of training, compare them after "
            f"{images:,} training images, which all have seen; charts over training show every run to its end."
        )
    elif lengths_differ(groups):
        notes.append(
            "The runs are of different length, and a longer one has logged nothing while the shortest was trained: "
            "values and charts are of different numbers of training images. Compare the charts over training."
        )
    for group in groups:
        seeds = [seed_of(run) for run in group.runs]
        if same := [name_of[run.path] for run, seed in zip(group.runs, seeds, strict=True) if seeds.count(seed) > 1]:
            notes.append(
                f"{', '.join(same)} have the same settings and the same seed: they count as several runs, but tell "
                "nothing about the spread over seeds."
            )
    short = [run for run in runs if run.step[-1] < run.config["steps"]]
    if short:
        states = [f"{name_of[run.path]} is at step {run.step[-1]:,} of {run.config['steps']:,}" for run in short]
        notes.append(f"{'; '.join(states)}: not finished.")
    if unmeasured := [name_of[run.path] for run in runs if not run.held_out]:
        notes.append(f"{_were(unmeasured)} not measured on held-out images yet: that section is missing.")
    if lost := [name_of[run.path] for run in cut if not _is_finite(run)]:
        notes.append(
            f"{', '.join(lost)}: the last loss is not finite, the run has diverged. Means and differences in the table "
            "are of the other runs."
        )
    if late := [name_of[run.path] for run, until in zip(runs, cut, strict=True) if run.held_out and not until.held_out]:
        notes.append(
            f"{_were(late)} not measured on held-out images after as many training images as the others: there is no "
            "difference of held-out losses. Train with --held-out-every to have one."
        )
    notes += _notes_of_measurements(runs, cut)
    if not held_out_charts.comparable(equal):
        notes.append(
            "The held-out losses were measured at different noise levels, or with different numbers of images or "
            "draws: they cannot be compared. Train with the same --held-out options."
        )
    unlike = [name for name in training_charts.metric_names(equal) if not measured_alike(equal, name)]
    if unlike:
        notes.append(
            f"{_titles(unlike)}: measured with different options, such as numbers of images: the values cannot be "
            "compared. Measure all runs with the same options of `vadiff evaluate`."
        )
    fewest = min(len({seed_of(run) for run in group.runs}) for group in groups)
    if len(groups) > 1 and fewest < 10:
        number = "one seed" if fewest == 1 else f"{fewest} seeds"
        notes.append(
            f"Differences between runs rest on {number} here. Small ones may be chance; fewer than ten say "
            "nothing about the spread over seeds."
        )
    return notes


def _notes_of_measurements(runs: Sequence[History], cut: Sequence[History]) -> list[str]:
    """After how many images the runs are compared, where that is not their end; metrics that cannot be compared."""
    end = min(int(run.images[-1]) for run in cut)
    pairs = [(measurements(run), measurements(until)) for run, until in zip(runs, cut, strict=True)]
    at: dict[int, list[str]] = {}
    never = []
    for name in ("held_out", *training_charts.metric_names([Group("", tuple(runs))])):
        measured = [(whole[name], kept.get(name, [])) for whole, kept in pairs if name in whole]
        if not all(kept for _, kept in measured):
            never.append(name)
        elif (last := max((kept[-1] for _, kept in measured), default=end)) != end and any(
            whole[-1] > last for whole, _ in measured
        ):
            at.setdefault(last, []).append(name)
    found = [f"{_titles(names)}: compared after {last:,} training images." for last, names in at.items()]
    if never := [name for name in never if name != "held_out"]:
        found.append(
            f"{_titles(never)}: not measured after the same number of training images in all runs: there is no "
            "difference. `vadiff evaluate --step` measures earlier checkpoints."
        )
    return found


def _is_finite(run: History) -> bool:
    """Whether the last training loss and the last held-out loss are finite, as far as there are any."""
    losses = [run.held_out[-1][1]["loss_ema"]] if run.held_out else []
    losses += [run.scalars["base_loss"][-1:]] if "base_loss" in run.scalars else []
    return all(np.isfinite(found).all() for found in losses)


def _titles(names: Sequence[str]) -> str:
    return ", ".join("Held-out loss" if name == "held_out" else training_charts.metric_title(name) for name in names)


def _were(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'was' if len(names) == 1 else 'were'}"
