"""benchmarks/gpu_bundle.py: what needs no network."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import gpu_bundle
import pytest

HASH = "0123456789abcdef0123456789abcdef01234567"


def test_the_interpreter_is_the_one_of_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(gpu_bundle.InterpreterNotFoundError, match=rf"PYTHON_VERSION is {version}, but there is no"):
        gpu_bundle.interpreter(version)
    (tmp_path / f"python{version}").symlink_to(sys.executable)
    assert gpu_bundle.interpreter(version)
    (tmp_path / "python3.99").symlink_to(sys.executable)
    with pytest.raises(gpu_bundle.InterpreterNotFoundError, match="does not run as that version"):
        gpu_bundle.interpreter("3.99")


def test_the_highest_glibc_is_found_by_number_not_by_letter(tmp_path: Path) -> None:
    wheel = tmp_path / "vadiff-0-cp312-cp312-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as content:
        content.writestr("vadiff/_native.cpython-312.so", b"\0GLIBC_2.4\0GLIBC_2.34\0GLIBC_2.2.5\0GLIBC_PRIVATE\0")
    assert gpu_bundle.glibc_of(wheel) == "2.34"
    with zipfile.ZipFile(wheel, "w") as content:
        content.writestr("vadiff/__init__.py", "")
    assert gpu_bundle.glibc_of(wheel) is None


def test_sizes_are_listed_and_too_much_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.whl", "b.whl"):
        (tmp_path / name).write_bytes(b"x" * 2**20)
    assert gpu_bundle.table(tmp_path) == ["    1.00 MiB  a.whl", "    1.00 MiB  b.whl", "    2.00 MiB  in total"]
    monkeypatch.setattr(gpu_bundle, "WARN_ABOVE", 2**20)
    assert gpu_bundle.table(tmp_path)[-1] == "WARNING: more than 1 MiB in total"


def test_a_version_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_bundle.main(["--python-version", "312"])
    assert "--python-version is '312', expected major and minor" in capsys.readouterr().err


def test_torch_and_triton_stay_out() -> None:
    assert not {"torch", "triton", "numpy"} & {*gpu_bundle.PACKAGES}
    needed = {"click", "cloup", "pytest", "pytest-benchmark", "pytest-xdist", "diffusers", "importlib_metadata"}
    assert needed <= {*gpu_bundle.PACKAGES}


def test_what_the_machine_has_is_left_out_and_a_name_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(gpu_bundle, "interpreter", lambda version: sys.executable)
    monkeypatch.setattr(gpu_bundle.revision, "described", lambda: HASH)
    monkeypatch.setattr(gpu_bundle.subprocess, "run", lambda words, **options: asked.append(words))
    assert gpu_bundle.main(["--out", str(tmp_path), "--without", "matplotlib", "tensorboard"]) == 0
    assert (tmp_path / "commit.txt").read_text() == f"{HASH}\n"
    assert {"diffusers", "pytest"} <= {*asked[-1]}
    assert not {"matplotlib", "tensorboard"} & {*asked[-1]}
    with pytest.raises(SystemExit):
        gpu_bundle.main(["--without", "matplotlob"])
    assert "invalid choice: 'matplotlob'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("built", "here", "reason"),
    [
        (HASH, HASH, None),
        (HASH, HASH[:7], None),  # as --commit may give it
        (f"{HASH}-dirty", f"{HASH[:7]}-dirty", None),
        (HASH, f"{HASH}-dirty", f"built from commit {HASH}, but this tree is {HASH}-dirty"),
        (HASH, "fedcba9", f"built from commit {HASH}, but this tree is fedcba9: build it anew"),
        (HASH, "unknown", "the commit of this tree is unknown: give --commit"),
        (None, HASH, "has no commit.txt"),
    ],
)
def test_a_bundle_of_another_commit_is_stale(
    built: str | None, here: str, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_bundle.revision, "described", lambda: here)
    if built is not None:
        (tmp_path / "commit.txt").write_text(f"{built}\n")
    found = gpu_bundle.why_stale(tmp_path)
    assert found is None if reason is None else reason in found


def test_a_tree_of_no_known_commit_makes_no_bundle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_bundle.revision, "described", lambda: "unknown")
    with pytest.raises(SystemExit):
        gpu_bundle.main([])
    assert "set VADIFF_COMMIT" in capsys.readouterr().err
