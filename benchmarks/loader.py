"""Speed of reading pictures from files: images per second of vadiff's reader beside torchvision's ImageFolder.

    python benchmarks/loader.py [--images FOLDER|FILE.npz] [--number 20000] [--workers 0 1 2] [--results FILE.json]

The same pictures are written as PNG files in folders, one for each class, as a zip of these, and as WebDataset shards
of 1,000. All are read once, in a shuffled order, with torch's DataLoader in batches of 128: `ImageFolder` with the
transform that does with square pictures what vadiff does (scaled by a Lanczos filter), and vadiff's `Pictures` as
`vadiff train --cache none` reads them, after a check that 100 pictures are the same in all. The kinds take turns;
printed is the median over rounds, with the start of the workers, and the slowest and fastest round; without workers
also the processor time of a picture, which other load on the machine disturbs less. Files are in the page cache: this
measures decoding and Python, not a disk.

--images: the official files of CIFAR-10, or an .npz with uint8 [N, H, H, 3] in it; without it pixels are random, which
PNG cannot compress, so that they take longer to read than photographs. --size scales to another size than they have.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import name_of
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from vadiff.extras import import_extra
from vadiff.trainer.data import Pictures, cifar, open_pictures
from vadiff.trainer.training.image_source import Rows
from vadiff.trainer.training.streams import Streams

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
from results import write_results

BATCH = 128
SHARD = 1000
CLASSES = 10
CHECKED = 100
TORCHVISION = "torchvision's ImageFolder"
KINDS = (TORCHVISION, "folder", "zip", "shards")


def pixels_of(source: Path | None, number: int) -> np.ndarray:
    """The pictures to write. uint8 [number, H, H, 3]"""
    if source is None:
        return np.random.default_rng(0).integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
    if source.suffix == ".npz":
        with np.load(source, allow_pickle=False) as file:
            found = file[file.files[0]]
    else:
        found = cifar.load("cifar10", source).train[:number].permute(0, 2, 3, 1).numpy()
    if found.dtype != np.uint8 or found.shape != (len(found), found.shape[1], found.shape[1], 3) or len(found) < number:
        raise SystemExit(f"{source} has {found.dtype} {found.shape}, expected uint8 [{number} or more, H, H, 3]")
    return found[:number]


def write(pictures: np.ndarray, folder: Path) -> dict[str, Path]:
    """The pictures as files, a zip and shards: kind → path."""
    paths = {"folder": folder / "files", "zip": folder / "pictures.zip", "shards": folder / "shards"}
    paths["shards"].mkdir(parents=True)
    with zipfile.ZipFile(paths["zip"], "w") as archive:
        for start in range(0, len(pictures), SHARD):
            with tarfile.open(paths["shards"] / f"{start // SHARD:06d}.tar", "w") as shard:
                for number in range(start, min(start + SHARD, len(pictures))):
                    encoded = io.BytesIO()
                    Image.fromarray(pictures[number]).save(encoded, "PNG")
                    name = f"{number % CLASSES:05d}/img{number:08d}.png"
                    (paths["folder"] / name).parent.mkdir(parents=True, exist_ok=True)
                    (paths["folder"] / name).write_bytes(encoded.getvalue())
                    archive.writestr(name, encoded.getvalue())
                    for extension, content in (("png", encoded.getvalue()), ("cls", b"%d" % (number % CLASSES))):
                        member = tarfile.TarInfo(f"{number:08d}.{extension}")
                        member.size = len(content)
                        shard.addfile(member, io.BytesIO(content))
    return paths


def image_folder(path: Path, size: int) -> Any:
    """torchvision's data set, which does to square pictures what vadiff does."""
    transforms = import_extra("torchvision.transforms", "eval")
    steps = [transforms.Resize(size, transforms.InterpolationMode.LANCZOS), transforms.PILToTensor()]
    return import_extra("torchvision.datasets", "eval").ImageFolder(str(path), transforms.Compose(steps))


def batches(samples: Any, workers: int, seed: int) -> Iterable[Tensor]:
    """One pass over all pictures, shuffled."""
    if not isinstance(samples, Pictures):
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(samples, BATCH, shuffle=True, num_workers=workers, generator=generator)
        return (pictures for pictures, _ in loader)
    streams = Streams(seed, seed, torch.device("cpu"))
    order = streams.order if samples.groups is None else streams.order_by_groups(samples.groups)
    rows = order(0, len(samples)).split(BATCH)
    return (loaded.stored for loaded in DataLoader(Rows(samples), batch_size=None, sampler=rows, num_workers=workers))


class Speed(NamedTuple):
    """Of one pass."""

    images_per_second: float
    microseconds: float  # of processor time of this process, for each picture


def speed(samples: Any, workers: int, seed: int) -> Speed:
    """Read all pictures once."""
    start, busy = time.perf_counter(), time.process_time()
    number = sum(len(batch) for batch in batches(samples, workers, seed))
    if number != len(samples):
        raise SystemExit(f"a pass has {number} of {len(samples)} pictures")
    return Speed(number / (time.perf_counter() - start), 1e6 * (time.process_time() - busy) / number)


def same_pixels(samples: dict[str, Any]) -> None:
    """Check that all kinds read the same pictures."""
    listed = samples[TORCHVISION]
    expected = {Path(listed.samples[row][0]).name[-12:]: listed[row][0] for row in range(CHECKED)}
    for kind in KINDS[1:]:
        pictures = samples[kind]
        rows = {pictures.name(row).split(" in ")[0][-12:]: row for row in range(len(pictures))}
        found = pictures[torch.tensor([rows[name] for name in expected])]
        if not torch.equal(found, torch.stack(list(expected.values()))):
            raise SystemExit(f"{kind}: other pixels than those of {TORCHVISION}")


def measured(samples: dict[str, Any], workers: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Images per second of each kind and number of workers."""
    cases = [(kind, number) for number in workers for kind in KINDS]
    found: dict[tuple[str, int], list[Speed]] = {case: [] for case in cases}
    with tqdm(total=rounds * len(cases), unit="pass", disable=None) as bar:
        for seed in range(rounds):
            for kind, number in cases[seed % len(cases) :] + cases[: seed % len(cases)]:
                found[kind, number].append(speed(samples[kind], number, seed))
                bar.update()
    for (kind, number), speeds in found.items():
        rates = [one.images_per_second for one in speeds]
        yield {
            "kind": kind,
            "workers": number,
            "images_per_second": statistics.median(rates),
            "slowest": min(rates),
            "fastest": max(rates),
            "processor_microseconds": None if number else statistics.median(one.microseconds for one in speeds),
        }


def table(found: Sequence[dict[str, Any]], workers: Sequence[int]) -> str:
    """Kinds in rows, workers in columns."""
    lines = ["| images/s | " + " | ".join(f"workers: {number}" for number in workers) + " |"]
    lines.append("| --- |" + " --- |" * len(workers))
    by_case = {(one["kind"], one["workers"]): one for one in found}
    for kind in KINDS:
        cells = [kind]
        for number in workers:
            one = by_case[kind, number]
            ratio = one["images_per_second"] / by_case[TORCHVISION, number]["images_per_second"]
            spread = f"{one['slowest']:,.0f} to {one['fastest']:,.0f}"
            busy = "" if number else f", {one['processor_microseconds']:.0f} µs each"
            cells.append(f"{one['images_per_second']:,.0f} ({spread}), {ratio:.2f} ×{busy}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, metavar="PATH")
    parser.add_argument("--number", type=int, default=20_000, help="pictures")
    parser.add_argument("--size", type=int, default=32, help="height and width that they are scaled to")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the workers' own number
    with tempfile.TemporaryDirectory() as temporary:
        paths = write(pixels_of(arguments.images, arguments.number), Path(temporary))
        samples, listing = {TORCHVISION: image_folder(paths["folder"], arguments.size)}, {}
        for kind, path in paths.items():
            start = time.perf_counter()
            samples[kind] = open_pictures(path, arguments.size, require_labels=True)
            listing[kind] = time.perf_counter() - start
        same_pixels(samples)
        found = list(measured(samples, arguments.workers, arguments.rounds))
    cpu = torch.device("cpu")
    print(f"{arguments.number:,} PNG files, {name_of(cpu)}, {os.cpu_count()} CPUs")
    print(table(found, arguments.workers))
    print("listing them: " + ", ".join(f"{kind} {seconds:.2g} s" for kind, seconds in listing.items()))
    if arguments.results is not None:
        figures = {
            "processor": name_of(cpu), "cpus": os.cpu_count(), "pictures": arguments.number, "size": arguments.size,
            "images": "random" if arguments.images is None else arguments.images.name, "batch": BATCH,
            "rounds": arguments.rounds, "listing_seconds": listing, "speeds": found,
        }  # fmt: skip
        write_results("loader", json.loads(json.dumps(figures)), arguments.results)


if __name__ == "__main__":
    main()
