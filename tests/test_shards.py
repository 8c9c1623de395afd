"""WebDataset shards: damaged ones, labels, names, and the list of pictures that is kept."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from test_pictures import CLASSES, CONTENTS, EXPECTED, NAMES, SIZE, png, shards, tarred

from vadiff.errors import DataError
from vadiff.trainer.data import index_shards, open_pictures

HEADER = 512  # bytes before each member's content


def ends(path: Path) -> list[int]:
    """The byte at which each member of a tar begins, and the one after the last."""
    with tarfile.open(path) as archive:
        return [member.offset for member in archive] + [archive.offset]


@pytest.mark.parametrize("where", ["content", "header", "between members"])
def test_shard_that_is_cut_off_is_named_or_read_up_to_there(tmp_path: Path, where: str) -> None:
    path = shards(tmp_path) / "train-001.tar"
    start = ends(path)[4]  # of the third picture
    cut = start + {"content": HEADER + 100, "header": 100, "between members": 0}[where]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"train-001\.tar cannot be read as an uncompressed tar: .*skip"):
        open_pictures(tmp_path, SIZE)
    found = open_pictures(tmp_path, SIZE, on_bad_image="skip")
    assert [found.name(row).split(" ")[0] for row in range(len(found))] == [
        f"{number:04d}.png" for number in range(12) if number not in (6, 7)
    ]
    assert len(found[:]) == len(found)
    assert found.left_out == 1  # the shard


def test_damaged_header_in_a_shard_is_not_taken_for_its_end(tmp_path: Path) -> None:
    path = shards(tmp_path) / "train-000.tar"
    content = bytearray(path.read_bytes())
    content[ends(path)[4]] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-000\.tar .*no file and no end mark at byte"):
        open_pictures(tmp_path, SIZE)
    assert len(open_pictures(tmp_path, SIZE, on_bad_image="skip")) == 10


@pytest.mark.parametrize("size", [2**62, -(2**40)])
def test_size_that_a_shard_cannot_have_is_an_error(tmp_path: Path, size: int) -> None:
    path = shards(tmp_path) / "train-002.tar"
    content = bytearray(path.read_bytes())
    member = tarfile.TarInfo("0008.png")
    member.size = abs(size)
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        header[124:136] = b"\xff" + size.to_bytes(11, "big", signed=True)
        header[148:156] = b" " * 8
        header[148:155] = f"{sum(header):06o}\0".encode()
    content[:HEADER] = header
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-002\.tar cannot be read as an uncompressed tar"):
        open_pictures(tmp_path, SIZE)


@pytest.mark.parametrize("mode", ["error", "skip"])
def test_missing_shard_is_an_error(tmp_path: Path, mode: str) -> None:
    shards(tmp_path)
    with pytest.raises(DataError, match=r"train-003\.tar cannot be read: .*No such file"):
        open_pictures(tmp_path / "train-{000..003}.tar", SIZE, on_bad_image=mode)


def test_shard_that_is_written_again_during_a_run_is_an_error(tmp_path: Path) -> None:
    found = open_pictures(shards(tmp_path), SIZE)
    assert torch.equal(found[:1], found[:1])
    tarred(tmp_path / "train-000.tar", {"0000.png": png(99), "0000.cls": b"1"})
    with pytest.raises(DataError, match=r"0000\.png in .*train-000\.tar .*has changed since its pictures were listed"):
        found[:1]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("0005.cls", b"cat", r"0005\.cls in .*train-001\.tar cannot be read as the label of a picture"),
        ("0005.cls", b"1.5", r"the label of 0005\.cls in .* is 1\.5, expected the number of a class"),
        ("0005.cls", b"2147483647", r"is 2147483647, expected the number of a class, 0 to 1,048,575"),
        ("0005.json", b'{"label": [0, 1]}', r"is \[0, 1\], expected the number of a class"),
        ("0005.json", b"[" * 100_000, r"0005\.json .* cannot be read as the label of a picture"),
    ],
)
def test_label_that_is_no_class_is_named_or_only_its_picture_left_out(
    tmp_path: Path, file: str, content: bytes, message: str
) -> None:
    shards(tmp_path)
    contents = {f"{number:04d}.png": CONTENTS[NAMES[number]] for number in range(4, 8)}
    labels = {f"{number:04d}.cls": str(CLASSES[NAMES[number]]).encode() for number in range(4, 8) if number != 5}
    tarred(tmp_path / "train-001.tar", {**contents, **labels, file: content})
    with pytest.raises(DataError, match=message):
        open_pictures(tmp_path, SIZE)
    found = open_pictures(tmp_path, SIZE, on_bad_image="skip")
    assert found.labels is not None
    assert found.labels.tolist() == [label for number, label in enumerate(CLASSES.values()) if number != 5]
    assert found.left_out == 1


def test_json_gives_the_class_as_label_or_cls(tmp_path: Path) -> None:
    contents = {
        "a/0.png": png(0), "a/0.json": b'{"label": 3, "cls": 9}',
        "a/1.jpg": png(1), "a/1.json": b'{"cls": 2, "text": "a cat"}',
        "b/0.png": png(2), "b/0.cls": b" 1\n",
    }  # fmt: skip
    found = open_pictures(tarred(tmp_path / "one.tar", contents), SIZE)
    assert found.labels is not None
    assert found.labels.tolist() == [3, 2, 1]


def test_link_in_a_shard_is_named_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(3):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(png(number))
            archive.addfile(member, io.BytesIO(png(number)))
        member = tarfile.TarInfo("3.png")
        member.type, member.linkname = tarfile.LNKTYPE, "0.png"
        archive.addfile(member)
    with pytest.raises(DataError, match=r"3\.png in .*links\.tar is a link.*--hard-dereference"):
        open_pictures(path, SIZE)
    found = open_pictures(path, SIZE, on_bad_image="skip")
    assert (len(found), found.left_out) == (3, 1)


def test_other_files_of_a_sample_are_no_pictures(tmp_path: Path) -> None:
    contents = {"0.depth.png": png(5), "0.png": png(0), "0.txt": b"a cat", "._0.png": b"macOS", "1.png": png(1)}
    found = open_pictures(tarred(tmp_path / "one.tar", contents), SIZE)
    assert [found.name(row).split(" ")[0] for row in range(len(found))] == ["0.png", "1.png"]
    assert found.left_out == 0


def test_shards_are_named_with_wildcards_and_braces(tmp_path: Path) -> None:
    whole = open_pictures(shards(tmp_path), SIZE)
    for names in (
        "train-*.tar",
        "train-00[0-2].tar",
        "{train-000.tar,train-001.tar,train-002.tar}",
        "*-{000..002}.tar",
    ):
        assert open_pictures(tmp_path / names, SIZE).fingerprint == whole.fingerprint
    with pytest.raises(DataError, match=r"no file is called .*test-\*\.tar"):
        open_pictures(tmp_path / "test-*.tar", SIZE)
    with pytest.raises(DataError, match=r"expected the names of shards: .*[Uu]nbalanced"):
        open_pictures(tmp_path / "train-{000..002.tar", SIZE)
    with pytest.raises(DataError, match=r"expected .* uncompressed \.tar shards"):
        open_pictures(tmp_path / "train-{000..002}.tar.gz", SIZE)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lists of small shards are kept too, in this folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_shards, "_WORTH_KEEPING", 0)
    return tmp_path / "cache" / "vadiff" / "shards"


def test_list_of_shards_is_kept_until_a_shard_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0
    make = index_shards._list

    def counted(*arguments: object) -> object:
        nonlocal made
        made += 1
        return make(*arguments)

    monkeypatch.setattr(index_shards, "_list", counted)
    folder = shards(tmp_path / "data")
    first, second = open_pictures(folder, SIZE), open_pictures(folder, SIZE)
    assert made == 1
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first[:], second[:])
    tarred(folder / "train-002.tar", {"0.png": png(50), "0.cls": b"7"})
    assert len(open_pictures(folder, SIZE)) == 9
    assert made == 2
    (file,) = cache.glob("*.npz")
    file.write_bytes(file.read_bytes()[:300])
    assert len(open_pictures(folder, SIZE)) == 9
    assert made == 3


def test_what_is_wrong_with_a_shard_is_kept_with_its_list(tmp_path: Path, cache: Path) -> None:
    path = shards(tmp_path / "data") / "train-001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    for _ in range(2):
        with pytest.raises(DataError, match=r"train-001\.tar cannot be read as an uncompressed tar"):
            open_pictures(tmp_path / "data", SIZE)
        assert open_pictures(tmp_path / "data", SIZE, on_bad_image="skip").left_out > 0
    assert len(list(cache.glob("*.npz"))) == 1


def test_without_a_cache_folder_shards_are_listed_anew(tmp_path: Path, cache: Path) -> None:
    cache.parent.parent.write_bytes(b"a file, where a folder would have to be")
    found = open_pictures(shards(tmp_path / "data"), SIZE)
    names = sorted(NAMES)
    assert torch.equal(found[:], torch.stack([EXPECTED[names.index(name)] for name in NAMES]))
