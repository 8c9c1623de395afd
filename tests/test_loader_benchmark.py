"""benchmarks/loader.py: images per second of reading files, beside torchvision."""

from __future__ import annotations

import json
from pathlib import Path

import loader
import numpy as np
import pytest

pytest.importorskip("torchvision", reason="vadiff is measured beside torchvision, which is not here")


def small(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["loader.py", "--number", "120", "--workers", "0", "--rounds", "2", *arguments])
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)


def test_all_kinds_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (130, 20, 20, 3), dtype=np.uint8)
    np.savez(tmp_path / "pixels.npz", pixels)
    small(monkeypatch, "--images", str(tmp_path / "pixels.npz"), "--size", "16", "--results", str(tmp_path / "f.json"))
    loader.main()
    content = json.loads((tmp_path / "f.json").read_text())
    assert [one["kind"] for one in content["speeds"]] == list(loader.KINDS)
    for one in content["speeds"]:
        assert 0 < one["slowest"] <= one["images_per_second"] <= one["fastest"]
        assert one["processor_microseconds"] > 0
    assert set(content["listing_seconds"]) == {"folder", "zip", "shards"}
    assert "| torchvision's ImageFolder | " in capsys.readouterr().out


def test_a_kind_that_reads_other_pixels_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = loader.image_folder
    monkeypatch.setattr(loader, "image_folder", lambda path, size: transform(path, size // 2))
    small(monkeypatch)
    with pytest.raises(SystemExit, match="folder: other pixels than those of torchvision's ImageFolder"):
        loader.main()
