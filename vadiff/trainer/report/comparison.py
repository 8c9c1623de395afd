"""Comparison of generated images with real ones: preparation, drawing, measuring, and the record of the results."""

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

from ...files import replacing
from ...sampling.generation import Generation, generate
from ..evaluation import image_metrics
from ..evaluation.fidelity import (
    FeatureNetwork,
    check_images,
    check_metrics,
    features_for,
    find_network,
    result_name,
    within_reach,
)
from ..pictures import PictureWriter, read_note, read_pictures
from ..training import Run, open_run
from ..training.progress import progress_bar


@dataclass(frozen=True)
class Comparison:
    """Options of the comparison with real images; see `evaluation.image_metrics`.

    Args:
        metrics: of "fid", "kid", "isc", "prc"; empty for no comparison.
        reference: real images: a folder, an .npz archive or a run directory; None is the run's training images.
        features: "inception" or "digits"; None chooses by the data set.
        layer: of the Inception network.
        inception_weights: file of that network's weights; None downloads them.
        cache: folder for the features of references and for the digits classifier; None is the user's cache.
    """

    metrics: Sequence[str] = ("fid", "kid", "prc")
    reference: Path | None = None
    features: str | None = None
    layer: str = "2048"
    inception_weights: Path | None = None
    cache: Path | None = None


def prepared(comparison: Comparison, dataset: str | None) -> tuple[Comparison, FeatureNetwork]:
    """Choose the features, and find, download or train their network: before images are drawn.

    Args:
        comparison: some options.
        dataset: that the images imitate; None if unknown.

    Returns:
        The comparison with its features set and without metrics that the weights cannot give, which is printed; and the
        network.

    Raises:
        ValueError: options that do not go together, or weights that are missing or cannot give the metrics.
        UserError: the weights could not be downloaded.
        MissingExtraError: torch-fidelity is not installed.
    """
    features = comparison.features or (features_for(dataset) if dataset is not None else "inception")
    check_metrics(comparison.metrics, features, comparison.layer)
    possible = within_reach(comparison.metrics, comparison.layer, comparison.inception_weights)
    network = find_network(
        features,
        inception_weights=comparison.inception_weights,
        cache=comparison.cache,
        progress=sys.stderr.isatty(),
    )
    if len(possible) < len(comparison.metrics):
        print(f"isc (Inception score) is skipped: {comparison.inception_weights} is not finite up to the last layer")
    return dataclasses.replace(comparison, features=features, metrics=possible), network


def check_drawn(shape: tuple[int, int, int], number: int, reference: Tensor, comparison: Comparison) -> None:
    """Raise unless images [number, *shape], yet to be drawn, can be compared with the reference.

    Raises:
        ValueError: they cannot; the message says why.
    """
    images = torch.zeros(1, *shape, dtype=torch.uint8).expand(number, -1, -1, -1)
    check_images(images, reference, comparison.metrics, comparison.features or "inception")


def compare(images: Tensor, reference: Tensor | None, comparison: Comparison, device: torch.device) -> dict[str, float]:
    """The metrics by name, which includes the features unless they are the usual ones; also printed."""
    features = comparison.features or "inception"
    values = image_metrics(
        images,
        reference,
        metrics=comparison.metrics,
        features=features,
        layer=comparison.layer,
        inception_weights=comparison.inception_weights,
        cache=comparison.cache,
        device=device,
        progress=sys.stderr.isatty(),
    )
    against = "" if reference is None else f" against {len(reference):,} real ones"
    by = "features of the digits classifier" if features == "digits" else f"Inception layer {comparison.layer}"
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
        reference = reference_images(comparison.reference)
        dataset = open_run(comparison.reference).config.dataset if _is_run(comparison.reference) else None
    comparison, _ = prepared(comparison, dataset)
    return compare(read_pictures(path), reference, comparison, device)


def reference_images(path: Path) -> Tensor:
    """Real images [N, C, H, W] uint8: the training images of a run directory, or all of a folder or an archive."""
    return open_run(path).images().train if _is_run(path) else read_pictures(path)


def draw_images(run: Run, seeds: Sequence[int], generation: Generation) -> Tensor:
    """One image per seed, in their order, with a progress bar. [len(seeds), C, H, W] uint8"""
    return _drawn(run, seeds, generation)[0]


def kept_images(run: Run, seeds: Sequence[int], generation: Generation, folder: Path) -> Tensor:
    """The images of `draw_images`, kept in a folder as images-<first seed>.npz.

    Read from there if an earlier call drew them with the same options, drawn and written otherwise.
    """
    file = folder / f"images-{seeds[0]}.npz"
    note = json.dumps({**generation.recorded(), "step": generation.step, "seeds": [*seeds]})
    if read_note(file) == note:
        images = read_pictures(file)
        print(f"{len(images):,} images drawn before: {file}")
        return images
    images, labels = _drawn(run, seeds, generation)
    file.unlink(missing_ok=True)  # drawn with other options
    _, channels, height, width = images.shape
    with PictureWriter(file, seeds, (channels, height, width), labels is not None, note) as writer:
        writer.write(0, images, labels)
    return images


def seed_sets(seeds: Sequence[int], repeats: int) -> list[list[int]]:
    """`repeats` disjoint sets of as many seeds: the seeds, and the seeds shifted past them once, twice, ..."""
    span = max(seeds) - min(seeds) + 1
    return [[seed + number * span for seed in seeds] for number in range(repeats)]


class Record:
    """metrics.json of an evaluated checkpoint, written anew after each set of images.

    Values that an earlier call measured with the same settings are kept. `metrics` are means over the sets measured so
    far, `repeats` their number and `each` the values of each.

    Args:
        path: the file.
        settings: all that the values depend on, except for the seeds of each set.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))  # as it will be read
        self._known: dict[int, dict[str, float]] = {}
        self.each: dict[int, dict[str, float]] = {}  # first seed → values
        try:
            content = json.loads(path.read_text())
            if all(content[name] == value for name, value in self.settings.items()):
                self._known = {int(one["first_seed"]): dict(one["metrics"]) for one in content["each"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # none yet, or of another version: measured again

    def missing(self, metrics: Sequence[str], first_seed: int, comparison: Comparison) -> tuple[str, ...]:
        """Those of the metrics that the set of images with this first seed still lacks."""
        known = self._known.get(first_seed, {})
        features, layer = str(comparison.features), comparison.layer
        return tuple(metric for metric in metrics if result_name(metric, features, layer) not in known)

    def add(self, first_seed: int, values: Mapping[str, float]) -> None:
        """Add values of a set of images to those that are known of it, and write the file."""
        self.each[first_seed] = {**self._known.get(first_seed, {}), **values}
        each = [{"first_seed": seed, "metrics": metrics} for seed, metrics in self.each.items()]
        content = {**self.settings, "metrics": self.means(), "repeats": len(each), "each": each}
        with replacing(self.path, durable=True) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n")

    def means(self) -> dict[str, float]:
        """The values that all sets have, averaged over them."""
        first, *others = self.each.values()
        names = [name for name in first if all(name in values for values in others)]
        return {name: float(np.mean([values[name] for values in self.each.values()])) for name in names}


def _drawn(run: Run, seeds: Sequence[int], generation: Generation) -> tuple[Tensor, Tensor | None]:
    """Images and labels, in the order of the seeds."""
    batches = {}
    with progress_bar(len(seeds), "drawing", "image") as bar:
        for batch in generate(run, seeds, generation):
            batches[batch.start] = batch
            bar.update(len(batch.images))
    ordered = [batches[start] for start in sorted(batches)]
    labels = [batch.labels for batch in ordered if batch.labels is not None]
    return torch.cat([batch.images for batch in ordered]), torch.cat(labels) if labels else None


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").exists()
