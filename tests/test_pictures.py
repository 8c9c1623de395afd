"""vadiff.trainer.data.open_pictures: folders, zips and WebDataset shards, right and wrong."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch import Tensor

from vadiff.errors import DataError
from vadiff.trainer.data import Pictures, hold_out, open_pictures

SIZE = 8
NAMES = [f"{number % 3:05d}/img{number:08d}.png" for number in range(12)]


def png(number: int, size: tuple[int, int] = (SIZE, SIZE)) -> bytes:
    """A picture of random pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels_of(content: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(content)))).permute(2, 0, 1)


CONTENTS = {name: png(number) for number, name in enumerate(NAMES)}
EXPECTED = torch.stack([pixels_of(CONTENTS[name]) for name in sorted(NAMES)])
CLASSES = {name: (number * 7) % 10 for number, name in enumerate(NAMES)}
LISTED = {**CONTENTS, "dataset.json": json.dumps({"labels": list(CLASSES.items())}).encode()}


def folder(path: Path, contents: dict[str, bytes] = CONTENTS) -> Path:
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def zipped(path: Path, contents: dict[str, bytes] = CONTENTS, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def shards(path: Path) -> Path:
    """Three shards, with the classes in .cls files."""
    path.mkdir(exist_ok=True)
    for shard in range(3):
        contents: dict[str, bytes] = {}
        for number in range(4 * shard, 4 * shard + 4):
            contents[f"{number:04d}.png"] = CONTENTS[NAMES[number]]
            contents[f"{number:04d}.cls"] = str(CLASSES[NAMES[number]]).encode()
        tarred(path / f"train-{shard:03d}.tar", contents)
    return path


@pytest.mark.parametrize("make", [folder, lambda path, files: zipped(path.with_suffix(".zip"), files)])
def test_dataset_json_gives_the_classes(tmp_path: Path, make: Callable[..., Path]) -> None:
    found = open_pictures(make(tmp_path / "data", LISTED), SIZE, require_labels=True)
    assert torch.equal(found[:], EXPECTED)
    assert found.labels is not None
    assert found.labels.tolist() == [CLASSES[name] for name in sorted(NAMES)]
    assert found.classes == 10


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_without_dataset_json_has_its_folders_as_classes(tmp_path: Path, method: int) -> None:
    found = open_pictures(zipped(tmp_path / "data.zip", method=method), SIZE)
    assert torch.equal(found[:], EXPECTED)
    assert found.labels is not None
    assert found.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_shards_are_read_as_webdataset_reads_them(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=5, verbose=0) as writer:
        for number, name in enumerate(NAMES):
            writer.write({"__key__": f"{number:06d}", "png": CONTENTS[name], "json": {"label": number % 4}})
    found = open_pictures(tmp_path / "train-{000000..000002}.tar", SIZE, require_labels=True)
    theirs = list(webdataset.WebDataset(sorted(map(str, tmp_path.glob("*.tar"))), shardshuffle=False))
    assert len(theirs) == len(found) == len(NAMES)
    assert found.labels is not None
    assert found.labels.tolist() == [json.loads(sample["json"])["label"] for sample in theirs]
    assert torch.equal(found[:], torch.stack([pixels_of(sample["png"]) for sample in theirs]))
    assert found.groups is not None
    assert found.groups.tolist() == [0] * 5 + [1] * 5 + [2] * 2


def test_folder_of_shards_and_braces_are_the_same(tmp_path: Path) -> None:
    shards(tmp_path)
    one, other = open_pictures(tmp_path, SIZE), open_pictures(str(tmp_path / "train-{000..002}.tar"), SIZE)
    assert torch.equal(one[:], other[:])
    assert one.fingerprint == other.fingerprint
    assert one.labels is not None
    assert one.labels.tolist() == list(CLASSES.values())


def test_any_rows_can_be_read_in_any_order_and_parts_are_views(tmp_path: Path) -> None:
    found = open_pictures(shards(tmp_path), SIZE)
    rows = torch.tensor([7, 0, 11, 7])
    assert torch.equal(found[rows], found[:][rows])
    part = found.part(torch.tensor([5, 2, 9]))
    assert torch.equal(part[:], found[torch.tensor([5, 2, 9])])
    assert part.labels is not None
    assert found.labels is not None
    assert torch.equal(part.labels, found.labels[[5, 2, 9]])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_can_read(tmp_path: Path, method: str) -> None:
    found = open_pictures(zipped(tmp_path / "data.zip"), SIZE)
    first = found[:1]  # opens the archive
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_first, (found,)) == first.tolist()


def _first(pictures: Pictures) -> object:
    return pictures[:1].tolist()


def test_index_of_many_pictures_is_small(tmp_path: Path) -> None:
    contents = {f"a/{number:08d}.png": CONTENTS[NAMES[0]] for number in range(3000)}
    found = open_pictures(zipped(tmp_path / "many.zip", contents), SIZE)
    assert len(pickle.dumps(found)) < 100 * len(found)


def test_pictures_are_cut_square_and_scaled(tmp_path: Path) -> None:
    for number in range(6):
        for name, size, colour in (("red", (40, 20), (200, 0, 0)), ("blue/deeper", (8, 16), (0, 0, 200))):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, colour).save(tmp_path / name / f"{number}.png")
    images = hold_out(open_pictures(tmp_path, SIZE))
    assert images.shape == (3, SIZE, SIZE)
    assert (len(images.train), len(images.held_out), images.classes) == (11, 1, 2)
    assert images.train_labels is not None
    red = images.train_labels == 1  # after blue
    train = images.train[:].float().mean((2, 3))
    assert train[red].unique(dim=0).tolist() == [[200.0, 0.0, 0.0]]
    assert train[~red].unique(dim=0).tolist() == [[0.0, 0.0, 200.0]]


def test_pictures_in_no_folder_have_no_classes(tmp_path: Path) -> None:
    found = open_pictures(folder(tmp_path, {f"{number}.png": png(number) for number in range(3)}), SIZE)
    assert found.labels is None
    assert found.classes == 0
    with pytest.raises(DataError, match=r"has no classes: expected a folder for each class, or dataset\.json"):
        open_pictures(tmp_path, SIZE, require_labels=True)


def test_fingerprint_is_of_names_sizes_and_labels(tmp_path: Path) -> None:
    found = open_pictures(folder(tmp_path / "a"), SIZE).fingerprint
    assert open_pictures(folder(tmp_path / "b"), SIZE).fingerprint == found
    assert open_pictures(zipped(tmp_path / "c.zip"), SIZE).fingerprint == found
    assert open_pictures(folder(tmp_path / "d", LISTED), SIZE).fingerprint != found
    os.rename(tmp_path / "b" / NAMES[0], tmp_path / "b" / "00000" / "other.png")
    assert open_pictures(tmp_path / "b", SIZE).fingerprint != found


def test_broken_picture_is_named_or_replaced_by_the_next(tmp_path: Path) -> None:
    contents = {**CONTENTS, NAMES[3]: CONTENTS[NAMES[3]][:60], NAMES[6]: b"no picture"}
    path = zipped(tmp_path / "data.zip", contents)
    with pytest.raises(DataError, match=r"img00000003\.png in .*data\.zip cannot be read as a picture"):
        open_pictures(path, SIZE)[:]
    rows = torch.arange(len(NAMES))
    read = open_pictures(path, SIZE, on_bad_image="skip").read(rows)
    bad = sorted(sorted(NAMES).index(NAMES[number]) for number in (3, 6))
    assert (read.rows != rows).nonzero().flatten().tolist() == bad
    assert torch.equal(read.pixels, EXPECTED[read.rows])


def test_missing_labels_are_named_or_left_out(tmp_path: Path) -> None:
    labels = json.dumps({"labels": list(CLASSES.items())[:-2]}).encode()
    path = folder(tmp_path / "data", {**CONTENTS, "dataset.json": labels})
    with pytest.raises(DataError, match=r"2 pictures have no label, the first is .*img00000010\.png"):
        open_pictures(path, SIZE, require_labels=True)
    assert open_pictures(path, SIZE).labels is None
    found = open_pictures(path, SIZE, on_bad_image="skip", require_labels=True)
    assert (len(found), found.left_out) == (10, 2)


def test_truncated_shard_is_named_or_read_up_to_there(tmp_path: Path) -> None:
    path = shards(tmp_path) / "train-001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"train-001\.tar cannot be read as an uncompressed tar: unexpected end of"):
        open_pictures(tmp_path, SIZE)
    found = open_pictures(tmp_path, SIZE, on_bad_image="skip")
    assert 8 < len(found) < 12
    assert found.left_out > 0
    assert len(found[:]) == len(found)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            {"labels": [[NAMES[0], [0.5, 0.5]]]},
            r"the label of 00000/img0+\.png .* is \[0\.5, 0\.5\], expected the number",
        ),
        ({"labels": [[NAMES[0], -3]]}, r"is -3, expected the number of a class"),
        ({"labels": 3}, r"cannot be read: .*Expected {\"labels\""),
        ([1, 2], r"cannot be read"),
    ],
)
def test_labels_that_are_no_classes_are_an_error(tmp_path: Path, labels: object, message: str) -> None:
    path = folder(tmp_path, {**CONTENTS, "dataset.json": json.dumps(labels).encode()})
    with pytest.raises(DataError, match=message):
        open_pictures(path, SIZE)


def test_what_cannot_be_read_in_any_order_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected files on this machine"):
        open_pictures("https://example.org/{000..010}.tar", SIZE)
    with pytest.raises(DataError, match="has 0 pictures, expected two or more"):
        open_pictures(tmp_path, SIZE)
    with pytest.raises(DataError, match="does not exist; expected a folder of pictures"):
        open_pictures(tmp_path / "nowhere", SIZE)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.add(folder(tmp_path / "data"), "data")
    with pytest.raises(DataError, match=r"packed\.tar cannot be read as an uncompressed tar"):
        open_pictures(tmp_path / "packed.tar", SIZE)


def test_pictures_of_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    for number in range(2):
        Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040).save(tmp_path / f"{number}.png")
    expected = torch.from_numpy(np.arange(64) * 1040 / 257).round().view(8, 8)
    assert torch.equal(open_pictures(tmp_path, SIZE)[:1][0, 0].double(), expected)
