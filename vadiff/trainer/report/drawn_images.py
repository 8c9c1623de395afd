"""Images of a run for the comparison with real ones: drawn, and kept as they come."""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...sampling.generation import Generation, generate
from ...sampling.seeds import seeds_text
from ..pictures import PictureWriter, read_labels, read_note, read_pictures
from ..progress import progress_bar
from ..training import Run, Stopped
from ..training.stopping import stoppable


def draw_images(run: Run, seeds: Sequence[int], generation: Generation) -> Tensor:
    """One image per seed, in their order, with a progress bar. [len(seeds), C, H, W] uint8"""
    return _in_order(seeds, [*_batches(run, seeds, generation)]).images


def kept_images(run: Run, seeds: Sequence[int], generation: Generation, folder: Path) -> Tensor:
    """The images of `draw_images`, kept in a folder as images-<first seed>.npz.

    Read from there if an earlier call drew them with the same options, drawn and written otherwise. Until all are
    drawn, each batch is kept in a file of its own in images-<first seed>.parts: after a kill, only what is missing is
    drawn.
    """
    file, parts = folder / f"images-{seeds[0]}.npz", folder / f"images-{seeds[0]}.parts"
    how: dict[str, Any] = {**generation.recorded(), "step": generation.step}
    note = json.dumps({**how, "seeds": [*seeds]})
    if read_note(file) == note:
        images = read_pictures(file)
        print(f"{len(images):,} images drawn before: {file}")
        return images
    batches = _read_parts(parts, json.loads(json.dumps(how)))
    known = {seed for batch in batches for seed in batch.seeds}
    missing = [seed for seed in seeds if seed not in known]
    if known:
        print(f"{len(seeds) - len(missing):,} of {len(seeds):,} images drawn before: {parts}")
    for batch in _batches(run, missing, generation):
        _write(parts / f"{batch.seeds[0]}.npz", batch, json.dumps({**how, "seeds": batch.seeds}))
        batches.append(batch)
    drawn = _in_order(seeds, batches)
    _write(file, drawn, note)
    shutil.rmtree(parts, ignore_errors=True)
    return drawn.images


@contextmanager
def drawn_so_far_kept(writer: PictureWriter) -> Iterator[None]:
    """Keep the images that were drawn before a signal or an error, and say where, and how to draw the others.

    Raises:
        Stopped: SIGTERM or SIGINT.
    """

    def kept() -> str:
        folder = writer.keep()
        if folder is None:
            return "no image was drawn yet"
        missing = [seed for place, seed in enumerate(writer.seeds) if place not in writer.written]
        return (
            f"{len(writer.written):,} of {len(writer.seeds):,} images are in {folder}; the same command draws the "
            f"others with another --out and, in place of --images and --first-seed, --seeds {seeds_text(missing)}"
        )

    try:
        with stoppable(kept):
            yield
    except Exception as error:
        if writer.written and not isinstance(error, Stopped):
            with suppress(OSError):  # the disk that is full
                print(f"vadiff: {kept()}", file=sys.stderr)
        raise


class _Batch(NamedTuple):
    seeds: list[int]
    images: Tensor  # [B, C, H, W] uint8
    labels: Tensor | None  # [B] int64


def _batches(run: Run, seeds: Sequence[int], generation: Generation) -> Iterator[_Batch]:
    """Draw one image per seed, with a progress bar."""
    with progress_bar(len(seeds), "drawing", "image") as bar:
        for start, images, labels in generate(run, seeds, generation) if seeds else ():
            yield _Batch([*seeds[start : start + len(images)]], images, labels)
            bar.update(len(images))


def _in_order(seeds: Sequence[int], batches: Sequence[_Batch]) -> _Batch:
    """Those of the batches' images that have these seeds, in their order."""
    place = {seed: place for place, seed in enumerate(seed for batch in batches for seed in batch.seeds)}
    order = torch.tensor([place[seed] for seed in seeds])
    labels = [batch.labels for batch in batches if batch.labels is not None]
    images = torch.cat([batch.images for batch in batches])
    return _Batch([*seeds], images[order], torch.cat(labels)[order] if labels else None)


def _write(file: Path, batch: _Batch, note: str) -> None:
    file.unlink(missing_ok=True)  # drawn with other options, or damaged
    channels, height, width = batch.images.shape[1:]
    with PictureWriter(file, batch.seeds, (channels, height, width), batch.labels is not None, note) as writer:
        writer.write(0, batch.images, batch.labels)


def _read_parts(folder: Path, how: dict[str, Any]) -> list[_Batch]:
    """The batches in a folder that were drawn like this; files of others are removed."""
    batches = []
    for file in sorted(folder.glob("*.npz")):
        try:
            note = json.loads(read_note(file) or "{}")
            seeds = note.pop("seeds", [])
            if note == how:
                batches.append(_Batch(seeds, read_pictures(file), read_labels(file)))
                continue
        except ValueError:  # damaged
            pass
        file.unlink()
    return batches
