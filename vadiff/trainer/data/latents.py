"""Data sets of latents, as `vadiff encode` writes them: memory-mapped shards, and their encoding."""

import dataclasses
import hashlib
import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..config_schema import LATENT_STD
from .autoencoder import Autoencoder, open_autoencoder
from .encoding import DRAWS_SEED
from .fixed_noise import fixed_noise
from .images import Images

FACTS, PLAN = "latents.json", "plan.json"  # of a finished data set; what an unfinished one is to become
TRAIN, MIRRORED, HELD_OUT = "train", "mirrored", "held-out"  # parts; mirrored: the training images once more
LABELS = "labels"
VERSION = 1  # of the layout
_LOADING = threading.Lock()  # a VAE is loaded once, whichever thread asks first


def shard_name(part: str, number: int) -> str:
    """File of shard 0, 1, ... of a part."""
    return f"{part}-{number:05d}.npy"


class LatentSamples:
    """Latents of one or more parts in their shards, read from memory-mapped files where they are asked for.

    Small when pickled: other processes open the files anew.

    Args:
        folder: of the data set.
        shards: (file name, latents in it), in their order.
        stored: (C, H, W) of one stored latent.
        dtype: "float16" or "float32".

    Raises:
        DataError: a shard is missing, truncated or another file.
    """

    def __init__(
        self, folder: Path, shards: Sequence[tuple[str, int]], stored: tuple[int, int, int], dtype: str
    ) -> None:
        self._folder, self._shards, self._stored, self._dtype = folder, list(shards), stored, dtype
        self._starts = np.cumsum([0, *(number for _, number in shards)])
        self._opened: dict[int, np.ndarray] = {}
        for index in range(len(self._shards)):
            self._shard(index)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (int(self._starts[-1]), *self._stored)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self._dtype)
        return found

    @property
    def groups(self) -> Tensor:
        """The shard of each latent, int64 [N]."""
        return torch.from_numpy(np.repeat(np.arange(len(self._shards)), np.diff(self._starts)))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """The latents of some rows, [n, C, H, W], as they are stored, in memory."""
        chosen = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows.cpu().numpy()
        if len(chosen) and not (-len(self) <= chosen.min() and chosen.max() < len(self)):
            raise IndexError(f"rows are {chosen.min()} to {chosen.max()}, expected below {len(self)}")
        chosen = np.where(chosen < 0, chosen + len(self), chosen)
        found = np.empty((len(chosen), *self._stored), self._dtype)
        shard_of = np.searchsorted(self._starts, chosen, side="right") - 1
        for index in np.unique(shard_of).tolist():
            here = shard_of == index
            found[here] = self._shard(index)[chosen[here] - self._starts[index]]
        return torch.from_numpy(found)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}

    def _shard(self, index: int) -> np.ndarray:
        if index not in self._opened:
            name, number = self._shards[index]
            self._opened[index] = _open_array(self._folder / name, (number, *self._stored), self._dtype)
        return self._opened[index]


@dataclass(frozen=True)
class LatentEncoding:
    """Latents standardised per channel to mean 0 and standard deviation 0.5, and drawn anew where they are moments.

    x0 = 0.5·(z - mean) / std, with z as stored, or z = mu + exp(log-variance / 2)·noise from its moments (EDM2, arXiv
    2312.02696, standardises so).

    Args:
        random: whether mean and log-variance are stored, one after the other along the channels.
        mean, std: of the drawn latents of the training images, per channel.
        latent_shape: (C, H, W) of x0.
        pictures_of: (C, H, W) of the decoded pictures.
        vae: folder of the VAE that decodes.
        vae_fingerprint: of the VAE that encoded, see `Autoencoder`.
    """

    random: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    latent_shape: tuple[int, int, int]
    pictures_of: tuple[int, int, int]
    vae: str
    vae_fingerprint: str
    _scales: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _vaes: dict[torch.device, Autoencoder] = field(default_factory=dict, init=False, repr=False, compare=False)

    def shape(self, stored: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of x0, for a stored latent of the given shape."""
        channels, height, width = stored
        return (channels // 2 if self.random else channels, height, width)

    def picture_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the picture of x0 of the given shape."""
        return self.pictures_of

    def inputs(self, stored: Tensor, noise: Tensor | None = None) -> Tensor:
        """x0 [n, C, H, W] float32 of stored latents on any device, see `Encoding.inputs`.

        Without noise, the draws of the first n latents do not depend on the number of latents.
        """
        mean, scale = self._scale_on(stored.device)
        if not self.random:
            return (stored.float() - mean) * scale
        centre, log_variance = stored.chunk(2, dim=1)
        drawn = fixed_noise(centre.shape, DRAWS_SEED).to(stored.device) if noise is None else noise
        spread = log_variance.float().mul(0.5).exp_()
        return (centre.float() + spread * drawn - mean) * scale

    def pictures(self, x0: Tensor) -> Tensor:
        """Decode x0 [n, C, H, W] on its device. Bytes [n, 1 or 3, H', W']

        The first call loads the VAE, see `decoder`.
        """
        mean, scale = self._scale_on(x0.device)
        return self.decoder(x0.device).pictures(x0.float() / scale + mean)

    def decoder(self, device: torch.device) -> Autoencoder:
        """The VAE on a device, which is loaded once.

        Raises:
            DataError: it is not at its path, or is another one than that which encoded.
        """
        with _LOADING:
            if device not in self._vaes:
                found = open_autoencoder(self.vae, device)
                if found.fingerprint != self.vae_fingerprint:
                    raise DataError(
                        f"vae is {self.vae}, of fingerprint {found.fingerprint}, expected {self.vae_fingerprint}, that "
                        "of the VAE that encoded these latents: another one draws other pictures. Give it with --vae"
                    )
                self._vaes[device] = found
            return self._vaes[device]

    def with_vae(self, path: Path | str) -> "LatentEncoding":
        """The same encoding with the VAE in another folder."""
        return dataclasses.replace(self, vae=str(Path(path).resolve()))

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.init}

    @classmethod
    def of_dict(cls, content: Mapping[str, Any]) -> "LatentEncoding":
        """What `as_dict` gave, read from JSON.

        Raises:
            KeyError, TypeError, ValueError: something else.
        """
        mean, std = (tuple(float(number) for number in content[name]) for name in ("mean", "std"))
        shape, pictures_of = (_shape_of(content[name]) for name in ("latent_shape", "pictures_of"))
        if not len(mean) == len(std) == shape[0]:
            raise ValueError(f"{len(mean)} means and {len(std)} deviations for latents of shape {shape}")
        if not all(map(math.isfinite, mean)) or not all(0.0 < one < math.inf for one in std):
            raise ValueError(f"means {mean} and deviations {std} are not finite, or not positive")
        return cls(
            bool(content["random"]), mean, std, shape, pictures_of, str(content["vae"]), str(content["vae_fingerprint"])
        )

    def _scale_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and 0.5 / std, [C, 1, 1] float32. Kept: a copy from the host would wait for the device at every step."""
        if device not in self._scales:
            mean, std = (torch.tensor(numbers, dtype=torch.float64).view(-1, 1, 1) for numbers in (self.mean, self.std))
            self._scales[device] = (mean.float().to(device), (LATENT_STD / std).float().to(device))
        return self._scales[device]


class LatentFacts(NamedTuple):
    """What latents.json says."""

    parts: dict[str, list[int]]  # latents in each shard
    dtype: str
    classes: int
    held_out_is_test: bool
    encoding: LatentEncoding

    @property
    def stored(self) -> tuple[int, int, int]:
        """(C, H, W) of a stored latent."""
        channels, height, width = self.encoding.latent_shape
        return (2 * channels if self.encoding.random else channels, height, width)

    def samples(self, folder: Path, *parts: str) -> LatentSamples:
        """The latents of some parts; those that the data set does not have are left out."""
        shards = [(shard_name(part, i), n) for part in parts for i, n in enumerate(self.parts.get(part, []))]
        return LatentSamples(folder, shards, self.stored, self.dtype)


def read_facts(folder: Path) -> LatentFacts:
    """The facts of a finished data set of latents.

    Raises:
        DataError: not such a folder, an unfinished one, or a damaged file.
    """
    path = folder / FACTS
    if not path.is_file():
        if (folder / PLAN).is_file():
            raise DataError(
                f"{folder} is not finished: run the same `vadiff encode` again, it goes on where it stopped"
            )
        what = f"has no {FACTS}" if folder.is_dir() else "is not a folder"
        raise DataError(f"data is {folder}, which {what}; expected a folder that `vadiff encode` wrote")
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            raise ValueError(f"version is {content['version']}, expected {VERSION}: a later vadiff wrote it")
        parts = {str(name): [int(number) for number in numbers] for name, numbers in content["parts"].items()}
        dtype = str(content["dtype"])
        if dtype not in ("float16", "float32"):
            raise ValueError(f"dtype is {dtype!r}")
        encoding = LatentEncoding.of_dict(content["encoding"])
        return LatentFacts(parts, dtype, int(content["classes"]), bool(content["held_out_is_test"]), encoding)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read: {error!r}. Encode the data set again") from error


def open_latents(path: Path | str) -> Images:
    """The latents in a folder, read from memory-mapped files as they are asked for.

    Returns:
        Images whose `train` and `held_out` are the stored numbers, [N, C, H, W] float16 or float32, or [N, 2·C, H, W]
        where mean and log-variance are stored; the held-out images are those of the data set that was encoded.

    Raises:
        DataError: not such a folder, an unfinished one, or a shard that is missing or damaged.
    """
    folder = Path(path)
    facts = read_facts(folder)
    train = facts.samples(folder, TRAIN, MIRRORED)
    held_out = facts.samples(folder, HELD_OUT)
    labels: list[Tensor | None] = [None, None]
    if facts.classes:
        labels = [_read_labels(folder, part, len(one)) for part, one in ((TRAIN, train), (HELD_OUT, held_out))]
    return Images(
        train, labels[0], held_out, labels[1], facts.held_out_is_test, facts.classes, facts.encoding,
        groups=train.groups, fingerprint=_fingerprint(folder / FACTS),
    )  # fmt: skip


def _shape_of(sizes: Sequence[Any]) -> tuple[int, int, int]:
    channels, height, width = (int(size) for size in sizes)
    return channels, height, width


def _fingerprint(path: Path) -> str:
    """Of the facts without the paths in them: equal for copies of a data set on other machines."""
    content = json.loads(path.read_text())
    content["encoding"].pop("vae")
    content["source"].pop("data", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _read_labels(folder: Path, part: str, number: int) -> Tensor:
    return torch.from_numpy(np.array(_open_array(folder / f"{part}-{LABELS}.npy", (number,), "int64")))


def _open_array(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A memory-mapped array of this shape and dtype.

    Raises:
        DataError: there is none."""
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}. Remove it and encode again, or copy it anew") from error
    if found.shape != shape or found.dtype != dtype:
        raise DataError(
            f"{path} holds {found.dtype} {found.shape}, expected {dtype} {shape}: it is of another data set. Remove it "
            "and encode again, or copy it anew"
        )
    return found
