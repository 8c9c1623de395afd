"""A U-Net of two resolutions in plain torch, to time a training step without extra packages."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SmallUNet(nn.Module):
    """Noisy images [B, 3, H, W] and log-SNR [B] → prediction [B, 3, H, W].

    Patches of `patch` × `patch` pixels are one position; H and W must be multiples of 2 * patch."""

    def __init__(self, channels: int, patch: int = 1) -> None:
        super().__init__()
        pixels = 3 * patch**2
        self.embed = nn.Linear(1, channels)
        self.first = nn.Sequential(nn.PixelUnshuffle(patch), nn.Conv2d(pixels, channels, 3, padding=1))
        self.down = _block(channels, 2 * channels, stride=2)
        self.middle = _block(2 * channels, 2 * channels)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.last = nn.Sequential(
            _block(2 * channels, channels), nn.Conv2d(channels, pixels, 3, padding=1), nn.PixelShuffle(patch)
        )

    def forward(self, noisy: Tensor, log_snr: Tensor) -> Tensor:
        fine = self.first(noisy) + self.embed(log_snr[:, None] / 4)[:, :, None, None]
        up = self.up(self.middle(self.down(fine)))
        prediction: Tensor = self.last(torch.cat([fine, up], 1))
        return prediction


def _block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, stride=stride)
    return nn.Sequential(convolution, nn.GroupNorm(4, channels_out), nn.SiLU())
