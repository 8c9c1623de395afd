"""Comparison of generated images with real ones: preparation, measuring, and the record of the results."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...files import check_writable, problem, replacing
from ..evaluation import image_metrics
from ..evaluation.feature_statistics import FeatureStatistics, is_statistics, read_statistics
from ..evaluation.fidelity import (
    FeatureNetwork,
    cache_folder,
    check_images,
    check_metrics,
    content_key,
    feature_statistics,
    features_for,
    find_network,
    result_name,
    within_reach,
)
from ..next_steps import command_line
from ..pictures import read_pictures
from ..training import open_run

_NO_PICTURES = (
    "the run was trained on latents, expected pictures to compare with: give the folder or .npz of those that were "
    "encoded, or a run on them, with --reference"
)

Reference = Tensor | FeatureStatistics  # real images [N, C, H, W] uint8, or the statistics of their features


@dataclass(frozen=True)
class Comparison:
    """Options of the comparison with real images; see `evaluation.image_metrics`.

    Args:
        metrics: of "fid", "kid", "isc", "prc"; empty for no comparison.
        reference: real images: a folder, an .npz archive or a run directory; or statistics of their features, see
            `evaluation.feature_statistics`; None is the run's training images.
        features: "inception", "digits" or "dinov2"; None chooses by the data set.
        layer: of the Inception network.
        inception_weights: file of that network's weights; None downloads them.
        dinov2_weights: file of the weights of DINOv2, for these features.
        cache: folder for the features of references and for the digits classifier; None is the user's cache.
    """

    metrics: Sequence[str] = ("fid", "kid", "prc")
    reference: Path | None = None
    features: str | None = None
    layer: str = "2048"
    inception_weights: Path | None = None
    dinov2_weights: Path | None = None
    cache: Path | None = None


def prepared(comparison: Comparison, dataset: str | None, *, caches: bool = True) -> tuple[Comparison, FeatureNetwork]:
    """Choose the features, and find, download or train their network: before images are drawn.

    Args:
        comparison: some options.
        dataset: that the images imitate; None if unknown.
        caches: whether features of real images, if there are any, will be cached.

    Returns:
        The comparison with its features set and without metrics that the weights or the reference cannot give, which is
        printed; and the network.

    Raises:
        ValueError: options that do not go together, latents without a reference, or weights that are missing or cannot
            give the metrics.
        UserError: the weights could not be downloaded, or the cache of features cannot be written.
        MissingExtraError: torch-fidelity is not installed.
    """
    if dataset == "latents" and comparison.metrics and comparison.reference is None:
        raise ValueError(_NO_PICTURES)
    features = comparison.features or (features_for(dataset) if dataset is not None else "inception")
    check_metrics(comparison.metrics, features, comparison.layer)
    if caches and set(comparison.metrics) != {"isc"} and not _has_statistics(comparison):
        _check_cache(cache_folder() if comparison.cache is None else comparison.cache)
    possible = within_reach(comparison.metrics, comparison.layer, comparison.inception_weights)
    network = find_network(
        features,
        inception_weights=comparison.inception_weights,
        dinov2_weights=comparison.dinov2_weights,
        cache=comparison.cache,
        progress=sys.stderr.isatty(),
    )
    if len(possible) < len(comparison.metrics):
        print(f"isc (Inception score) is skipped: {comparison.inception_weights} is not finite up to the last layer")
    if comparison.reference is not None and _has_statistics(comparison):
        possible = _within_statistics(possible, comparison.reference)
    return dataclasses.replace(comparison, features=features, metrics=possible), network


def _has_statistics(comparison: Comparison) -> bool:
    """Whether the reference is statistics of real images' features, which are not cached."""
    return comparison.reference is not None and is_statistics(comparison.reference)


def _check_cache(folder: Path) -> None:
    try:
        check_writable(folder, folder=True)
    except OSError as error:
        raise UserError(f"{problem(error) or error}. It caches features: name another folder with --cache") from error


def _within_statistics(metrics: Sequence[str], path: Path) -> tuple[str, ...]:
    """The metrics that need no real images, but only the statistics of their features; the others are printed."""
    possible = tuple(name for name in metrics if name in ("fid", "isc"))
    if not possible:
        raise ValueError(f"metrics is {', '.join(metrics)}, expected fid: {path} has statistics, and no images")
    if len(possible) < len(metrics):
        others = ", ".join(name for name in metrics if name not in possible)
        print(f"{others} is skipped: {path} has statistics of real images, and not the images")
    return possible


def check_drawn(shape: tuple[int, int, int], number: int, reference: Reference, comparison: Comparison) -> None:
    """Raise unless images [number, *shape], yet to be drawn, can be compared with the reference.

    Raises:
        ValueError: they cannot; the message says why.
    """
    images = torch.zeros(1, *shape, dtype=torch.uint8).expand(number, -1, -1, -1)
    check_images(images, reference, comparison.metrics, comparison.features or "inception")


def compare(
    images: Tensor, reference: Reference | None, comparison: Comparison, device: torch.device
) -> dict[str, float]:
    """The metrics by name, which includes the features unless they are the usual ones; also printed."""
    features = comparison.features or "inception"
    values = image_metrics(
        images,
        reference,
        metrics=comparison.metrics,
        features=features,
        layer=comparison.layer,
        inception_weights=comparison.inception_weights,
        dinov2_weights=comparison.dinov2_weights,
        cache=comparison.cache,
        device=device,
    )
    against = f" against {len(reference):,} real ones" if isinstance(reference, Tensor) else ""
    if isinstance(reference, FeatureStatistics):
        against = f" against the statistics in {comparison.reference}"
    others = {"digits": "features of the digits classifier", "dinov2": "features of DINOv2's ViT-L/14"}
    by = others.get(features, f"Inception layer {comparison.layer}")
    print(f"{len(images):,} images{against}, {by}:")
    print_metrics(values)
    return values


def print_metrics(values: Mapping[str, float]) -> None:
    for name, value in values.items():
        print(f"{name:>16} {value:.6g}")


def evaluate_pictures(path: Path, comparison: Comparison, device: torch.device) -> dict[str, float]:
    """Compare a folder of images or an .npz archive with real images, and print the metrics.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: no readable images, or invalid options of the comparison.
        UserError: the reference is a run whose data set is missing.
    """
    reference, dataset = None, None
    if comparison.reference is not None:
        reference, dataset = read_reference(comparison.reference, comparison), _dataset(comparison.reference)
    comparison, _ = prepared(comparison, dataset)
    return compare(read_pictures(path), reference, comparison, device)


def save_statistics(path: Path, comparison: Comparison, file: Path, device: torch.device) -> None:
    """Write the mean and covariance of the features of images to an .npz, a reference for later comparisons.

    Args:
        path: a folder of images, an .npz archive, or a run directory, whose training images are taken.
        comparison: whose features, layer and weights.
        file: the .npz.
        device: to compute on.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: no readable images, or invalid options.
        UserError: the data set of the run is missing.
    """
    check_writable(file, folder=False)
    comparison = dataclasses.replace(comparison, metrics=("fid",), reference=None)
    comparison, network = prepared(comparison, _dataset(path), caches=False)
    images = reference_images(path)
    found = feature_statistics(
        images, features=str(comparison.features), layer=comparison.layer, network=network, device=device
    )  # fmt: skip
    found.save(file)
    print(f"Mean and covariance of {len(found.mean)} features of {len(images):,} images: {file}")
    print(f"Compare a folder of images or a run with them: {command_line('evaluate', 'FOLDER', '--reference', file)}")


def reference_key(reference: Reference) -> str:
    """SHA-256 that is equal for equal references only."""
    return reference.key if isinstance(reference, FeatureStatistics) else content_key(reference)


def read_reference(path: Path, comparison: Comparison) -> Reference:
    """What --reference names."""
    if is_statistics(path):
        return read_statistics(path, comparison.features or "inception", comparison.layer)
    return reference_images(path)


def _dataset(path: Path) -> str | None:
    """Data set of a run; None of anything else."""
    return open_run(path).config.dataset if _is_run(path) else None


def reference_images(path: Path) -> Tensor:
    """Real images [N, C, H, W] uint8: the training images of a run directory, or all of a folder or an archive.

    Raises:
        ValueError: a run on latents.
    """
    if not _is_run(path):
        return read_pictures(path)
    run = open_run(path)
    if run.config.dataset == "latents":
        raise ValueError(f"{path}: {_NO_PICTURES}")
    return run.images().train[:]


def seed_sets(seeds: Sequence[int], repeats: int) -> list[list[int]]:
    """`repeats` disjoint sets of as many seeds: the seeds, and the seeds shifted past them once, twice, ..."""
    span = max(seeds) - min(seeds) + 1
    return [[seed + number * span for seed in seeds] for number in range(repeats)]


class Record:
    """metrics.json of an evaluated checkpoint, written anew after each set of images.

    `each` has the values of every set that was ever measured with the same settings. `repeats` is the number of sets
    that were asked for last; `metrics` are means over those of them that are measured so far, whose first seeds are
    `means_over`.

    Args:
        path: the file.
        settings: all that the values depend on, except for the seeds of each set.
        first_seeds: of the sets that are asked for.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], first_seeds: Sequence[int]) -> None:
        self.path, self.first_seeds = path, first_seeds
        self.settings = json.loads(json.dumps(settings))  # as it will be read
        self.each: dict[int, dict[str, float]] = {}  # first seed → values
        try:
            content = json.loads(path.read_text())
            if all(content[name] == value for name, value in self.settings.items()):
                self.each = {int(one["first_seed"]): dict(one["metrics"]) for one in content["each"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # none yet, or of another version: measured again

    def missing(self, metrics: Sequence[str], first_seed: int, comparison: Comparison) -> tuple[str, ...]:
        """Those of the metrics that the set of images with this first seed still lacks."""
        known = self.each.get(first_seed, {})
        features, layer = str(comparison.features), comparison.layer
        return tuple(metric for metric in metrics if result_name(metric, features, layer) not in known)

    def add(self, first_seed: int, values: Mapping[str, float]) -> None:
        """Add values of a set of images to those that are known of it, and write the file."""
        self.each[first_seed] = {**self.each.get(first_seed, {}), **values}
        content = {
            **self.settings,
            "metrics": self.means(),
            "repeats": len(self.first_seeds),
            "means_over": self.means_over(),
            "each": [{"first_seed": seed, "metrics": metrics} for seed, metrics in sorted(self.each.items())],
        }
        with replacing(self.path, durable=True) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n")

    def means_over(self) -> list[int]:
        """First seeds of the sets that were asked for and are measured."""
        return [seed for seed in self.first_seeds if seed in self.each]

    def means(self) -> dict[str, float]:
        """The values that all sets of `means_over` have, averaged over them."""
        sets = [self.each[seed] for seed in self.means_over()]
        names = [name for name in sets[0] if all(name in values for values in sets)]
        return {name: float(np.mean([values[name] for values in sets])) for name in names}


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").exists()
