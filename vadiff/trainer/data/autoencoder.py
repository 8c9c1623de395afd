"""diffusers' AutoencoderKL between pictures and the moments of their latents, with a fingerprint of its weights."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import DataError
from ...extras import import_extra
from ...pixels import normalised, pixels

# Entries of the VAE's config that change what it computes, and that the names and shapes of its weights do not show.
_UNSEEN = ("act_fn", "norm_num_groups")
_DECODED_AT_ONCE = 2**20  # pixels: the decoder's activations are 256 or more numbers for each


class Autoencoder:
    """A trained AutoencoderKL on one device, in float32, which reads and returns pictures as bytes.

    Its own scaling and shift factors are not applied: latents are standardised by their statistics instead.

    Attributes:
        fingerprint: differs between VAEs of different weights; the same on every machine.
        channels: of the pictures.
        latent_channels: of the latents.
        factor: pixels in height and width that are one latent.
    """

    def __init__(self, vae: Any, device: torch.device | str = "cpu") -> None:
        self.fingerprint = _fingerprint(vae)
        self.channels = int(vae.config.in_channels)
        self.latent_channels = int(vae.config.latent_channels)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.device = torch.device(device)
        self._vae = vae.to(self.device)

    def latent_shape(self, picture: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a picture of the given shape.

        Raises:
            DataError: the VAE takes other channels, or the size is no multiple of `factor`.
        """
        channels, height, width = picture
        if channels != self.channels:
            raise DataError(
                f"images have {channels} channels, expected {self.channels}: those that the VAE was made for"
            )
        if height % self.factor or width % self.factor:
            raise DataError(
                f"images are {height} x {width} pixels, expected multiples of {self.factor}: so many are one latent of "
                "this VAE. Give another --image-size"
            )
        return self.latent_channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def moments(self, pictures: Tensor) -> Tensor:
        """Mean and log-variance of the latents of bytes [n, C, H, W]. [n, 2·C', H', W'] float32 on the VAE's device

        The log-variance is within -30 and 20, as diffusers limits it where latents are drawn.
        """
        found = self._vae.encode(normalised(pictures.to(self.device))).latent_dist
        return torch.cat([found.mean, found.logvar], dim=1)

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """Decode latents [n, C', H', W'] on the VAE's device, a few at a time. Bytes [n, C, H, W]"""
        height, width = (self.factor * size for size in latents.shape[-2:])
        at_once = max(1, _DECODED_AT_ONCE // (height * width))
        parts = [pixels(self._vae.decode(part).sample) for part in latents.split(at_once)]
        empty = torch.empty(0, self.channels, height, width, dtype=torch.uint8, device=latents.device)
        return torch.cat(parts or [empty])


def open_autoencoder(path: Path | str, device: torch.device | str = "cpu") -> Autoencoder:
    """Read a VAE from a local folder.

    Args:
        path: the folder that `AutoencoderKL.save_pretrained` wrote, or that of a diffusers pipeline, whose `vae` is
            read.
        device: where it computes.

    Raises:
        DataError: no such folder, or none that diffusers can read an AutoencoderKL from.
        MissingExtraError: diffusers is not installed.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    expected = "expected a folder that diffusers' AutoencoderKL.save_pretrained wrote"
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise DataError(f"vae is {path}, which {what}; {expected}. Nothing is downloaded")
    try:
        vae, report = import_extra("diffusers", "train").AutoencoderKL.from_pretrained(
            folder, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (
        OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError,
    ) as error:  # fmt: skip
        raise DataError(f"vae is {path}, which cannot be read: {error!r}; {expected}") from error
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report.get(what):  # diffusers would go on with random numbers
            raise DataError(
                f"vae is {path}, whose weights do not fit its config.json: {what} {report[what][:3]}; {expected}"
            )
    return Autoencoder(vae.float().eval().requires_grad_(False), device)


def _fingerprint(vae: Any) -> str:
    """Of names, shapes and values of the weights."""
    digest = hashlib.sha256(repr([vae.config.get(name) for name in _UNSEEN]).encode())
    for name, value in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]
