"""Files that were made to do harm, or were damaged: named errors, nothing written, no more memory than a picture's."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_pictures import CONTENTS, NAMES, SIZE, folder, pixels_of, png, tarred, zipped

from vadiff.errors import DataError
from vadiff.trainer.data import open_pictures

FIRST = NAMES[0]
ENTRY, LOCAL = b"PK\1\2", b"PK\3\4"  # begin a member in a zip's directory, and before its content


def changed(path: Path, signature: bytes, offset: int, value: bytes) -> Path:
    """The zip with a field changed where `signature` first occurs."""
    content = bytearray(path.read_bytes())
    at = content.index(signature) + offset
    content[at : at + len(value)] = value
    path.write_bytes(content)
    return path


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels, and has none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return content


def most_memory(work: Callable[[], object]) -> int:
    """Bytes that Python has allocated at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("make", [zipped, tarred])
def test_members_named_outside_of_an_archive_touch_no_file(tmp_path: Path, make: Callable[..., Path]) -> None:
    contents = {
        name: png(number)
        for number, name in enumerate(["../../outside.png", "/absolute.png", "a/../../b.png", "C:/windows.png"])
    }
    (tmp_path / "inside" / "deep").mkdir(parents=True)
    path = make(tmp_path / "inside" / "deep" / ("data.zip" if make is zipped else "data.tar"), contents)
    found = open_pictures(path, SIZE)
    for row in range(4):
        assert torch.equal(found[row : row + 1][0], pixels_of(contents[found.name(row).split(" ")[0]]))
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_member_that_unpacks_to_more_than_it_says_is_an_error(tmp_path: Path) -> None:
    bomb = bytes(2**27)
    path = zipped(tmp_path / "data.zip", {FIRST: bomb, NAMES[1]: CONTENTS[NAMES[1]]}, zipfile.ZIP_DEFLATED)
    changed(path, ENTRY, 24, struct.pack("<I", 1000))  # bytes of the content
    found = open_pictures(path, SIZE)

    def read() -> None:
        with pytest.raises(DataError, match=r"img00000000\.png in .*data\.zip .*another size than the 1,000 bytes"):
            found[:1]

    assert most_memory(read) < 2**22


def test_member_that_says_it_is_huge_is_an_error(tmp_path: Path) -> None:
    path = changed(zipped(tmp_path / "data.zip"), ENTRY, 24, struct.pack("<I", 2**32 - 2))
    with pytest.raises(
        DataError, match=r"img00000000\.png in .* has 4,294,967,294 bytes, expected a picture of at most"
    ):
        open_pictures(path, SIZE)[:]


def test_picture_of_too_many_pixels_is_an_error_or_replaced(tmp_path: Path) -> None:
    contents = {**CONTENTS, NAMES[3]: png_of_size(30_000, 30_000), NAMES[6]: png_of_size(12_000, 12_000)}
    path = folder(tmp_path, contents)

    def read() -> None:
        for row in (1, 2):
            with pytest.raises(DataError, match=r"img0000000[36]\.png cannot be read as a picture: .*(pixels|bomb)"):
                open_pictures(path, SIZE)[row : row + 1]

    assert most_memory(read) < 2**22
    assert open_pictures(path, SIZE, on_bad_image="skip").read(torch.tensor([1, 2])).rows.tolist() == [3, 3]


def test_wrong_checksum_is_an_error(tmp_path: Path) -> None:
    path = zipped(tmp_path / "data.zip")
    changed(path, LOCAL, 30 + len(FIRST) + 60, b"damage")
    with pytest.raises(DataError, match=r"img00000000\.png in .*data\.zip cannot be read: its checksum is wrong"):
        open_pictures(path, SIZE)[:]
    assert open_pictures(path, SIZE, on_bad_image="skip").read(torch.tensor([0])).rows.tolist() == [1]


@pytest.mark.parametrize("offset", [5, 2**32 - 2])
def test_member_whose_place_is_wrong_is_an_error(tmp_path: Path, offset: int) -> None:
    path = changed(zipped(tmp_path / "data.zip"), ENTRY, 42, struct.pack("<I", offset))
    with pytest.raises(DataError, match=r"img00000000\.png in .*data\.zip cannot be read: its header is damaged"):
        open_pictures(path, SIZE)[:]


@pytest.mark.parametrize("part", [0.5, 0.99])
def test_zip_that_is_cut_off_is_an_error(tmp_path: Path, part: float) -> None:
    path = zipped(tmp_path / "data.zip")
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(DataError, match=r"data\.zip cannot be read as a zip"):
        open_pictures(path, SIZE)


@pytest.mark.parametrize(("field", "value"), [(8, b"\1\0"), (10, struct.pack("<H", zipfile.ZIP_LZMA))])
def test_encrypted_or_rarely_compressed_member_is_an_error(tmp_path: Path, field: int, value: bytes) -> None:
    path = changed(zipped(tmp_path / "data.zip"), ENTRY, field, value)
    with pytest.raises(DataError, match=r"img00000000\.png in .* is encrypted or compressed by another method"):
        open_pictures(path, SIZE)


def test_zip_that_is_written_again_during_a_run_is_an_error(tmp_path: Path) -> None:
    path = zipped(tmp_path / "data.zip")
    found = open_pictures(path, SIZE)
    first = found[:1]
    zipped(path, dict(reversed(CONTENTS.items())))
    with pytest.raises(DataError, match=r"data\.zip cannot be read: the archive has changed since its pictures were"):
        found[:1]
    assert torch.equal(open_pictures(path, SIZE)[:1], first)


def test_other_format_under_the_name_of_a_picture_is_not_opened(tmp_path: Path) -> None:
    postscript = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE)).save(postscript, "EPS")  # Pillow runs a program for these
    path = folder(tmp_path, {**CONTENTS, FIRST: postscript.getvalue()})
    with pytest.raises(DataError, match=r"img00000000\.png cannot be read .*: it is none of BMP, JPEG, PNG, WEBP"):
        open_pictures(path, SIZE)[:]


def test_dataset_json_that_nests_or_names_nothing_is_an_error(tmp_path: Path) -> None:
    path = folder(tmp_path, {**CONTENTS, "dataset.json": b"[" * 100_000})
    with pytest.raises(DataError, match=r"dataset\.json cannot be read"):
        open_pictures(path, SIZE)
    (path / "dataset.json").write_text('{"labels": [["elsewhere/img00000000.png", 3]]}')
    with pytest.raises(DataError, match=r"names none of the 12 pictures beside it: .*got 'elsewhere/img00000000\.png'"):
        open_pictures(path, SIZE)


def test_hidden_files_are_no_pictures(tmp_path: Path) -> None:
    hidden = {"__MACOSX/00000/._img00000000.png": b"macOS", "00000/.img.png": b"hidden"}
    for path in (folder(tmp_path / "data", {**CONTENTS, **hidden}), zipped(tmp_path / "a.zip", {**CONTENTS, **hidden})):
        found = open_pictures(path, SIZE)
        assert (len(found), found.classes) == (12, 3)


def test_link_to_a_folder_around_it_is_not_followed(tmp_path: Path) -> None:
    folder(tmp_path / "data")
    folder(tmp_path / "elsewhere", {"0.png": png(0), "1.png": png(1)})
    (tmp_path / "data" / "00001" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    found = open_pictures(tmp_path / "data", SIZE)
    assert (len(found), found.classes) == (14, 4)


def test_picture_that_went_away_is_an_error(tmp_path: Path) -> None:
    found = open_pictures(folder(tmp_path), SIZE)
    (tmp_path / FIRST).unlink()
    with pytest.raises(DataError, match=r"img00000000\.png cannot be read: .*No such file"):
        found[:]
    assert found.read(torch.tensor([1])).rows.tolist() == [1]


def test_file_of_more_bytes_than_a_picture_has_is_an_error(tmp_path: Path) -> None:
    path = folder(tmp_path, CONTENTS)
    with (path / FIRST).open("r+b") as file:
        file.truncate(2**28 + 1)  # a hole: it takes no room on the disk
    with pytest.raises(DataError, match=r"img00000000\.png has 268,435,457 bytes, expected a picture of at most"):
        open_pictures(path, SIZE)[:]
