"""vadiff.files: a file or folder appears whole or not at all."""

import contextlib
from pathlib import Path

from vadiff.files import replacing


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


def test_folder_is_as_good_as_a_file_and_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    (tmp_path / "folder.partial").mkdir()
    (tmp_path / "folder.partial" / "left").write_text("by a killed process")
    with replacing(path) as partial:
        partial.mkdir()
        (partial / "a").write_text("a")
    assert [entry.name for entry in path.iterdir()] == ["a"]
    with contextlib.suppress(ValueError), replacing(tmp_path / "other") as partial:
        partial.mkdir()
        (partial / "a").write_text("a")
        raise ValueError
    assert list(tmp_path.iterdir()) == [path]
