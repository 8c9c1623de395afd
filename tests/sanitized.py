"""For `make sanitize`: exits 1 unless the native kernels that tests get are those in a folder, with AddressSanitizer.

A script beside the tests, so that it searches for modules where they do.
"""

import sys
from pathlib import Path

from vadiff import _native


def main(folder: Path) -> None:
    loaded = Path(_native.__file__).resolve()
    if not loaded.is_relative_to(folder.resolve()):
        sys.exit(f"the tests would run {loaded}, expected a file in {folder}")
    if b"libasan.so" not in loaded.read_bytes():
        sys.exit(f"{loaded} is not linked to libasan: it was compiled without -fsanitize=address")


main(Path(sys.argv[1]))
