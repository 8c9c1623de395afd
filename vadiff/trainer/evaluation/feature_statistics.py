"""Mean and covariance of features of real images, in place of the images: in files as NVlabs have them.

An .npz has mu [D] and sigma [D, D]; a .pkl has these for each of several metrics, {"fid": {"mu": ..., "sigma": ...},
"fd_dinov2": {...}}. They are enough for the Fréchet distance, and for no other metric.
"""

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...errors import DataError
from ...extras import import_extra
from ...files import replacing
from ..data.pickled_arrays import load_arrays
from .digits_classifier import FEATURES as DIGITS_FEATURES
from .extractors import DINOV2_FEATURES

_MOST_BYTES = 8 * 2048**2 + 2**16  # of an array in an .npz, unpacked
_METRIC = {"inception": "fid", "dinov2": "fd_dinov2", "digits": "fd_digits"}  # names in a .pkl


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of features.

    Args:
        mean: [D] float64.
        covariance: [D, D] float64.
        made_by: key of the network's weights; None where a file does not say.

    Attributes:
        key: equal for equal statistics only.
    """

    mean: np.ndarray
    covariance: np.ndarray
    made_by: str | None = None
    key: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.mean.tobytes() + self.covariance.tobytes())
        object.__setattr__(self, "key", digest.hexdigest())

    @classmethod
    def of(cls, features: Tensor, made_by: str | None = None) -> "FeatureStatistics":
        """Of features [N, D], N at least 2; computed in float64."""
        found = import_extra("torch_fidelity.metric_fid", "eval").fid_features_to_statistics(features.double().cpu())
        return cls(found["mu"], found["sigma"], made_by)

    def distance(self, other: "FeatureStatistics") -> float:
        """The Fréchet distance |μ - μ'|² + tr(Σ + Σ' - 2·(Σ·Σ')^½) of two normal distributions."""
        module = import_extra("torch_fidelity.metric_fid", "eval")
        one, two = ({"mu": each.mean, "sigma": each.covariance} for each in (self, other))
        return float(module.fid_statistics_to_metric(one, two, False)[module.KEY_METRIC_FID])

    def save(self, path: Path) -> None:
        """Write an .npz atomically, with mu and sigma, and the key of the network."""
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, mu=self.mean, sigma=self.covariance, made_by=np.array(self.made_by or ""))


def is_statistics(path: Path) -> bool:
    """Whether a file holds statistics, not images: a .pkl, or an .npz with mu and sigma."""
    if not path.is_file():
        return False
    if path.suffix == ".pkl":
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def read_statistics(path: Path, features: str = "inception", layer: str = "2048") -> FeatureStatistics:
    """The statistics in a file, of the features that a network gives.

    Args:
        path: an .npz or .pkl. Nothing in a .pkl is run: it may hold arrays and plain containers only.
        features: "inception", "dinov2" or "digits".
        layer: of Inception.

    Raises:
        DataError: it cannot be read, or holds something else; or the statistics are of other features.
    """
    content = _read_pickle(path, _METRIC[features]) if path.suffix == ".pkl" else _read_archive(path)
    expected = {"inception": int(layer), "dinov2": DINOV2_FEATURES, "digits": DIGITS_FEATURES}[features]
    arrays: list[np.ndarray] = []
    for name, shape in (("mu", (expected,)), ("sigma", (expected, expected))):
        array = content.get(name)
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            raise DataError(f"{path} has no array {name} of floating-point numbers, expected one of shape {shape}")
        if array.shape != shape:
            raise DataError(f"{name} in {path} has shape {array.shape}, expected {shape}: the features of {features}")
        if not np.isfinite(array).all():
            raise DataError(f"{name} in {path} is not finite")
        arrays.append(array.astype(np.float64))
    scale = np.abs(arrays[1]).max()
    if not np.allclose(arrays[1], arrays[1].T, rtol=1e-4, atol=1e-6 * scale):
        raise DataError(f"sigma in {path} is not symmetric, expected a covariance")
    if (lowest := np.linalg.eigvalsh(arrays[1])[0]) < -1e-4 * scale:
        raise DataError(
            f"sigma in {path} has the eigenvalue {lowest:.3g}, expected a covariance, which has none below 0"
        )
    made_by = content.get("made_by")
    return FeatureStatistics(arrays[0], arrays[1], None if made_by is None else str(made_by) or None)


def _read_archive(path: Path) -> Mapping[str, Any]:
    try:
        with zipfile.ZipFile(path) as members:
            if any(member.file_size > _MOST_BYTES for member in members.infolist()):
                raise ValueError(f"an array has more than {_MOST_BYTES:,} bytes")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in ("mu", "sigma", "made_by") if name in archive}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not an .npz archive with mu and sigma, or damaged: {error}") from error


def _read_pickle(path: Path, metric: str) -> Mapping[str, Any]:
    try:
        content = load_arrays(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # a broken pickle raises almost any kind
        raise DataError(f"{path} cannot be read as statistics: {error}. Nothing of it was run") from error
    if not isinstance(content, dict) or not isinstance(content.get(metric), dict):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path} has {found or 'nothing'}, expected {metric} with mu and sigma")
    statistics: dict[str, Any] = content[metric]
    return statistics
