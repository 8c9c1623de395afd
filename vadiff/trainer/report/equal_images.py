"""Runs of different length, and measurements at different times, compared at the same number of training images."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from .runs import Group, History


def at_equal_images(groups: Sequence[Group]) -> tuple[list[Group], int | None]:
    """The groups as they were when all runs had seen the same number of training images.

    Held-out losses, and each metric of images, are kept up to the last number of images at which all runs that have
    them were measured; without such a number they are left out.

    Returns:
        The groups with what was logged up to then, and the number of images; None if all runs are of the same length,
        or if a run had logged nothing by the end of the shortest, in which case the groups are as they were.
    """
    runs = [run for group in groups for run in group.runs]
    if len({int(run.images[-1]) for run in runs}) == 1:
        return _measured_together(groups), None
    common = set.intersection(*({*run.images.tolist()} for run in runs))
    images = max(common) if common else min(int(run.images[-1]) for run in runs)
    if any(run.images[0] > images for run in runs):
        return [*groups], None
    cut = [dataclasses.replace(group, runs=tuple(_until(run, images) for run in group.runs)) for group in groups]
    return _measured_together(cut), images


def lengths_differ(groups: Sequence[Group]) -> bool:
    """Whether the runs have seen different numbers of training images."""
    return len({int(run.images[-1]) for group in groups for run in group.runs}) > 1


def measurements(run: History) -> dict[str, list[int]]:
    """Training images at which the held-out loss and each metric of images was measured, by "held_out" or its name."""
    found = {"held_out": [at for at, _ in run.held_out]}
    for at, values in run.evaluation:
        for name in values:
            found.setdefault(name, []).append(at)
    return {name: places for name, places in found.items() if places}


def _measured_together(groups: Sequence[Group]) -> list[Group]:
    """The groups without measurements after the last at which all runs that have one were measured."""
    places = [measurements(run) for group in groups for run in group.runs]
    last = {
        name: max(set.intersection(*({*each[name]} for each in places if name in each)), default=-1)
        for name in {name for each in places for name in each}
    }
    if all(each[name][-1] <= last[name] for each in places for name in each):
        return [*groups]

    def kept(run: History) -> History:
        return dataclasses.replace(
            run,
            held_out=[(at, found) for at, found in run.held_out if at <= last["held_out"]],
            evaluation=[
                (at, {name: value for name, value in found.items() if at <= last[name]}) for at, found in run.evaluation
            ],
        )

    return [dataclasses.replace(group, runs=tuple(map(kept, group.runs))) for group in groups]


def _until(run: History, images: int) -> History:
    """A run without what was logged after this number of training images."""
    rows = int(np.searchsorted(run.images, images, side="right"))
    names = ("step", "images", "count", "mean", "std", "weights")
    return dataclasses.replace(
        run,
        **{name: getattr(run, name)[:rows] for name in names},
        scalars={name: values[:rows] for name, values in run.scalars.items()},
        held_out=[(at, found) for at, found in run.held_out if at <= images],
        evaluation=[(at, found) for at, found in run.evaluation if at <= images],
    )
