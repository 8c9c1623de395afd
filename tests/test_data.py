"""vadiff.trainer.data: official layouts made here, right and wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vadiff.errors import DataError
from vadiff.pixels import normalised
from vadiff.trainer.data import Images, cifar, digits
from vadiff.trainer.data.pickled_arrays import load_arrays

TRAIN, TEST = 40, 20  # images per file here; the official files have thousands


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, layout in cifar.LAYOUTS.items():
        small = dataclasses.replace(layout, train_per_file=TRAIN, test_images=TEST)
        monkeypatch.setitem(cifar.LAYOUTS, name, small)


def part(name: str, images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random pixels [n, 3072] and labels [n]."""
    rng = np.random.default_rng(seed)
    classes = cifar.LAYOUTS[name].classes
    return rng.integers(0, 256, (images, 3072), dtype=np.uint8), rng.integers(0, classes, images)


def binary_file(name: str, data: np.ndarray, labels: np.ndarray) -> bytes:
    columns = [labels[:, None].astype(np.uint8), data]
    if name == "cifar100":
        columns.insert(0, np.full((len(data), 1), 7, np.uint8))  # the coarse class
    return np.concatenate(columns, 1).tobytes()


def python_file(name: str, data: np.ndarray, labels: np.ndarray) -> bytes:
    key = b"fine_labels" if name == "cifar100" else b"labels"
    return pickle.dumps({b"data": data, key: labels.tolist(), b"filenames": [b"a.png"] * len(data)}, protocol=2)


def files(name: str, kind: str, *, test: bool = True) -> dict[str, bytes]:
    """Every file of a layout by its name."""
    layout = cifar.LAYOUTS[name]
    write = binary_file if kind == "binary" else python_file
    train = layout.binary_train if kind == "binary" else layout.python_train
    made = {file: write(name, *part(name, TRAIN, seed)) for seed, file in enumerate(train)}
    if test:
        made[layout.binary_test if kind == "binary" else layout.python_test] = write(name, *part(name, TEST, 99))
    return made


def unpacked(path: Path, contents: dict[str, bytes]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (path / name).write_bytes(content)
    return path


def packed(path: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch | None = None) -> Path:
    """A tar.gz, whose checksum is made the official one where `monkeypatch` is given."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    if monkeypatch is not None:
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        layout = dataclasses.replace(cifar.LAYOUTS["cifar10"], archives={"cifar-10-binary.tar.gz": md5})
        monkeypatch.setitem(cifar.LAYOUTS, "cifar10", layout)
    return path


def assert_right(name: str, images: Images) -> None:
    count = len(cifar.LAYOUTS[name].binary_train)
    assert images.train.shape == (TRAIN * count, 3, 32, 32)
    assert images.train[:].dtype == torch.uint8
    data, labels = part(name, TRAIN, count - 1)  # of the last file
    assert np.array_equal(images.train[-TRAIN:].flatten(1).numpy(), data)
    assert images.train_labels is not None
    assert np.array_equal(images.train_labels[-TRAIN:].numpy(), labels)
    data, labels = part(name, TEST, 99)
    assert np.array_equal(images.held_out[:].flatten(1).numpy(), data)
    assert images.held_out_labels is not None
    assert np.array_equal(images.held_out_labels.numpy(), labels)
    assert images.held_out_is_test
    assert images.classes == cifar.LAYOUTS[name].classes


@pytest.mark.parametrize("kind", ["binary", "python"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_official_layouts_are_read(name: str, kind: str, tmp_path: Path) -> None:
    assert_right(name, cifar.load(name, unpacked(tmp_path, files(name, kind))))


def test_files_in_the_folder_that_the_archive_unpacks_to_are_found(tmp_path: Path) -> None:
    unpacked(tmp_path / "cifar-10-batches-bin", files("cifar10", "binary"))
    assert_right("cifar10", cifar.load("cifar10", tmp_path))


def test_archive_of_the_right_checksum_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = packed(tmp_path / "c.tar.gz", files("cifar10", "binary"), monkeypatch)
    assert_right("cifar10", cifar.load("cifar10", archive))


def split(archive: Path, folder: Path, parts: int = 12) -> list[Path]:
    """As `split` cuts and names: aa, ab, ..."""
    content, folder = archive.read_bytes(), unpacked(folder, {})
    size = len(content) // parts + 1
    found = [folder / f"{archive.name}.{'a' if i < 10 else 'b'}{i % 10}" for i in range(parts)]
    for i, path in enumerate(found):
        path.write_bytes(content[i * size : (i + 1) * size])
    return found


def test_archive_in_parts_is_joined_in_the_order_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = packed(tmp_path / "cifar-10-binary.tar.gz", files("cifar10", "binary"), monkeypatch)
    parts = split(archive, tmp_path / "parts")
    assert_right("cifar10", cifar.load("cifar10", tmp_path / "parts"))
    parts[3].unlink()
    with pytest.raises(DataError, match=r"parts, its 11 parts cifar-10-binary\.tar\.gz\.a0 to .*b1, has MD5"):
        cifar.load("cifar10", tmp_path / "parts")


def test_files_may_be_in_several_folders(tmp_path: Path) -> None:
    """Where they came in several parts."""
    contents = files("cifar10", "python")
    for index, (name, content) in enumerate(contents.items()):
        unpacked(tmp_path / f"part-{index % 2}", {name: content})
    assert_right("cifar10", cifar.load("cifar10", tmp_path))


def test_archive_of_another_checksum_is_refused(tmp_path: Path) -> None:
    archive = packed(tmp_path / "c.tar.gz", files("cifar10", "binary"))
    with pytest.raises(DataError, match=r"has MD5 [0-9a-f]{32}, expected c32a1d4ab5d03f1284b67883e8d87530"):
        cifar.load("cifar10", archive)


def test_truncated_archive_is_a_named_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = packed(tmp_path / "c.tar.gz", files("cifar10", "binary"))
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    layout = dataclasses.replace(cifar.LAYOUTS["cifar10"], archives={"x": md5})
    monkeypatch.setitem(cifar.LAYOUTS, "cifar10", layout)
    with pytest.raises(DataError, match=r"c\.tar\.gz cannot be read as a tar\.gz"):
        cifar.load("cifar10", archive)


def test_without_the_test_file_the_last_training_images_are_held_out(tmp_path: Path) -> None:
    images = cifar.load("cifar10", unpacked(tmp_path, files("cifar10", "binary", test=False)))
    assert not images.held_out_is_test
    assert (len(images.train), len(images.held_out)) == (180, 20)
    data, _ = part("cifar10", TRAIN, 4)
    assert np.array_equal(images.held_out[:].flatten(1).numpy(), data[-20:])


def changed(file: str, change: Callable[[bytes], bytes]) -> dict[str, bytes]:
    kind = "binary" if file.endswith(".bin") else "python"
    contents = files("cifar10", kind)
    contents[file] = change(contents[file])
    return contents


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "data_batch_3.bin",
            lambda c: c[:-1],
            r"data_batch_3\.bin .* has 122,919 bytes, expected 122,920",
        ),
        ("data_batch_3.bin", lambda c: c[:-3073], "expected 122,920: it is truncated"),  # a whole record
        ("test_batch.bin", lambda c: c[:100], r"test_batch\.bin .* has 100 bytes"),
        ("data_batch_1.bin", lambda c: b"\xff" + c[1:], "has labels from 0 to 255, expected 0 to 9"),
        ("data_batch_2", lambda c: c[:-50], "data_batch_2 .* is corrupt"),
        ("data_batch_2", lambda c: b"", "data_batch_2 .* is corrupt"),
        ("data_batch_2", lambda c: pickle.dumps([1, 2]), "data_batch_2 .* has no array 'data'"),
        ("data_batch_2", lambda c: python_file("cifar10", *part("cifar10", 3, 0)), "has no array 'data' of uint8"),
    ],
)
def test_damaged_file_is_named(file: str, change: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        cifar.load("cifar10", unpacked(tmp_path, changed(file, change)))


def test_missing_files_are_named(tmp_path: Path) -> None:
    contents = files("cifar10", "binary")
    del contents["data_batch_4.bin"]
    with pytest.raises(DataError, match=r"data_batch_4\.bin is missing in"):
        cifar.load("cifar10", unpacked(tmp_path, contents))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"neither data_batch_1\.bin .* nor data_batch_1"):
        cifar.load("cifar10", tmp_path / "empty")
    with pytest.raises(DataError, match="which does not exist"):
        cifar.load("cifar10", tmp_path / "nowhere")


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


class Decoding:
    """Unpickled, it asks for a codec."""

    def __reduce__(self) -> tuple[object, ...]:
        import codecs

        return codecs.encode, ("text", "rot13")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_pickle_runs_nothing(protocol: int, tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    attack = pickle.dumps({b"data": Hostile(harm)}, protocol=protocol)
    assert pickle.loads(attack)
    assert harm.exists()  # the attack works where it is not kept from it
    harm.rmdir()
    with pytest.raises(DataError, match=r"data_batch_1 .* is not safe to read: it asks for (posix|nt)\.mkdir"):
        cifar.load("cifar10", unpacked(tmp_path, changed("data_batch_1", lambda c: attack)))
    assert not harm.exists()


@pytest.mark.parametrize("value", [Decoding(), np.array([Decoding], dtype=object), np.dtype("O"), Path("x")])
def test_pickle_of_anything_but_numbers_is_refused(value: object, tmp_path: Path) -> None:
    contents = changed("data_batch_1", lambda c: pickle.dumps({b"data": value}, protocol=2))
    with pytest.raises(DataError, match="is not safe to read"):
        cifar.load("cifar10", unpacked(tmp_path, contents))


def called(name: str, arguments: str) -> bytes:
    """A pickle that calls a function of NumPy, in the text protocol."""
    module, function = name.rsplit(".", 1)
    return f"c{module}\n{function}\n({arguments}tR".encode()


BUFFER = b"\x96" + (8).to_bytes(8, "little") + b"AAAAAAAA"  # a writable one
POINTERS = b"\x80\x05cnumpy\nndarray\n((I1\ntS'O'\n" + BUFFER + b"tRI0\nNs."
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"


@pytest.mark.parametrize(
    "attack",
    [
        POINTERS,  # writes through an address of the attacker's choice
        POINTERS.replace(b"'O'", b"'O,i8'").replace(BUFFER, b"\x96" + (16).to_bytes(8, "little") + 16 * b"A"),
        called("numpy.dtype", "S'V8'\n") + b"(I3\nS'|'\nN(S'a'\nt}S'a'\n(" + called("numpy.dtype", "S'u1'\n")
        + b"I9999\ntsI8\nI1\nI63\ntb.",
        called("numpy.dtype", "S'V8'\n") + b".",
        called("numpy.dtype", "S'u1'\n") + b"(I3\nS'|'\nN(S'a'\nt}I8\nI1\nI63\ntb.",
        ARRAY + b"(I1\n(I9\nt" + called("numpy.dtype", "S'u1'\n") + b"I0\nS'short'\ntb.",
        b"\x80\x05" + ARRAY + b"(I1\n(I8\nt" + called("numpy.dtype", "S'u1'\n") + b"I0\n" + BUFFER + b"tb.",
        b"\x80\x02" + ARRAY + b"(I1\n(J\xff\xff\xff\xfft" + called("numpy.dtype", "S'u1'\n") + b"I0\nS''\ntb.",
        ARRAY + b".",
        ARRAY.replace(b"numpy\nndarray", b"numpy\ndtype") + b".",
        b"c_codecs\nencode\n(N}S'__defaults__'\n(I1\ntstb.",
        b"cnumpy\nndarray\n.",
    ],
)  # fmt: skip
def test_pickle_gets_no_object_of_numpy_in_its_hands(attack: bytes) -> None:
    """In a process of its own: read with NumPy's constructors, several of these end the process."""
    code = "import sys; from pickled_arrays import load_arrays; load_arrays(sys.stdin.buffer.read())"
    environment = {**os.environ, "PYTHONPATH": str(Path(cifar.__file__).parent)}  # the module alone, without torch
    done = subprocess.run([sys.executable, "-c", code], env=environment, input=attack, capture_output=True, timeout=60)
    assert done.returncode == 1, f"ended with {done.returncode}"
    assert b"Error" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["u1", ">i2", "<f4", "f8", "bool"])
def test_arrays_of_numbers_are_read_as_they_were(kind: str, protocol: int) -> None:
    array = np.arange(6).reshape(2, 3).astype(kind)
    shared = [1, "text", (2.5, None)]
    content: dict[bytes, Any] = {b"c": array, b"f": np.asfortranarray(array), b"lists": [shared, shared]}
    if protocol > 2:  # those before write empty bytes as a call
        content[b"empty"] = array[:0]
    read = load_arrays(pickle.dumps(content, protocol))
    assert read.pop(b"lists") == content.pop(b"lists")
    for name, expected in content.items():
        assert read[name].dtype == expected.dtype
        assert np.array_equal(read[name], expected)
        assert read[name].flags.writeable


def test_failed_download_says_where_to_get_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def retrieve(url: str, known_hash: str, *arguments: object, **options: object) -> str:
        assert url == "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
        assert known_hash == "md5:03b5dce01913d631647c71ecec9e9cb8"
        raise OSError("no route to host")

    monkeypatch.setattr("pooch.retrieve", retrieve)
    with pytest.raises(DataError, match=r"could not be downloaded: no route to host.*--data FILE"):
        cifar.load("cifar100")


def test_digits_are_split_without_overlap_and_labelled() -> None:
    images = digits.digits()
    assert images.train.shape == (1500, 1, 8, 8)
    assert images.held_out.shape == (297, 1, 8, 8)
    assert normalised(images.train[:]).std().item() == pytest.approx(digits.SIGMA_DATA, rel=0.01)
    trained_on = {image.numpy().tobytes() for image in images.train[:]}
    assert not any(image.numpy().tobytes() in trained_on for image in images.held_out[:])
    assert images.train_labels is not None
    assert set(images.train_labels.tolist()) == set(range(10))
