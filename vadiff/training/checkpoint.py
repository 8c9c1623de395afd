"""What a run leaves behind, written so that a crash never leaves half a file."""

import os
from pathlib import Path
from typing import Any

import torch

from ..data.digits import SIGMA_DATA
from ..models import Denoiser, digits_unet


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """`torch.save` to a file beside `path`, then put in its place at once."""
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def load_denoiser(path: str | Path, device: torch.device | str = "cpu") -> Denoiser:
    """The averaged (EMA) denoiser of a run that `train` saved, in eval mode.

    Args:
        path: a `checkpoint.pt`; only tensors and plain values are read from it, no code.
        device: where to put it.
    """
    checkpoint = torch.load(path, map_location=device, weights_only=True)
    denoiser = Denoiser(digits_unet(tuple(checkpoint["config"]["channels"])), SIGMA_DATA)
    denoiser.load_state_dict(checkpoint["ema"])
    return denoiser.to(device).eval()
