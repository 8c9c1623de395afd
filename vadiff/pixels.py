"""Conversion of images between bytes and the range [-1, 1] of networks."""

import torch
from torch import Tensor


def normalised(pixels: Tensor) -> Tensor:
    """Bytes 0 to 255, of any shape, as float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


def pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1], of any shape, as bytes 0 to 255, clipped and rounded."""
    return images.float().mul(127.5).add_(128.0).clamp_(0.0, 255.0).to(torch.uint8)
