"""Optional packages: imported on use; the error for a missing one gives the command that installs it here."""

import importlib
import json
import re
import shlex
import warnings
from importlib import metadata
from pathlib import Path
from types import ModuleType
from urllib.parse import urlparse
from urllib.request import url2pathname


class MissingExtraError(ImportError):
    """An optional package cannot be imported; the message says why and which command installs it."""


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: full name of the module.
        extra: the extra of vadiff that installs it: `train`, `eval`, `report` or `integrations`.

    Raises:
        MissingExtraError: the module is missing or fails to import.
    """
    try:
        with warnings.catch_warnings():
            # diffusers imports torchvision, which may warn that it cannot read JPEGs; vadiff reads none.
            warnings.filterwarnings("ignore", message="Failed to load image Python extension")
            return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch raises RuntimeError
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"{package} cannot be imported ({error}). Install it with: {install_command(extra)}"
        ) from error


def install_command(extra: str) -> str:
    """The shell command that adds an extra to the vadiff that runs, from where that was installed.

    pip records a folder, file or repository that it installed from in `direct_url.json` (PEP 610), and nothing for a
    package index. A folder or file that is no longer there cannot be named: the packages are, then.
    """
    try:
        recorded = metadata.distribution("vadiff").read_text("direct_url.json")
    except metadata.PackageNotFoundError:  # importable only, in its source tree
        return _pip_install(f"{Path(__file__).parents[1]}[{extra}]", editable=True)
    if recorded is None:
        return _pip_install(f"vadiff[{extra}]")
    origin = json.loads(recorded)
    url = urlparse(origin["url"])
    if url.scheme != "file":
        version_control = origin.get("vcs_info")
        address = f"{version_control['vcs']}+{origin['url']}" if version_control else origin["url"]
        return _pip_install(f"vadiff[{extra}] @ {address}")
    path = Path(url2pathname(url.path))
    if path.exists():
        named = "." if path == Path.cwd() else path
        return _pip_install(f"{named}[{extra}]", editable=origin.get("dir_info", {}).get("editable", False))
    return _pip_install(*requirements_of_extras()[extra])


def requirements_of_extras() -> dict[str, list[str]]:
    """What each extra requires on this Python and system, from the package's metadata, as `tqdm>=4.66`.

    Raises:
        PackageNotFoundError: vadiff is not installed, only importable.
    """
    found: dict[str, list[str]] = {}
    for requirement in metadata.requires("vadiff") or []:
        match = re.match(r"([^;]+);(.*\bextra == ['\"](\w+)['\"].*)", requirement)
        if match and _applies(match[2], match[3]):
            found.setdefault(match[3], []).append(match[1].strip())
    return found


def _pip_install(*requirements: str, editable: bool = False) -> str:
    # With quotes also where a shell needs none, as [ ] are a pattern of zsh.
    quoted = (
        f"'{text}'" if re.search(r"[\[<>]", text) and "'" not in text else shlex.quote(text) for text in requirements
    )
    return " ".join(["pip install", *(["-e"] if editable else []), *quoted])


def _applies(marker: str, extra: str) -> bool:
    """Whether a requirement's marker applies to this Python and system; True if `packaging` is not installed."""
    try:
        from packaging.markers import Marker
    except ImportError:
        return True
    return Marker(marker).evaluate({"extra": extra})
