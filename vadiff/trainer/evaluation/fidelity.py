"""FID, KID, Inception score, precision and recall, all through torch-fidelity."""

import hashlib
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...extras import import_extra

METRICS = ("fid", "kid", "isc", "prc")
LAYERS = ("64", "192", "768", "2048")
EXTRACTOR = "inception-v3-compat"
PUBLISHED_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"

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


def image_metrics(
    images: Tensor,
    reference: Tensor | None,
    *,
    metrics: Sequence[str] = ("fid", "kid", "prc"),
    layer: str = "2048",
    inception_weights: Path | None = None,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, float]:
    """Compare generated images with real ones by the features of an Inception network.

    The features of the reference are cached on disk under the SHA-256 of its pixels and of the network's weights, so
    that replaced, renamed or copied files never get another file's features.

    Args:
        images: generated, [N, C, H, W] uint8, C 1 or 3; grey becomes RGB.
        reference: real images, [M, C, H, W] uint8; may be None for "isc" alone.
        metrics: of "fid", "kid", "isc" (Inception score) and "prc" (precision and recall).
        layer: Inception features for FID, KID, precision and recall: "64", "192", "768" or "2048" (the usual one).
        inception_weights: file of torch-fidelity's Inception weights; None lets torch-fidelity download them.
        cache: folder for the features of references; None is `cache_folder()`.
        device: "cpu" or a CUDA device.
        batch_size: images at a time in the Inception network.
        progress: show torch-fidelity's progress bars.

    Returns:
        name → value: fid, kid and kid_std (over its random subsets), isc and isc_std, precision, recall. Where the
        layer is not the usual 2048 it is part of the name, as in fid-768: such numbers are not comparable with
        published ones. isc is skipped, with a warning, if the last layers of the weights file are non-finite.

    Raises:
        ValueError: invalid images, metric, layer or weights, or too few images.
        MissingExtraError: torch-fidelity is not installed.
        UserError: the weights could not be downloaded.
    """
    _check(images, reference, metrics, layer)
    torch_fidelity = import_extra("torch_fidelity", "eval")
    possible = within_reach(metrics, layer, inception_weights)
    if len(possible) < len(metrics):
        warnings.warn(f"isc is skipped: {inception_weights} is not finite up to the last layer", stacklevel=2)
    metrics = possible
    device = torch.device(device)
    number = len(images) if reference is None else min(len(images), len(reference))
    options = {
        "input1": _Pixels(images),
        "feature_extractor": EXTRACTOR,
        "feature_extractor_weights_path": None if inception_weights is None else str(inception_weights),
        **{f"feature_layer_{name}": layer for name in ("fid", "kid", "prc")},
        **{name: name in metrics for name in METRICS},
        "kid_subset_size": min(1000, number),
        "cuda": device.type == "cuda",
        "batch_size": batch_size,
        "save_cpu_ram": True,  # no worker processes for images that are in memory already
        "verbose": progress,
    }
    if reference is not None and set(metrics) != {"isc"}:
        options["input2"] = _Pixels(reference)
        options["input2_cache_name"] = f"{content_key(reference)}-{weights_key(inception_weights)}"
        options["cache_root"] = str(cache_folder() if cache is None else cache)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            found = torch_fidelity.calculate_metrics(**options)
    except OSError as error:  # URLError is one
        if inception_weights is not None:
            raise
        raise UserError(
            f"the Inception weights could not be downloaded ({error}). Pass --inception-weights PATH with "
            f"{PUBLISHED_WEIGHTS} from the releases of torch-fidelity on GitHub"
        ) from error
    suffix = "" if layer == "2048" else f"-{layer}"
    values = {
        name + ("" if name.startswith("isc") else suffix): float(found[key])
        for key, name in _KEYS.items()
        if key in found
    }
    _check_finite(values, layer, inception_weights)
    return values


def within_reach(metrics: Sequence[str], layer: str, weights: Path | None) -> tuple[str, ...]:
    """The metrics that a weights file can give: all but "isc" if its last layers are non-finite.

    Raises:
        ValueError: the file cannot give any, is missing, or holds something else.
    """
    if weights is None or not metrics:
        return tuple(metrics)
    broken = {name.split(".")[0] for name, value in _read_weights(weights).items() if not bool(value.isfinite().all())}
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
    """Identifier of a weights file: first digits of its SHA-256; "published" for torch-fidelity's download."""
    return "published" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def content_key(images: Tensor) -> str:
    """SHA-256 over shape and pixels."""
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    digest.update(images.contiguous().cpu().numpy().data)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Folder for features of reference images: vadiff/features in the user's cache folder ($XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vadiff" / "features"


class _Pixels(torch.utils.data.Dataset[Tensor]):
    """Images as torch-fidelity reads them: [3, H, W] uint8."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.cpu()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self.images[index]
        return image.expand(3, -1, -1)


def _check(images: Tensor, reference: Tensor | None, metrics: Sequence[str], layer: str) -> None:
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics has {name!r}, expected of {', '.join(METRICS)}")
    if not metrics:
        raise ValueError(f"metrics is empty, expected some of {', '.join(METRICS)}")
    if layer not in LAYERS:
        raise ValueError(f"layer is {layer!r}, expected one of {', '.join(LAYERS)}")
    if reference is None and set(metrics) != {"isc"}:
        raise ValueError("reference is None, expected real images: only isc needs none")
    for name, pixels in (("images", images), ("reference", reference)):
        if pixels is None:
            continue
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] not in (1, 3):
            raise ValueError(f"{name} is {tuple(pixels.shape)} {pixels.dtype}, expected [N, 1 or 3, H, W] uint8")
        if len(pixels) < 5:
            raise ValueError(f"{name} has {len(pixels)} images, expected at least 5 (thousands for meaningful figures)")
    if reference is not None and images.shape[2:] != reference.shape[2:]:
        raise ValueError(
            f"images have {images.shape[3]} x {images.shape[2]} pixels, the reference {reference.shape[3]} x "
            f"{reference.shape[2]}: resize neither by hand, compare images of one size"
        )


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, read with weights_only: torch-fidelity's own load could run code from it."""
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"inception_weights is {path}, but there is no such file") from None
    except Exception as error:
        raise ValueError(
            f"inception_weights is {path}, which does not load as plain tensors ({error}); expected "
            f"{PUBLISHED_WEIGHTS} of torch-fidelity"
        ) from error
    if not isinstance(state, Mapping) or "Conv2d_1a_3x3.conv.weight" not in state:
        raise ValueError(f"inception_weights is {path}, which holds no weights of torch-fidelity's Inception network")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _check_finite(values: Mapping[str, float], layer: str, weights: Path | None) -> None:
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise ValueError(
            f"{', '.join(broken)} came out not finite at layer {layer} with {weights or 'the published weights'}: "
            "there are too few images"
        )
