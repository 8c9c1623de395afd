"""The commit of this tree. Needs nothing but Python: a machine that builds the bundle may have no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DESCRIBE = "git describe --always --dirty --abbrev=40 --exclude='*'"
NAMED = re.compile(r"([0-9a-f]{7,40})(-dirty)?")
UNKNOWN = "unknown"


def output_lines(*command: str) -> list[str]:
    """What a program prints; empty where it is not installed."""
    if shutil.which(command[0]) is None:
        return []
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return found.stdout.strip().splitlines()


def commit() -> tuple[str, bool]:
    """The commit of the running code, and whether tracked files differ from it.

    For a copy of the tree outside of git, VADIFF_COMMIT names the commit as `DESCRIBE` prints it: the hash, with
    "-dirty" appended if files differ. ("unknown", True) without either.

    Raises:
        ValueError: VADIFF_COMMIT is malformed.
    """
    top, *found = output_lines("git", "-C", str(ROOT), "rev-parse", "--show-toplevel", "HEAD") or [""]
    if found and Path(top).resolve() == ROOT:  # not an unrelated repository around the copy
        return found[0], bool(output_lines("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"))
    told = os.environ.get("VADIFF_COMMIT", "")
    if not told:
        return UNKNOWN, True
    named = NAMED.fullmatch(told)
    if named is None:
        raise ValueError(f"VADIFF_COMMIT is {told!r}, expected what this prints: {DESCRIBE}")
    return named[1], named[2] is not None


def described() -> str:
    """The commit as `DESCRIBE` prints it, or "unknown"."""
    found, dirty = commit()
    return f"{found}-dirty" if dirty and found != UNKNOWN else found


def same(one: str, other: str) -> bool:
    """Whether two descriptions mean the same commit, one hash perhaps cut short. An unknown one is not known to be."""
    short, long = sorted((one.removesuffix("-dirty"), other.removesuffix("-dirty")), key=len)
    return short != UNKNOWN and long.startswith(short) and one.endswith("-dirty") == other.endswith("-dirty")
