"""The trainer's posterior-mean targets: references from the training images, with their flips and classes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import RunError
from ...log_snr import from_sigma
from ...loss import DiffusionLoss
from ...targets import PosteriorMean, Recorded
from ..config import TrainConfig
from ..config_schema import POSTERIOR_MEAN
from ..data import PIXELS
from .batches import Batch, Batches, flipped
from .image_source import OnDevice
from .streams import REFERENCES


def posterior_targets(config: TrainConfig, batches: Batches, classes: int) -> PosteriorMean | None:
    """The targets of a config; None is the images themselves.

    The references of a part of a batch are its images and others: of all training images where these are on the device,
    else of those that were read last. Ranks draw the same numbers, parts different ones.

    Raises:
        ValueError: `reference` is more than the training images.
    """
    if config.target != POSTERIOR_MEAN:
        return None
    source, size = batches.source, batches.number
    if not isinstance(source, OnDevice) or batches.encoding.random:  # the references are the images that were read
        return PosteriorMean(bank=size if config.reference == "all" else int(config.reference))
    generator = batches.streams.generators[REFERENCES]
    subset = None if config.reference == "all" else int(config.reference)
    if subset is not None and subset > size:
        raise ValueError(f"reference is {subset}, expected at most {size}: the number of training images; or all")
    mirrored = functools.partial(_mirrored, generator=generator)
    if config.flips and subset is None:
        subset = size
    reference = source.images if batches.encoding is PIXELS else batches.encoding.inputs(source.images)
    return PosteriorMean(
        reference, subset=subset, labels=batches.labels, augment=mirrored if config.flips else None,
        unlabelled=None if batches.labels is None else classes,
    )  # fmt: skip


def check_references(config: TrainConfig, batches: Batches, state: Mapping[str, Any]) -> None:
    """Raise if a run with posterior-mean targets goes on with references from elsewhere than before.

    Raises:
        RunError: the images are kept on the device now and were not before, or the other way round.
    """
    kind = batches.source.kind
    if config.target == POSTERIOR_MEAN and state.get("references", kind) != kind:
        raise RunError(
            f"cache is {config.cache}, by which the images, and with them the references of the targets, are "
            f"{kind!r} now and were {state['references']!r} before: go on with another --cache"
        )


def _mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images [M, C, H, W], each mirrored with probability 1/2."""
    return flipped(images, torch.rand(len(images), generator=generator, device=images.device) < 0.5)


def moved(criterion: DiffusionLoss, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x0 and eps [B, C, H, W] that a part of a batch is regressed on."""
    targets = criterion.target
    if not isinstance(targets, PosteriorMean):
        return batch.x0, batch.eps
    log_snr = from_sigma(batch.sigma)  # by alpha and sigma of a variance-preserving process: sigma may be infinite
    return targets.pair(
        batch.x0, batch.eps, log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt(), index=batch.rows,
        labels=batch.labels, generator=generator,
    )  # fmt: skip


def recorded_targets(config: TrainConfig) -> Recorded | None:
    """What stands for the targets of a config where a run is read without its images."""
    if config.target != POSTERIOR_MEAN:
        return None
    number = "all" if config.reference == "all" else f"{int(config.reference):,}"
    return Recorded(f"posterior mean over {number} training images")
