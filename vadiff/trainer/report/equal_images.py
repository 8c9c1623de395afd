"""Runs of different length, compared at the same number of training images."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from .runs import Group, History


def at_equal_images(groups: Sequence[Group]) -> tuple[list[Group], int | None]:
    """The groups as they were when all runs had seen the same number of training images.

    Returns:
        The groups with what was logged up to then, and the number of images; None if no entry had to be left out, or if
        a run had logged nothing by the end of the shortest, in which case the groups are as they were.
    """
    runs = [run for group in groups for run in group.runs]
    if len({int(run.images[-1]) for run in runs}) == 1:
        return [*groups], None
    common = set.intersection(*({*run.images.tolist()} for run in runs))
    images = max(common) if common else min(int(run.images[-1]) for run in runs)
    if any(run.images[0] > images for run in runs):
        return [*groups], None
    return [
        dataclasses.replace(group, runs=tuple(_until(run, images) for run in group.runs)) for group in groups
    ], images


def lengths_differ(groups: Sequence[Group]) -> bool:
    """Whether the runs have seen different numbers of training images."""
    return len({int(run.images[-1]) for group in groups for run in group.runs}) > 1


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
