"""vadiff.files: a file or folder appears whole or not at all."""

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vadiff.files import locked, replacing


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
