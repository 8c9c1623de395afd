"""Encodes a data set with a VAE into shards of latents, which `latents.open_latents` reads."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ...files import locked, replacing
from .autoencoder import Autoencoder
from .encoding import Samples
from .images import Images
from .latents import (
    FACTS,
    HELD_OUT,
    LABELS,
    MIRRORED,
    PLAN,
    TRAIN,
    VERSION,
    LatentEncoding,
    LatentFacts,
    LatentSamples,
    read_facts,
    shard_name,
)
from .pictures import Pictures

_LIMITS = {"float16": 65504.0, "float32": float("inf")}
DTYPES = tuple(_LIMITS)
_AT_ONCE = 1024  # latents whose statistics are summed at once


@dataclass(frozen=True)
class EncodingOptions:
    """How a data set is encoded.

    Args:
        samples: store one latent drawn for each image, in place of mean and log-variance.
        mirrored: store the mirrored training images too.
        dtype: of the stored numbers, "float16" or "float32".
        shard: latents per file.
        seed: of what is drawn with `samples`.
        batch_size: images at a time in the VAE.
        workers: processes that read pictures ahead; 0 reads in this one.

    Raises:
        ValueError: an option out of bounds.
    """

    samples: bool = False
    mirrored: bool = False
    dtype: str = "float16"
    shard: int = 8192
    seed: int = 0
    batch_size: int = 64
    workers: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        for name, least in (("shard", 1), ("batch_size", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")


class _Part(NamedTuple):
    """Images of the source that become a part of the data set of latents."""

    name: str
    images: Samples
    mirrored: bool = False

    def shards(self, size: int) -> list[int]:
        """Latents in each shard."""
        return [min(size, len(self.images) - start) for start in range(0, len(self.images), size)]


def encode_images(
    images: Images,
    vae: Autoencoder,
    vae_path: Path,
    out: Path,
    options: EncodingOptions,
    *,
    source: Mapping[str, Any] | None = None,
    on_images: Callable[[int, bool], object] = lambda number, encoded: None,
) -> LatentFacts:
    """Encode training and held-out images, and write shards, labels and statistics to a folder.

    Shards are written one after the other, each atomically. A further call with the same arguments keeps those that
    are there, and goes on with the others; the facts, without which the folder cannot be opened, are written last.
    Mean and standard deviation are those of the stored latents of the training images, per channel; of drawn ones, var
    = var(mean) + mean(exp(log-variance)), where mean and log-variance are stored.

    Args:
        images: pictures, as bytes.
        vae: encodes them.
        vae_path: where it is from, noted for who decodes.
        out: the folder.
        options: what is stored, and how.
        source: notes on the data set; its entry "data" is not compared where a call goes on.
        on_images: called with a number of images and whether they were encoded now, or are there from an earlier call.

    Raises:
        DataError: the VAE takes other images; latents are not finite or too large for float16; a picture cannot be
            read; or `out` holds something else, or latents of other arguments.
    """
    train, held_out = _without_replacement(images.train), _without_replacement(images.held_out)
    parts = [_Part(TRAIN, train), _Part(HELD_OUT, held_out)]
    if options.mirrored:
        parts.insert(1, _Part(MIRRORED, train, mirrored=True))
    channels, height, width = images.train.shape[1:]
    latent = vae.latent_shape((channels, height, width))
    plan: dict[str, Any] = {
        "version": VERSION,
        "parts": {part.name: part.shards(options.shard) for part in parts},
        "dtype": options.dtype,
        "classes": images.classes,
        "held_out_is_test": images.held_out_is_test,
        "seed": options.seed if options.samples else None,
        "encoding": {
            "random": not options.samples, "latent_shape": latent, "pictures_of": [channels, height, width],
            "vae": str(vae_path.resolve()), "vae_fingerprint": vae.fingerprint,
        },
        "source": {**(source or {}), "fingerprint": _fingerprint(images)},
    }  # fmt: skip
    plan = json.loads(json.dumps(plan))
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock"):
        _begin(out, plan)
        _write_shards(parts, vae, out, options, plan, on_images)
        for part, labels in ((TRAIN, images.train_labels), (HELD_OUT, images.held_out_labels)):
            if labels is not None:
                labels = torch.cat([labels, labels]) if options.mirrored and part == TRAIN else labels
                _save(out / f"{part}-{LABELS}.npy", labels.numpy())
        if not (out / FACTS).exists():
            plan["encoding"] |= _statistics(out, plan)
            with replacing(out / FACTS, durable=True) as partial:
                partial.write_text(json.dumps(plan, indent=1) + "\n")
    return read_facts(out)


def going_on(out: Path) -> str:
    """What is kept when encoding stops, and how it goes on."""
    return f"the files that are whole are kept in {out}: the same command encodes the others"


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or check that the folder was begun with the same."""
    path = out / PLAN
    if not path.exists():
        if any(entry.name != ".lock" and not entry.name.startswith(PLAN) for entry in out.iterdir()):
            raise DataError(f"{out} is not empty, and holds no latents: name another folder with --out")
        with replacing(path, durable=True) as partial:
            partial.write_text(json.dumps(plan, indent=1) + "\n")
        return
    try:
        begun, now = _comparable(json.loads(path.read_text())), _comparable(plan)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read: {error!r}. Remove {out}, or name another folder with --out") from error
    different = [f"{name} was {begun.get(name)}, is {value}" for name, value in now.items() if begun.get(name) != value]
    if different:
        raise DataError(
            f"{out} holds latents of other arguments: {'; '.join(different)}. Name another folder with --out, or "
            "remove it"
        )


def _comparable(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same in all calls that write to a folder, in one mapping."""
    encoding = {name: value for name, value in plan["encoding"].items() if name != "vae"}
    source = {f"source's {name}": value for name, value in plan["source"].items() if name != "data"}
    shards = {f"shards of {name}": sum(sizes) for name, sizes in plan["parts"].items()}
    sizes = {"latents per shard": max((size for sizes in plan["parts"].values() for size in sizes), default=0)}
    others = {name: plan[name] for name in ("version", "dtype", "classes", "held_out_is_test", "seed")}
    return {**encoding, **source, **shards, **sizes, **others}


def _write_shards(
    parts: list[_Part],
    vae: Autoencoder,
    out: Path,
    options: EncodingOptions,
    plan: Mapping[str, Any],
    on_images: Callable[[int, bool], object],
) -> None:
    """Encode the shards that are not there yet."""
    missing = []  # (part, number of the shard, its images)
    for part in parts:
        for number, size in enumerate(plan["parts"][part.name]):
            if not (out / shard_name(part.name, number)).exists():
                missing.append((part, number, range(number * options.shard, number * options.shard + size)))
            else:
                on_images(size, False)
    batches = _pictures([(part, rows) for part, _, rows in missing], options)
    for part, number, rows in missing:
        generator = torch.Generator().manual_seed(_seed_of(options.seed, part.name, number))
        found, done = [], 0
        while done < len(rows):
            pictures = next(batches)
            latents = vae.moments(pictures).cpu()
            if options.samples:
                centre, log_variance = latents.chunk(2, dim=1)
                latents = centre + log_variance.mul(0.5).exp_() * torch.randn(centre.shape, generator=generator)
            found.append(_checked(latents, options.dtype, f"{part.name} image", rows.start + done))
            done += len(pictures)
            on_images(len(pictures), True)
        _save(out / shard_name(part.name, number), np.concatenate(found))


def _without_replacement(images: Samples) -> Samples:
    """Images that are never read in place of others: their latents would have the labels of those."""
    return replace(images, on_bad_image="error") if isinstance(images, Pictures) else images


class _Batches(torch.utils.data.Dataset[Tensor | DataError]):
    """Batches of the images of some ranges, for torch's DataLoader. Errors are returned, without a traceback."""

    def __init__(self, ranges: list[tuple[_Part, range]], size: int) -> None:
        self._batches = [
            (part, rows[start : start + size]) for part, rows in ranges for start in range(0, len(rows), size)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Tensor | DataError:
        part, rows = self._batches[index]
        try:
            pictures = part.images[rows.start : rows.stop]
        except DataError as error:
            return error
        return pictures.flip(-1) if part.mirrored else pictures


def _pictures(ranges: list[tuple[_Part, range]], options: EncodingOptions) -> Iterator[Tensor]:
    """The images of some ranges in batches, read ahead by workers; a batch is of one range.

    Raises:
        DataError: a picture cannot be read."""
    batches = _Batches(ranges, options.batch_size)
    for read in torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False, num_workers=options.workers):
        if isinstance(read, DataError):
            raise read
        yield read


def _checked(latents: Tensor, dtype: str, what: str, first: int) -> np.ndarray:
    """The latents in the dtype of the file.

    Raises:
        DataError: some are not finite, or beyond it; names the first such image."""
    largest = latents.abs().flatten(1).amax(1)  # NaN where a number is
    if not bool((largest <= _LIMITS[dtype]).all()):
        row = int((~(largest <= _LIMITS[dtype])).nonzero()[0])
        if not bool(largest[row].isfinite()):
            raise DataError(f"latents of {what} {first + row} are not finite: the VAE overflows, or is damaged")
        raise DataError(
            f"latents of {what} {first + row} reach {float(largest[row]):.3g}, above {_LIMITS[dtype]:g}, the largest "
            f"{dtype}: give --dtype float32"
        )
    numbers: np.ndarray = latents.numpy().astype(dtype)
    return numbers


def _statistics(out: Path, plan: Mapping[str, Any]) -> dict[str, list[float]]:
    """Mean and standard deviation per channel of the drawn latents of the training images, as they are stored.

    Two passes over the files: sums of squared deviations, not differences of large sums.

    Raises:
        DataError: a channel is constant."""
    channels, height, width = plan["encoding"]["latent_shape"]
    unknown = {"mean": [0.0] * channels, "std": [1.0] * channels}
    encoding = LatentEncoding.of_dict({**plan["encoding"], **unknown})
    samples = LatentFacts(plan["parts"], plan["dtype"], 0, False, encoding).samples(out, TRAIN, MIRRORED)
    number = len(samples) * height * width
    mean, squares = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    for part in _in_float64(samples):
        mean += part[:, :channels].sum((0, 2, 3)) / number
    for part in _in_float64(samples):
        squares += (part[:, :channels] - mean.view(-1, 1, 1)).square().sum((0, 2, 3))
        squares += part[:, channels:].exp().sum((0, 2, 3)) if encoding.random else 0.0
    std = (squares / number).sqrt()
    if not bool((std > 0.0).all()):
        raise DataError(
            f"channel {int((std == 0.0).nonzero()[0])} of the latents is the same everywhere: the VAE is untrained or "
            "damaged, or all pictures are the same"
        )
    return {"mean": mean.tolist(), "std": std.tolist()}


def _in_float64(samples: LatentSamples) -> Iterator[Tensor]:
    for start in range(0, len(samples), _AT_ONCE):
        yield samples[start : start + _AT_ONCE].double()


def _fingerprint(images: Images) -> str:
    """Of images and labels; of files, the data set's own."""
    if images.fingerprint:
        return images.fingerprint
    digest = hashlib.sha256()
    for tensor in (images.train[:], images.train_labels, images.held_out[:], images.held_out_labels):
        if tensor is not None:
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _seed_of(seed: int, part: str, shard: int) -> int:
    key = (seed, (TRAIN, MIRRORED, HELD_OUT).index(part), shard)
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 2)


class _OnlyWrites:
    """A file that NumPy writes to by Python's write, whose errors say why, and not by C's, whose do not."""

    def __init__(self, file: IO[bytes]) -> None:
        self.write = file.write


def _save(path: Path, array: np.ndarray) -> None:
    with replacing(path, durable=True) as partial, partial.open("wb") as file:
        np.save(_OnlyWrites(file), array)
