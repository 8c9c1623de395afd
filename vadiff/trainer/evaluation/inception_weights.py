"""Weights of torch-fidelity's Inception network."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...extras import import_extra

PUBLISHED_SHA256 = "6726825d"  # its first digits
PUBLISHED_WEIGHTS = f"weights-inception-2015-12-05-{PUBLISHED_SHA256}.pth"


def download_weights(progress: bool) -> None:
    """Download the Inception weights to torch's hub folder, where torch-fidelity looks for them, unless they are there.

    Raises:
        UserError: that failed.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / PUBLISHED_WEIGHTS
    if file.is_file():
        return
    url = import_extra("torch_fidelity.feature_extractor_inceptionv3", "eval").URL_INCEPTION_V3
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        print(f"Downloading Inception weights to {file}", file=sys.stderr)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=PUBLISHED_SHA256, progress=progress)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum is a RuntimeError
        raise UserError(
            f"the Inception weights could not be downloaded ({error}). Pass --inception-weights PATH with "
            f"{PUBLISHED_WEIGHTS} from the releases of torch-fidelity on GitHub. Without them `vadiff evaluate RUN "
            "--metrics none` measures the loss on held-out images"
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, read with weights_only: torch-fidelity's own load could run code from it."""
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"inception_weights is {path}, but there is no such file") from None
    except Exception as error:
        raise ValueError(
            f"inception_weights is {path}, which does not load as plain tensors ({error}); expected "
            f"{PUBLISHED_WEIGHTS} of torch-fidelity"
        ) from error
    if not isinstance(state, Mapping) or "Conv2d_1a_3x3.conv.weight" not in state:
        raise ValueError(f"inception_weights is {path}, which holds no weights of torch-fidelity's Inception network")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
