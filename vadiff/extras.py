"""Optional packages: imported where they are used, and asked for by name when they are missing."""

import importlib
import warnings
from types import ModuleType


class MissingExtraError(ImportError):
    """An optional package does not import; the message says why and which command installs it."""


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional module, or say which extra of vadiff brings it.

    Args:
        module: full name of the module.
        extra: the extra of vadiff that installs it: `train`, `eval`, `report` or `integrations`.

    Raises:
        MissingExtraError: the module is missing or fails to import.
    """
    try:
        with warnings.catch_warnings():
            # diffusers imports torchvision, which may warn that it cannot read JPEGs; nothing here does.
            warnings.filterwarnings("ignore", message="Failed to load image Python extension")
            return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises RuntimeError
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"{package} does not import ({error}). It comes with: pip install 'vadiff[{extra}]'"
        ) from error
