"""Fréchet distance, KID, Inception score, precision and recall, all through torch-fidelity.

Images are compared by features of a network: Inception, which published figures are of; DINOv2; or for scikit-learn's
digits a small classifier of theirs.
"""

import hashlib
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...extras import import_extra
from ...files import sha256_of
from ..progress import progress_bar
from . import digits_classifier
from .extractors import DINOV2_WEIGHTS, LAYER_OF, register
from .feature_statistics import FeatureStatistics
from .inception_weights import PUBLISHED_SHA256, PUBLISHED_WEIGHTS, download_weights, read_weights

METRICS = ("fid", "kid", "isc", "prc")
LAYERS = ("64", "192", "768", "2048")
FEATURES = ("inception", "digits", "dinov2")

# Blocks that a feature layer needs in addition to those of earlier layers; the Inception score needs all, and fc.
_BLOCKS = {
    "64": ("Conv2d_1", "Conv2d_2"),
    "192": ("Conv2d_3", "Conv2d_4"),
    "768": ("Mixed_5", "Mixed_6"),
    "2048": ("Mixed_7",),
}
_KEYS = {
    "frechet_inception_distance": "fid",
    "kernel_inception_distance_mean": "kid",
    "kernel_inception_distance_std": "kid_std",
    "inception_score_mean": "isc",
    "inception_score_std": "isc_std",
    "precision": "precision",
    "recall": "recall",
}


class FeatureNetwork(NamedTuple):
    """A network that is ready to compute features."""

    weights: Path | None  # its file; None for the Inception weights that torch-fidelity downloads
    key: str  # of its weights: figures of different keys cannot be compared


def features_for(dataset: str) -> str:
    """The features that images of a data set are compared by: "digits" for the digits, else "inception"."""
    return "digits" if dataset == "digits" else "inception"


def result_name(metric: str, features: str, layer: str) -> str:
    """Name of a value in results: "fid" of Inception's layer 2048, "fid-768" of another layer, "fd-digits" and
    "fd-dinov2" of other features; of "prc", which has two values, the first."""
    metric = "precision" if metric == "prc" else metric
    if features != "inception":
        return f"{'fd' if metric == 'fid' else metric}-{features}"
    return metric if layer == "2048" or metric.startswith("isc") else f"{metric}-{layer}"


def find_network(
    features: str,
    *,
    inception_weights: Path | None = None,
    dinov2_weights: Path | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> FeatureNetwork:
    """Find the network's weights; download Inception's, or train the digits classifier, if this machine has none yet.

    Commands call it before they draw images, so that a missing file costs no hours.

    Args:
        features: one of `FEATURES`.
        inception_weights: file of torch-fidelity's Inception weights; None is that in torch's hub folder.
        dinov2_weights: file of the weights of DINOv2's ViT-L/14, for these features.
        cache: folder of the digits classifier; None is `cache_folder()`.
        progress: show a bar while downloading.

    Raises:
        ValueError: unknown features, or weights that are given but missing or not of this network.
        MissingExtraError: torch-fidelity (or scikit-learn, for the digits) is not installed.
        UserError: the weights could not be downloaded.
    """
    if features not in FEATURES:
        raise ValueError(f"features is {features!r}, expected one of {', '.join(FEATURES)}")
    import_extra("torch_fidelity", "eval")
    if (dinov2_weights is None) == (features == "dinov2"):
        given = "none are" if dinov2_weights is None else f"{dinov2_weights} is"
        raise ValueError(f"features is {features}, but {given} given as dinov2_weights: {DINOV2_WEIGHTS} is for dinov2")
    if dinov2_weights is not None:
        return FeatureNetwork(dinov2_weights, weights_key(dinov2_weights))
    if features == "digits":
        if inception_weights is not None:
            raise ValueError(f"inception_weights is {inception_weights}, but features is digits: give one of the two")
        found = digits_classifier.trained_classifier(cache_folder() if cache is None else cache)
        return FeatureNetwork(found.path, found.key)
    if inception_weights is not None:
        read_weights(inception_weights)
    else:
        download_weights(progress)
    return FeatureNetwork(inception_weights, weights_key(inception_weights))


def image_metrics(
    images: Tensor,
    reference: Tensor | FeatureStatistics | None,
    *,
    metrics: Sequence[str] = ("fid", "kid", "prc"),
    features: str = "inception",
    layer: str = "2048",
    inception_weights: Path | None = None,
    dinov2_weights: Path | None = None,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, float]:
    """Compare generated images with real ones by the features of a network.

    The features of the reference are cached on disk under the SHA-256 of its pixels and of the network's weights, so
    that replaced, renamed or copied files never get another file's features.

    Args:
        images: generated, [N, C, H, W] uint8, C 1 or 3; grey becomes RGB for Inception.
        reference: real images, [M, C, H, W] uint8, or for "fid" the statistics of their features; may be None for "isc"
            alone.
        metrics: of "fid" (Fréchet distance of the features), "kid", "isc" (Inception score) and "prc" (precision and
            recall).
        features: "inception"; or "digits", the 32 features of a small classifier of scikit-learn's digits, for images
            [N, 1, 8, 8], without "isc"; or "dinov2", the features of ViT-L/14, without "isc".
        layer: Inception features for FID, KID, precision and recall: "64", "192", "768" or "2048" (the usual one).
        inception_weights: file of torch-fidelity's Inception weights; None lets torch-fidelity download them.
        dinov2_weights: file of the weights of DINOv2's ViT-L/14, for these features.
        cache: folder for the features of references and for the digits classifier; None is `cache_folder()`.
        device: "cpu" or a CUDA device.
        batch_size: images at a time in the network.
        progress: show a progress bar of the features.

    Returns:
        name → value: fid, kid and kid_std (over its random subsets), isc and isc_std, precision, recall. Where the
        layer is not the usual 2048 it is part of the name, as in fid-768, and so are other features, as in fd-digits:
        such numbers are not comparable with published FID. isc is skipped, with a warning, if the last layers of the
        weights file are non-finite.

    Raises:
        ValueError: invalid images, metric, features, layer or weights, or too few images.
        MissingExtraError: torch-fidelity is not installed.
        UserError: the weights could not be downloaded.
    """
    check_metrics(metrics, features, layer)
    check_images(images, reference, metrics, features)
    network = find_network(
        features, inception_weights=inception_weights, dinov2_weights=dinov2_weights, cache=cache, progress=progress
    )
    possible = within_reach(metrics, layer, inception_weights)
    if len(possible) < len(metrics):
        warnings.warn(f"isc is skipped: {inception_weights} is not finite up to the last layer", stacklevel=2)
    metrics = possible
    device = torch.device(device)
    number = len(images) if not isinstance(reference, Tensor) else min(len(images), len(reference))
    layer_name = LAYER_OF.get(features, layer)
    options = {
        **_extraction(images, features, network, device, batch_size, progress),
        **{f"feature_layer_{name}": layer_name for name in ("fid", "kid", "prc")},
        "kid_subset_size": min(1000, number),
    }
    values: dict[str, float] = {}
    if isinstance(reference, FeatureStatistics):
        if reference.made_by not in (None, network.key):
            raise ValueError(
                f"reference is of the network {reference.made_by}, expected {network.key}: of the weights that the "
                "images are compared by"
            )
        with _current(device):
            found = _statistics(options, layer_name, network)
        values[result_name("fid", features, layer)] = found.distance(reference)
        metrics = tuple(name for name in metrics if name != "fid")
    if isinstance(reference, Tensor) and set(metrics) != {"isc"}:
        options["input2"] = _Pixels(reference, "features of real images" if progress else None)
        options["input2_cache_name"] = f"{content_key(reference)}-{network.key}"
        options["cache_root"] = str(cache_folder() if cache is None else cache)
    if metrics:
        options |= {name: name in metrics for name in METRICS}
        with _current(device):
            measured = import_extra("torch_fidelity", "eval").calculate_metrics(**options)
        named = {result_name(name, features, layer): key for key, name in _KEYS.items() if key in measured}
        values |= {name: float(measured[key]) for name, key in named.items()}
    _check_finite(values)
    return values


def feature_statistics(
    images: Tensor,
    *,
    features: str,
    layer: str,
    network: FeatureNetwork,
    device: torch.device,
    batch_size: int = 64,
    progress: bool = True,
) -> FeatureStatistics:
    """Mean and covariance of the features of images [N, C, H, W] uint8, for `image_metrics`; see there.

    Raises:
        ValueError: invalid images.
    """
    check_images(images, None, ("isc",), features)
    options = _extraction(images, features, network, device, batch_size, progress)
    with _current(device):
        return _statistics(options, LAYER_OF.get(features, layer), network)


def _extraction(
    images: Tensor, features: str, network: FeatureNetwork, device: torch.device, batch_size: int, progress: bool
) -> dict[str, Any]:
    """Options of torch-fidelity: whose features, and how they are computed."""
    return {
        "input1": _Pixels(images, "features" if progress else None),
        "feature_extractor": register(features),
        "feature_extractor_weights_path": None if network.weights is None else str(network.weights),
        "cuda": device.type == "cuda",
        "batch_size": batch_size,
        "save_cpu_ram": True,  # no worker processes for images that are in memory already
        "verbose": False,
    }


def _statistics(options: Mapping[str, Any], layer: str, network: FeatureNetwork) -> FeatureStatistics:
    """Of the first input of torch-fidelity's options."""
    module = import_extra("torch_fidelity.utils", "eval")
    extractor = module.create_feature_extractor(options["feature_extractor"], [layer], **options)
    features = module.extract_featuresdict_from_input_id(1, extractor, **options)[layer]
    return FeatureStatistics.of(features, network.key)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device the current one, which torch-fidelity computes on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_metrics(metrics: Sequence[str], features: str, layer: str) -> None:
    """Raise unless these metrics exist for these features.

    Raises:
        ValueError: an unknown or impossible option; the message names it.
    """
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics has {name!r}, expected of {', '.join(METRICS)}")
    if not metrics:
        raise ValueError(f"metrics is empty, expected some of {', '.join(METRICS)}")
    if features not in FEATURES:
        raise ValueError(f"features is {features!r}, expected one of {', '.join(FEATURES)}")
    if layer not in LAYERS:
        raise ValueError(f"layer is {layer!r}, expected one of {', '.join(LAYERS)}")
    if features != "inception":
        if "isc" in metrics:
            raise ValueError(f"metrics has isc, the Inception score, but features is {features}: leave it out")
        if layer != "2048":
            raise ValueError(
                f"layer is {layer!r}, but features is {features}, which has one layer: leave it out, or take inception"
            )


def within_reach(metrics: Sequence[str], layer: str, weights: Path | None) -> tuple[str, ...]:
    """The metrics that a weights file can give: all but "isc" if its last layers are non-finite.

    Raises:
        ValueError: the file cannot give any, is missing, or holds something else.
    """
    if weights is None or not metrics:
        return tuple(metrics)
    broken = {name.split(".")[0] for name, value in read_weights(weights).items() if not bool(value.isfinite().all())}
    needed = tuple(block for part in LAYERS[: LAYERS.index(layer) + 1] for block in _BLOCKS[part])
    if set(metrics) != {"isc"} and (missing := sorted(name for name in broken if name.startswith(needed))):
        raise ValueError(
            f"layer is {layer}, but inception_weights {weights} are not finite in {', '.join(missing)}: give a lower "
            f"layer, or {PUBLISHED_WEIGHTS} of torch-fidelity"
        )
    possible = tuple(name for name in metrics if name != "isc" or not broken)
    if not possible:
        raise ValueError(
            f"metrics is isc, which needs the last layer, but inception_weights {weights} are not finite in "
            f"{', '.join(sorted(broken))}: give {PUBLISHED_WEIGHTS} of torch-fidelity"
        )
    return possible


def weights_key(path: Path | None) -> str:
    """Identifier of a weights file: first digits of its SHA-256; "published" for torch-fidelity's Inception."""
    digest = PUBLISHED_SHA256 if path is None else sha256_of(path)
    return "published" if digest.startswith(PUBLISHED_SHA256) else digest[:16]


def content_key(images: Tensor) -> str:
    """SHA-256 over shape and pixels."""
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    digest.update(images.contiguous().cpu().numpy().data)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Folder for features of real images and the digits classifier.

    vadiff/features in the user's cache folder ($XDG_CACHE_HOME).
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vadiff" / "features"


class _Pixels(torch.utils.data.Dataset[Tensor]):
    """Images as torch-fidelity reads them: [3, H, W] uint8; a progress bar, if it has a name, counts those it read."""

    def __init__(self, images: Tensor, what: str | None) -> None:
        self.images, self.what = images.cpu(), what
        self._bar: Any = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self.images[index]
        if index == 1:  # it looks at number 0, and reads all in their order, at least five
            self._bar = progress_bar(len(self), self.what or "", "image", initial=1, shown=self.what is not None)
        if index > 0:
            self._bar.update()
        if index == len(self) - 1:
            self._bar.close()
        return image.expand(3, -1, -1)


def check_images(
    images: Tensor, reference: Tensor | FeatureStatistics | None, metrics: Sequence[str], features: str
) -> None:
    """Raise unless these images can be compared.

    Raises:
        ValueError: wrong shape or dtype, too few, or images and reference of different sizes.
    """
    if reference is None and set(metrics) != {"isc"}:
        raise ValueError("reference is None, expected real images: only isc needs none")
    if isinstance(reference, FeatureStatistics) and not set(metrics) <= {"fid", "isc"}:
        raise ValueError(f"metrics is {', '.join(metrics)}, expected fid or isc: reference is statistics, not images")
    for name, pixels in (("images", images), ("reference", reference)):
        if not isinstance(pixels, Tensor):
            continue
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] not in (1, 3):
            raise ValueError(f"{name} is {tuple(pixels.shape)} {pixels.dtype}, expected [N, 1 or 3, H, W] uint8")
        if len(pixels) < 5:
            raise ValueError(f"{name} has {len(pixels)} images, expected at least 5 (thousands for meaningful figures)")
        if features == "digits" and tuple(pixels.shape[1:]) != digits_classifier.SHAPE:
            raise ValueError(
                f"{name} is {tuple(pixels.shape)}, expected [N, 1, 8, 8] with features digits: grey images of 8 x 8"
            )
    if isinstance(reference, Tensor) and images.shape[2:] != reference.shape[2:]:
        raise ValueError(
            f"images have {images.shape[3]} x {images.shape[2]} pixels, the reference {reference.shape[3]} x "
            f"{reference.shape[2]}: resize neither by hand, compare images of one size"
        )


def _check_finite(values: Mapping[str, float]) -> None:
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise ValueError(f"{', '.join(broken)} came out not finite: there are too few images")
