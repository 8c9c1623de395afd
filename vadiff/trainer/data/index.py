"""Finds the pictures and labels of a folder, a zip or WebDataset shards, without decoding them."""

import json
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ...errors import DataError
from ...extras import import_extra
from .decoding import SUFFIXES
from .members import DEFLATED, STORED, Archives, Container, Files, Member

LABELS = "dataset.json"
_MOST_LABEL_BYTES = 2**30  # of dataset.json
_MOST_SMALL_BYTES = 2**20  # of the label of one picture
_NO_LABEL = -1
_BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, RuntimeError, ValueError)


@dataclass(frozen=True, eq=False)
class Index:
    """The pictures of a data set."""

    container: Container
    names: Sequence[str]  # relative to the data set
    sizes: Sequence[int]  # bytes
    labels: np.ndarray  # int64 [N], -1 without one
    wanted: str  # what gives classes to such a data set
    groups: np.ndarray | None = None  # int64 [N], shard of each
    left_out: int = 0  # samples that are damaged


def indexed(path: Path, *, skip: bool) -> Index:
    """The pictures of a data set; see `vadiff.trainer.data.pictures.open_pictures`.

    Raises:
        DataError: no such file, or a damaged one that is not to be skipped.
    """
    text = str(path)
    if re.match("[a-z0-9]{2,}:/|pipe:", text):  # a Path has one slash
        raise DataError(f"data is {text}, expected files on this machine: download the shards first")
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        return _shards(shards, skip) if shards else _folder(path)
    if path.suffix == ".zip" and path.is_file():
        return _zip(path)
    if path.suffix == ".tar" or "{" in text:
        return _shards([Path(name) for name in import_extra("braceexpand", "train").braceexpand(text)], skip)
    if path.exists():
        raise DataError(
            f"data is {path}, expected a folder of pictures, a .zip, or uncompressed .tar shards: other files cannot "
            "be read picture by picture in any order"
        )
    raise DataError(f"data is {path}, which does not exist; expected a folder of pictures, a .zip or .tar shards")


def _folder(path: Path) -> Index:
    found: list[tuple[tuple[str, ...], str]] = []
    for folder, _, files in os.walk(path, followlinks=True, onerror=_raise):
        for file in files:
            if os.path.splitext(file)[1].lower() in SUFFIXES:
                relative = os.path.relpath(os.path.join(folder, file), path)
                found.append((tuple(relative.split(os.sep)), relative))
    names = [name for _, name in sorted(found)]
    sizes = [os.stat(path / name).st_size for name in names]
    posix = ["/".join(name.split(os.sep)) for name in names]
    labels = _from_folders(posix)
    if (path / LABELS).is_file():
        with (path / LABELS).open("rb") as listed:
            labels = _from_json(listed.read(_MOST_LABEL_BYTES + 1), posix, str(path / LABELS))
    return Index(Files(path, names), posix, sizes, labels, f"expected a folder for each class, or {LABELS}")


def _zip(path: Path) -> Index:
    members: list[Member] = []
    listed: bytes | None = None
    try:
        with zipfile.ZipFile(path) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename.split("/")):
                if info.filename == LABELS:
                    with archive.open(info) as file:
                        listed = file.read(_MOST_LABEL_BYTES + 1)
                if info.is_dir() or PurePosixPath(info.filename).suffix.lower() not in SUFFIXES:
                    continue
                if info.flag_bits & 1 or info.compress_type not in (STORED, DEFLATED):
                    raise DataError(
                        f"{info.filename} in {path} is encrypted or compressed by another method than deflate: write "
                        "the zip without compression"
                    )
                members.append(
                    Member(
                        info.filename, 0, info.header_offset, info.compress_size, info.file_size, info.compress_type,
                        info.CRC,
                    )
                )  # fmt: skip
    except _BROKEN_ZIP as error:
        raise DataError(f"{path} cannot be read as a zip: {error}. Get it again") from error
    names = [member.name for member in members]
    labels = _from_folders(names)
    if listed is not None:
        labels = _from_json(listed, names, f"{LABELS} in {path}")
    container = Archives([path], members, zipped=True)
    wanted = f"expected a folder for each class, or {LABELS}"
    return Index(container, names, [member.size for member in members], labels, wanted)


def _shards(paths: Sequence[Path], skip: bool) -> Index:
    members: list[Member] = []
    labels: list[int] = []
    left_out = 0
    for number, path in enumerate(paths):
        samples: dict[str, dict[str, Any]] = {}
        trouble: DataError | None = None
        try:
            for file, content in _tar_members(path):
                folder, _, base = file.name.rpartition("/")
                key, _, extension = base.partition(".")
                sample = samples.setdefault(f"{folder}/{key}", {})
                if f".{extension.lower()}" in SUFFIXES:
                    sample["picture"] = Member(file.name, number, file.offset_data, file.size, file.size)
                elif content is not None:
                    sample["label"] = _small_label(content, extension.lower(), f"{file.name} in {path}")
        except DataError as error:
            trouble = error
        if trouble is not None and not skip:
            raise trouble
        pictures = [sample for sample in samples.values() if "picture" in sample]
        left_out += len(samples) - len(pictures) if trouble is not None else 0
        members += [sample["picture"] for sample in pictures]
        labels += [sample.get("label", _NO_LABEL) for sample in pictures]
        if trouble is not None:
            left_out += 1
    names = [f"{paths[member.archive].name}/{member.name}" for member in members]
    return Index(
        Archives(paths, members, zipped=False), names, [member.size for member in members],
        np.array(labels, dtype=np.int64), 'expected a .cls, or "label" in a .json, for each picture',
        groups=np.array([member.archive for member in members], dtype=np.int64), left_out=left_out,
    )  # fmt: skip


def _tar_members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """The files of a tar with, if they are labels, their content.

    Raises:
        DataError: the tar is missing, compressed, damaged or cut off, after the members before that place.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            end = os.stat(path).st_size
            for member in archive:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError("unexpected end of data")
                content = None
                if member.name.lower().endswith((".cls", ".json")) and member.size <= _MOST_SMALL_BYTES:
                    file = archive.extractfile(member)
                    content = None if file is None else file.read()
                archive.members = []  # type: ignore[attr-defined]  # else it keeps them all
                yield member, content
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as an uncompressed tar: {error}. Get it again (unpack a compressed one), or go on "
            "without what is damaged with --on-bad-image skip"
        ) from error


def _small_label(content: bytes, extension: str, name: str) -> int:
    """The class in a .cls or .json; -1 if it has none."""
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if extension != "cls":
        value = value.get("label", value.get("cls")) if isinstance(value, Mapping) else None
        if value is None:
            return _NO_LABEL
    return _checked(value, name)


def _checked(label: Any, name: str) -> int:
    if type(label) is not int or not 0 <= label < 2**31:
        raise DataError(f"the label of {name} is {label!r}, expected the number of a class, 0 and up")
    return label


def _from_folders(names: Sequence[str]) -> np.ndarray:
    """Top folders as classes, in the order of their names; without classes if a picture is in no folder."""
    folders = [name.partition("/")[0] if "/" in name else None for name in names]
    if None in folders:
        return np.full(len(names), _NO_LABEL, dtype=np.int64)
    classes = {folder: number for number, folder in enumerate(sorted({str(folder) for folder in folders}))}
    return np.array([classes[str(folder)] for folder in folders], dtype=np.int64)


def _from_json(content: bytes, names: Sequence[str], source: str) -> np.ndarray:
    """The classes that a dataset.json gives; -1 for pictures that it does not name."""
    if len(content) > _MOST_LABEL_BYTES:
        raise DataError(f"{source} has more than {_MOST_LABEL_BYTES:,} bytes, expected a list of labels")
    try:
        found = json.loads(content)
        listed = found["labels"]
        if listed is None:
            return np.full(len(names), _NO_LABEL, dtype=np.int64)
        by_name = {str(name).replace("\\", "/"): label for name, label in listed}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f'{source} cannot be read: {error!r}. Expected {{"labels": [["folder/file.png", 6], ...]}}, or null in '
            "place of the list"
        ) from error
    return np.array(
        [_checked(by_name[name], f"{name} in {source}") if name in by_name else _NO_LABEL for name in names],
        dtype=np.int64,
    )


def _raise(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error}") from error
