"""Run directories of imported networks: a config, a checkpoint without a training's state, and snapshots."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...ema.snapshots import Snapshot, write_snapshot
from ...errors import DataError
from ...files import check_writable, replacing, sha256_of
from ..config import TrainConfig
from ..training import run_folder
from ..training.assembly import build_denoiser
from ..training.averages import SNAPSHOTS
from ..training.checkpoint import save_checkpoint
from ..training.run import CONFIG, IMPORTED
from ..training.run_encoding import keep_encoding
from .edm2 import ImportedNetwork, converted
from .latents import latent_encoding
from .pickled_modules import read_module

_NETWORK = "ema"  # in the mapping of a file
# Thousands of images seen, and the width of the average, as in network-snapshot-0008388-0.050.pkl.
_NAME = re.compile(r"-(\d{7,})(?:-(0?\.\d+))?\.pkl")
_RGB, _LATENT = 3, 4  # channels of pictures, of latents of Stable Diffusion's VAE
_STAGED = ".import"  # folder in the run directory that is written first


class Import(NamedTuple):
    """What was imported."""

    config: TrainConfig
    network: ImportedNetwork  # of the checkpoint
    step: int  # of the checkpoint
    source: Path  # file of the checkpoint's network
    snapshots: int


def import_networks(
    files: Sequence[Path],
    out: Path,
    *,
    data: str | None = None,
    vae: Path | None = None,
    batch_size: int = 2048,
    overwrite: bool = False,
) -> Import:
    """Write a run directory of EDM2 networks in NVlabs' files, for sampling and evaluation.

    The network of the latest file (of the largest width, if several are of that time) becomes the checkpoint, as "ema"
    and as "raw". Of several files each becomes part of a snapshot, from which `vadiff ema` makes averages of any width.
    Nothing of the files is run, see `pickled_modules`.

    Args:
        files: a network, or snapshots of one training, with thousands of images and width in their names.
        out: the run directory.
        data: path of the images or latents that the network was trained on, for measurements on them.
        vae: folder of the VAE that decodes the latents of a network that draws latents, for sampling.
        batch_size: images per step of that training, by which images become steps.
        overwrite: replace a run in `out`.

    Raises:
        DataError: a file cannot be read, is of another network, or does not fit the other files; or the VAE cannot be
            read, or does not fit the network.
        OSError: `out` cannot be written.
        RunError: `out` holds a run already, or is a file.
        CheckpointError: a file cannot be written.
    """
    check_writable(out, folder=True)
    named = sorted((_named(path, batch_size, several=len(files) > 1) for path in files), key=lambda file: file[:2])
    for earlier, later in itertools.pairwise(named):
        if earlier[:2] == later[:2]:
            raise DataError(f"{earlier.path} and {later.path} are of the same time and width: give one of them")
    last = named[-1]
    network = _read(last.path)
    widths = tuple(sorted({file.width for file in named})) if len(named) > 1 else ()
    config = _config(network, last.step, data, batch_size, widths)
    _check_shapes(network, config, last.path)
    encoding = None if vae is None else latent_encoding(network.image_shape, vae)
    moved_in_part = (out / _STAGED / CONFIG).exists() and not (out / CONFIG).exists()  # by a call that was killed
    if not moved_in_part:
        run_folder.check_free(out, overwrite=overwrite)
    sums = {file.path.name: sha256_of(file.path) for file in named}
    weights = network.state()
    state = {
        "step": last.step,
        "image_shape": list(network.image_shape),
        "classes": network.classes,
        "model": weights,
        "ema": weights,
    }
    out.mkdir(parents=True, exist_ok=True)
    with run_folder.lock(out):
        if (out / _STAGED).exists():
            shutil.rmtree(out / _STAGED)
        with replacing(out / _STAGED) as staged:
            staged.mkdir()
            if widths:
                run = hashlib.sha256("".join(sums.values()).encode()).hexdigest()[:32]  # equal for the same files
                _write_snapshots(staged / SNAPSHOTS, named, network, run)
            save_checkpoint(staged, last.step, state, keep=1)
            (staged / IMPORTED).write_text(json.dumps({"files": sums}, indent=1) + "\n")
            if encoding is not None:
                keep_encoding(encoding, staged)
            config.save(staged / CONFIG)
        run_folder.clear(out)
        for entry in sorted((out / _STAGED).iterdir(), key=lambda entry: entry.name == CONFIG):
            entry.rename(out / entry.name)  # the config last: without it the folder is no run
        (out / _STAGED).rmdir()
    return Import(config, network, last.step, last.path, len({file.step for file in named}) if widths else 0)


class _File(NamedTuple):
    step: int
    width: float  # of the average; 0 if its name has none
    path: Path


def _named(path: Path, batch_size: int, *, several: bool) -> _File:
    """Step and width in the name of a file.

    The name has whole thousands of images: the step is the first one with as many images or more.
    """
    match = _NAME.search(path.name)
    if several and (match is None or match[2] is None):
        raise DataError(
            f"{path} has no time and width in its name, expected one like network-snapshot-0008388-0.050.pkl where "
            "several files are given"
        )
    if match is None:
        return _File(0, 0.0, path)
    return _File(math.ceil(1000 * int(match[1]) / batch_size), float(match[2] or 0.0), path)


def _read(path: Path) -> ImportedNetwork:
    module = read_module(path, _NETWORK)
    try:
        return converted(module)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (LookupError, RuntimeError, ValueError) as error:
        raise DataError(f"{path}: a tensor has an unexpected shape: {error}") from error


def _config(
    network: ImportedNetwork, step: int, data: str | None, batch_size: int, sigma_rel: tuple[float, ...]
) -> TrainConfig:
    """What is known of the training; fields that a file does not tell have their defaults."""
    channels, height, _ = network.image_shape
    if channels not in (_RGB, _LATENT):
        raise DataError(f"the network draws images of {channels} channels, expected {_RGB}, or {_LATENT} of latents")
    return TrainConfig(
        dataset="images" if channels == _RGB else "latents",
        data=data,
        image_size=height,
        image_channels=channels,
        sigma_data=network.sigma_data,
        weighting="learned",
        model="edm2",
        channels=network.channels,
        layers_per_block=network.layers_per_block,
        attention_resolutions=network.attention_resolutions,
        class_conditional=network.classes > 0,
        label_dropout=0.0,
        steps=max(step, 1),
        batch_size=batch_size,
        sigma_rel=sigma_rel,
    )


def _check_shapes(network: ImportedNetwork, config: TrainConfig, path: Path) -> None:
    """Raise unless the weights are those of the network that the config describes."""
    with torch.device("meta"):
        expected = build_denoiser(config, network.image_shape, network.classes).state_dict()
    for name, value in (network.parameters | network.buffers).items():
        if name not in expected:
            raise DataError(f"{path}: {name} has no place in vadiff's network of {_sizes(config)}")
        if value.shape != expected[name].shape:
            raise DataError(
                f"{path}: {name} has shape {tuple(value.shape)}, expected {tuple(expected[name].shape)} in a network "
                f"of {_sizes(config)}"
            )
    if missing := sorted(expected.keys() - network.parameters.keys() - network.buffers.keys()):
        raise DataError(f"{path}: the file has nothing for {missing[0]} in a network of {_sizes(config)}")


def _sizes(config: TrainConfig) -> str:
    return f"channels {config.channels}, {config.layers_per_block} blocks per resolution"


def _write_snapshots(folder: Path, files: Sequence[_File], like: ImportedNetwork, run: str) -> None:
    """One snapshot for each time, of the widths that there are of it."""
    for step in sorted({file.step for file in files}):
        parts = [file for file in files if file.step == step]
        averages: list[dict[str, Tensor]] = []
        for file in parts:
            network = _read(file.path)
            if not network.is_like(like):
                raise DataError(f"{file.path} is of another network than {files[-1].path}")
            averages.append(network.parameters)
        half = all(value.dtype == torch.float16 for average in averages for value in average.values())
        snapshot = Snapshot(run, float(step), tuple(file.width for file in parts), averages, dict(like.buffers))
        write_snapshot(folder, snapshot, "fp16" if half else "fp32")
