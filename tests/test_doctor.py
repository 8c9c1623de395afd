"""vadiff doctor: the text people paste into bug reports."""

import platform
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

import vadiff
from vadiff.ops import backends
from vadiff.trainer import doctor


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed, as far as the doctor sees: empty until the test fills it."""
    installed: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda _: ["torch", 'tqdm>=4; extra == "train"', "x; extra == 'eval'"])
    return installed


def test_report_has_versions_devices_backends_and_environment() -> None:
    report = doctor.report()
    for part in (vadiff.__version__, torch.__version__, platform.python_version()):
        assert part in report
    for part in ("versions\n", "devices\n", "backends\n", "environment\n", "extras\n", "VADIFF_BACKEND"):
        assert part in report
    assert "reference yes" in report
    assert "triton" in report


def test_report_says_what_auto_takes_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: SimpleNamespace(name="A card", major=9, minor=index, total_memory=2**34),
    )
    monkeypatch.setattr(backends, "automatic", lambda device: f"what suits {device}")
    report = doctor.report()
    for device in ("cpu", "cuda:0", "cuda:1"):
        assert f"what suits {device} on {device}" in report


def test_installed_extras_are_listed_with_versions(packages: dict[str, str]) -> None:
    packages.update(tqdm="4.70.1", x="1.0")
    extras = doctor.report().partition("extras\n")[2]
    assert "train     tqdm 4.70.1" in extras
    assert "pip install" not in extras


def test_missing_extra_comes_with_the_command_that_installs_it(packages: dict[str, str]) -> None:
    packages.update(x="1.0")
    assert "missing tqdm: pip install 'vadiff[train]'" in doctor.report()


def test_what_an_extra_needs_elsewhere_only_is_not_missing_here(
    packages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("packaging")
    requirements = [
        'tomli; python_version < "3" and extra == "train"',
        'tqdm; python_version > "3" and extra == "train"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda _: requirements)
    report = doctor.report()
    assert "missing tqdm: pip" in report
    assert "tomli" not in report


def test_package_without_metadata_is_said_to_be_uninstalled(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", not_installed)
    assert "vadiff is not installed, only importable" in doctor.report()


def test_torchvision_that_does_not_import_is_explained(
    packages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packages.update(tqdm="4", x="1", torchvision="0.28.0")
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    assert "pip install --no-deps torchvision==0.15.2" in doctor.report()


def test_unknown_backend_in_the_environment_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VADIFF_BACKEND", "tritn")
    report = doctor.report()
    assert "'tritn'" in report
    assert "VADIFF_BACKEND must be one of auto, reference, native, triton" in report
