"""Result files of experiments: one JSON file each, with machine, versions and commit."""

from __future__ import annotations

import json
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

import vadiff

sys.path.insert(0, str(Path(__file__).parent.parent))
from revision import commit

RESULTS = Path(__file__).parent.parent / "results"


COMMIT, DIRTY = commit()  # of the running code: read at import, not at the end of a long run


def write_results(name: str, figures: dict[str, Any], path: Path | None = None) -> Path:
    """Write `figures` with device, versions, commit and date; returns the path."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    content = {
        "experiment": name,
        "date": date.today().isoformat(),
        "device": device,
        "torch": torch.__version__,
        "vadiff": vadiff.__version__,
        "python": platform.python_version(),
        "commit": COMMIT,
        "dirty": DIRTY,
        **figures,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
