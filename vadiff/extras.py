"""Optional packages: imported on use; the error for a missing one gives the install command."""

import importlib
import warnings
from types import ModuleType


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
            f"{package} cannot be imported ({error}). Install it with: pip install 'vadiff[{extra}]'"
        ) from error
