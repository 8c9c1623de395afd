"""The latents that NVlabs' EDM2 networks for ImageNet-512 draw."""

from pathlib import Path

from ...errors import DataError
from ..data import LatentEncoding
from ..data.autoencoder import open_autoencoder

# Per channel, of the latents of Stable Diffusion's VAE on ImageNet-512, by which EDM2 standardises them: to mean 0 and
# standard deviation 0.5, as vadiff does.
_MEAN = (5.81, 3.25, 0.12, -2.15)
_STD = (4.17, 4.62, 3.71, 3.28)


def latent_encoding(latent_shape: tuple[int, int, int], vae: Path) -> LatentEncoding:
    """How a VAE decodes what EDM2's networks draw.

    Raises:
        DataError: the VAE cannot be read; or its latents, or those of the network, have not 4 channels.
        MissingExtraError: diffusers is not installed.
    """
    channels, height, width = latent_shape
    if channels != len(_MEAN):
        raise DataError(f"vae is {vae}, expected none: the network draws {channels} channels, latents of EDM2 have 4")
    found = open_autoencoder(vae)
    if found.latent_channels != channels:
        raise DataError(f"vae is {vae}, whose latents have {found.latent_channels} channels, expected {channels}")
    pictures = (found.channels, found.factor * height, found.factor * width)
    return LatentEncoding(False, _MEAN, _STD, latent_shape, pictures, str(vae.resolve()), found.fingerprint)
