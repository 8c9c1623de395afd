"""vadiff doctor: the text people paste into bug reports."""

import json
import platform
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vadiff
from vadiff.extras import install_command
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
    assert f"missing tqdm: {install_command('train')}" in doctor.report()


def installed_from(monkeypatch: pytest.MonkeyPatch, direct_url: dict[str, object] | None) -> None:
    """As if pip had recorded this origin of vadiff."""
    recorded = None if direct_url is None else json.dumps(direct_url)
    monkeypatch.setattr(metadata, "distribution", lambda _: SimpleNamespace(read_text=lambda _: recorded))


def test_advice_names_where_vadiff_was_installed_from(
    packages: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed_from(monkeypatch, None)
    assert install_command("train") == "pip install 'vadiff[train]'"

    folder = tmp_path / "a clone"
    folder.mkdir()
    for editable, flag in ((False, ""), (True, "-e ")):
        installed_from(monkeypatch, {"url": folder.as_uri(), "dir_info": {"editable": editable}})
        assert install_command("train") == f"pip install {flag}'{folder}[train]'"
    monkeypatch.chdir(folder)
    assert install_command("train") == "pip install -e '.[train]'"

    wheel = tmp_path / "vadiff-1-py3-none-any.whl"
    wheel.touch()
    installed_from(monkeypatch, {"url": wheel.as_uri(), "archive_info": {}})
    assert install_command("train") == f"pip install '{wheel}[train]'"
    wheel.unlink()
    assert install_command("train") == "pip install 'tqdm>=4'"
    assert install_command("eval") == "pip install x"

    address = "https://example.org/vadiff"
    installed_from(monkeypatch, {"url": address, "vcs_info": {"vcs": "git", "commit_id": "0"}})
    assert install_command("train") == f"pip install 'vadiff[train] @ git+{address}'"


def test_advice_for_a_source_tree_that_is_only_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> object:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", not_installed)
    assert install_command("report").startswith("pip install -e ")
    assert install_command("report").endswith("[report]'")


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
