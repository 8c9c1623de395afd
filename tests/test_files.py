"""vadiff.files: a file or folder appears whole or not at all."""

import contextlib
import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch

from vadiff.files import check_writable, locked, problem, reason, replacing, writing


def test_file_appears_when_the_block_ends_and_its_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with replacing(path, durable=True) as partial:
        partial.write_text("all")
        assert not path.exists()
    assert path.read_text() == "all"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with contextlib.suppress(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_is_as_good_as_a_file_and_what_a_killed_process_left_goes_a_day_later(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name, age in (
        ("folder.partial-01234567", 90000.0),
        ("folder.partial-89abcdef", 60.0),
        ("folder.partial-mine", 90000.0),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left").write_text("by a killed process, or in work by another one")
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    with replacing(path) as partial:
        partial.mkdir()
        (partial / "a").write_text("a")
    assert [entry.name for entry in path.iterdir()] == ["a"]
    with contextlib.suppress(ValueError), replacing(tmp_path / "other") as partial:
        partial.mkdir()
        (partial / "a").write_text("a")
        raise ValueError
    assert {entry.name for entry in tmp_path.iterdir()} == {"folder", "folder.partial-89abcdef", "folder.partial-mine"}


def test_two_writers_of_a_path_do_not_see_each_others_half(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with replacing(path) as one:
        one.write_text("one, half")
        with replacing(path) as other:
            other.write_text("other, whole")
        assert path.read_text() == "other, whole"
        one.write_text("one, whole")
    assert path.read_text() == "one, whole"
    assert list(tmp_path.iterdir()) == [path]


def test_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []

    def work(number: int) -> None:
        with locked(tmp_path / "new" / "lock"):
            inside.append(number)
            time.sleep(0.02)
            inside.append(number)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert inside[0::2] == inside[1::2]


def error_of(action: Callable[[], object]) -> OSError:
    try:
        action()
    except OSError as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("file", True, "{file} is a file, expected a folder"),
        ("file/below/it", True, "{file} is a file, expected a folder"),
        ("file/below", False, "{file} is a file, expected a folder"),
        (".", False, "{here} is a folder, expected a file"),
        ("n" * 300, True, "cannot be read or written: a name in it, or all of it, is too long"),
        ("link", True, "{here}/link is a link to nowhere, which does not exist"),
        ("link/below", False, "{here}/link is a link to nowhere, which does not exist"),
        ("circle/below", True, "{here}/circle/below cannot be read or written: links in it lead in a circle"),
        ("/proc/below", True, "/proc/below cannot be read or written: "),
    ],
)
def test_path_that_cannot_be_written_is_named_with_the_reason(
    name: str, folder: bool, message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    before = sorted(tmp_path.iterdir())
    error = error_of(lambda: check_writable(tmp_path / name, folder=folder))
    assert message.format(file=tmp_path / "file", here=tmp_path) in str(problem(error))
    assert sorted(tmp_path.iterdir()) == before


def test_too_little_space_is_a_full_disk_before_the_work(tmp_path: Path) -> None:
    error = error_of(lambda: check_writable(tmp_path / "new" / "a", folder=False, size=2**60))
    assert "a cannot be written: no space left on its disk (" in str(problem(error))


def test_path_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    for name in ("new/er", ".", "a.txt"):
        check_writable(tmp_path / name, folder=name == ".")
    (tmp_path / "a.txt").write_text("kept")
    check_writable(tmp_path / "a.txt", folder=False)
    assert (tmp_path / "a.txt").read_text() == "kept"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("library", ["python", "torch", "numpy"])
@pytest.mark.usefixtures("small_disk")
def test_failing_write_of_any_library_names_the_file_and_leaves_none(library: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    writes: dict[str, Callable[[IO[bytes]], object]] = {
        "python": lambda file: file.write(bytes(10**5)),
        "torch": lambda file: torch.save({"a": torch.zeros(10**5)}, file),  # which raises a RuntimeError of its own
        "numpy": lambda file: np.savez(file, a=np.zeros(10**5)),
    }

    def write() -> None:
        with replacing(path) as partial, partial.open("wb") as file:
            writes[library](file)

    error = error_of(write)
    assert problem(error) == f"{path} cannot be written: {reason(error)}"
    assert "the file is larger than" in reason(error)
    assert list(path.parent.iterdir()) == []


def test_full_disk_is_said_with_its_space(tmp_path: Path) -> None:
    def write() -> None:
        with writing(tmp_path / "a"), open("/dev/full", "wb") as file:
            file.write(b"a")

    error = error_of(write)
    assert error.errno == errno.ENOSPC
    told = str(problem(error))
    assert told.startswith(f"{tmp_path / 'a'} cannot be written: no space left on its disk (")
    assert " MB are free without it). Free some, or name a folder on another disk" in told


def test_errors_of_programs_are_no_problems_of_paths() -> None:
    assert problem(OSError("no number")) is None
    assert problem(OSError(errno.ECONNREFUSED, "refused", "a")) is None
    with pytest.raises(RuntimeError, match="of another kind"), writing(Path("a")):
        raise RuntimeError("of another kind")
