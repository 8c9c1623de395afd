"""EDM's augmentation: random flips, scaling, rotation, anisotropic scaling and translation that the network is told of.

Source: "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364, appendix F.2), after the
augmentation of GANs with limited data (arXiv 2006.06676, appendix B).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LABELS = 9  # numbers per image that the network is told
_PARAMETERS = 8
# Low-pass filter of the orthogonal wavelet sym6 (Daubechies, Ten lectures on wavelets, 1992), as PyWavelets has it.
_SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
_TAPS = len(_SYM6)
_BORDER = _TAPS // 2  # pixels by which an image is extended for the filter
SMALLEST = _BORDER + 1  # pixels of height and width: there are no more to mirror
# Pixels from a pixel's first fine pixel to the middle of its filter, as smooth images see it: its center of mass.
_DELAY = sum(place * tap for place, tap in enumerate(_SYM6)) / sum(_SYM6) / 2.0


class EDMAugmentation:
    """Augments a batch, and says how: `augmented, labels = augmentation(images)`.

    With eight random numbers a0 to a7 for each image, in this order, as maps of the plane with its origin in the
    middle of the image, x to the right, y down:

        x-flip          a0 in {0, 1}, each with probability 1/2
        y-flip          a1 in {0, 1}, each with probability 1/2
        scaling         by 2^(a2/5), a2 ~ N(0, 1)
        rotation        by the angle -a3, a3 ~ U(-pi, pi)
        anisotropy      by 2^(a5/5) along the direction of the angle a4 and 2^(-a5/5) across, a4 ~ U(-pi, pi),
                        a5 ~ N(0, 1)
        translation     by (a6, a7)/8 of width and height, a6, a7 ~ N(0, 1)

    All but the x-flip are drawn with probability `p` each, else their numbers are 0. The labels are
    (a0, a1, a2, cos a3 - 1, sin a3, a5·cos a4, a5·sin a4, a6, a7): all 0 for an image that stays as it is, which is
    what a network is told when it samples.

    Flips are exact. The others are one affine map, by bilinear interpolation of the image enlarged to twice its size
    with the low-pass filter of the wavelet sym6, mirrored at its borders; the same filter makes it small again. The
    filter overshoots at edges: pixels may lie a little beyond the range of the image's. No operation waits for a GPU,
    and all can be captured in a CUDA graph.

    Args:
        p: probability of each transformation; EDM's is 0.12 for CIFAR-10, 0.15 for FFHQ and AFHQ.
        xflip: whether images are mirrored left to right.

    Raises:
        ValueError: p is not from 0 to 1.

    Example:
        >>> augmentation = EDMAugmentation(p=0.12)
        >>> images, labels = augmentation(torch.rand(16, 3, 32, 32))  # labels [16, 9]
    """

    def __init__(self, p: float = 0.12, *, xflip: bool = True) -> None:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p is {p}, expected a probability, from 0 to 1")
        self.p, self.xflip = float(p), bool(xflip)

    def __repr__(self) -> str:
        return f"EDMAugmentation(p={self.p:g}, xflip={self.xflip})"

    def __call__(self, images: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Augment images.

        Args:
            images: [B, C, H, W] floats.
            generator: of random numbers, on the device of the images; None is torch's own.

        Returns:
            Images [B, C, H, W] of the same dtype, and labels [B, 9] float32.

        Raises:
            ValueError: images of another shape or dtype, or smaller than 7 × 7.
        """
        parameters = self.draw(len(images), device=images.device, generator=generator)
        return transformed(images, parameters), labels_of(parameters)

    def draw(
        self, number: int, *, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Tensor:
        """The numbers a0 to a7 of some images. [number, 8] float32."""
        uniform = torch.rand(number, _PARAMETERS + 4, device=device, generator=generator)
        normal = torch.randn(number, 4, device=device, generator=generator)
        done = (uniform[:, 4:9] < self.p).float()  # y-flip, scaling, rotation, anisotropy, translation
        flips = (uniform[:, :2] < 0.5).float()
        angles = (2.0 * uniform[:, 2:4] - 1.0) * math.pi
        return torch.stack(
            [
                flips[:, 0] * float(self.xflip), flips[:, 1] * done[:, 0], normal[:, 0] * done[:, 1],
                angles[:, 0] * done[:, 2], angles[:, 1] * done[:, 3], normal[:, 1] * done[:, 3],
                normal[:, 2] * done[:, 4], normal[:, 3] * done[:, 4],
            ],
            1,
        )  # fmt: skip


def labels_of(parameters: Tensor) -> Tensor:
    """What the network is told of the numbers a0 to a7, [B, 8]. [B, 9]."""
    a0, a1, a2, a3, a4, a5, a6, a7 = parameters.unbind(1)
    return torch.stack([a0, a1, a2, a3.cos() - 1.0, a3.sin(), a5 * a4.cos(), a5 * a4.sin(), a6, a7], 1)


def transformed(images: Tensor, parameters: Tensor) -> Tensor:
    """Images [B, C, H, W] floats, transformed by the numbers a0 to a7, [B, 8]; under autocast too, in float32.

    Raises:
        ValueError: images of another shape or dtype, or smaller than 7 × 7.
    """
    if images.dim() != 4 or not images.is_floating_point() or min(images.shape[2:]) < SMALLEST:
        raise ValueError(
            f"images is {images.dtype} {tuple(images.shape)}, expected floats [B, C, H, W] of at least "
            f"{SMALLEST} x {SMALLEST} pixels"
        )
    a0, a1, *others = parameters.float().unbind(1)
    flipped = torch.where(_per_image(a0 > 0.5), images.flip(3), images)
    flipped = torch.where(_per_image(a1 > 0.5), flipped.flip(2), flipped)
    with torch.autocast(images.device.type, enabled=False):
        warped = _warped(flipped.float(), _inverse_map(*others)).to(images.dtype)
    moved = torch.stack(others, 1).ne(0.0).any(1)  # the others stay as they are, bit by bit
    return torch.where(_per_image(moved), warped, flipped)


class _Inverse(NamedTuple):
    """Where a pixel of the result is in the image: p = M·(p' - t), for each image."""

    m00: Tensor  # [B] each
    m01: Tensor
    m10: Tensor
    m11: Tensor
    right: Tensor  # t in parts of width and height
    down: Tensor


def _inverse_map(a2: Tensor, a3: Tensor, a4: Tensor, a5: Tensor, a6: Tensor, a7: Tensor) -> _Inverse:
    """M = 2^(-a2/5) · rotation by a3 · [cosh k - sinh k·(cos 2a4, sin 2a4; sin 2a4, -cos 2a4)], k = ln 2·a5/5.

    The last factor squeezes by 2^(-a5/5) along a4. Number by number: matrix products could be of TF32 numbers.
    """
    cosh, sinh = (function(math.log(2.0) / 5.0 * a5) for function in (torch.cosh, torch.sinh))
    along, aside = sinh * (2.0 * a4).cos(), sinh * (2.0 * a4).sin()
    shrink = torch.exp2(-0.2 * a2)
    cos, sin = shrink * a3.cos(), shrink * a3.sin()
    return _Inverse(
        cos * (cosh - along) + sin * aside, -cos * aside - sin * (cosh + along),
        sin * (cosh - along) - cos * aside, -sin * aside + cos * (cosh + along),
        a6 / 8.0, a7 / 8.0,
    )  # fmt: skip


def _warped(images: Tensor, inverse: _Inverse) -> Tensor:
    """Images [B, C, H, W] float32 resampled at M·(p' - t), by way of twice their resolution."""
    height, width = images.shape[2:]
    taps = torch.stack([images.new_full((), tap) for tap in _SYM6])  # filled on the device: no copy from the host
    # Products with the filter's matrices, as convolutions of one channel each are slow on a CPU.
    padded = F.pad(images, [_BORDER] * 4, mode="reflect")
    rows, columns = (math.sqrt(2.0) * _filter(taps, size) for size in padded.shape[2:])
    fine = rows @ (padded @ columns.mT)  # [B, C, 2H + 34, 2W + 34]
    # 1. Where the fine pixels of the result are, in pixels from its middle: as many as the filter needs.
    down, right = (
        torch.arange(2 * size + _TAPS - 2, device=images.device) / 2.0 - _DELAY - (size - 1) / 2.0
        for size in (height, width)
    )
    # 2. Where they are in the image: [B, 2H + 10, 2W + 10], from its first pixel.
    y = down[None, :, None] - height * _per_row(inverse.down)
    x = right[None, None, :] - width * _per_row(inverse.right)
    x, y = (
        _per_row(inverse.m00) * x + _per_row(inverse.m01) * y,
        _per_row(inverse.m10) * x + _per_row(inverse.m11) * y,
    )
    x, y = _mirrored(x + (width - 1) / 2.0, width), _mirrored(y + (height - 1) / 2.0, height)
    # 3. Where that is in the enlarged image, from -1 to 1 over its pixels' outer edges.
    grid = [
        (4.0 * (place + _BORDER + _DELAY) + 1.0) / size - 1.0
        for place, size in ((x, fine.shape[3]), (y, fine.shape[2]))
    ]
    moved = F.grid_sample(fine, torch.stack(grid, -1), mode="bilinear", align_corners=False)
    rows, columns = (math.sqrt(0.5) * _filter(taps, size) for size in (height, width))
    return rows.mT @ moved @ columns


def _mirrored(place: Tensor, size: int) -> Tensor:
    """Places from the first pixel, mirrored at the first and last one, where they are farther out than the border."""
    period = 2.0 * (size - 1)
    inside = place.remainder(period)
    inside = torch.minimum(inside, period - inside)
    outside = (place < -_BORDER / 2) | (place > size - 1 + _BORDER / 2)
    return torch.where(outside, inside, place)


def _filter(taps: Tensor, size: int) -> Tensor:
    """What each of `size` pixels gives to the pixels of twice the resolution: [2·size + 10, size].

    √2 times it enlarges: zeros between the pixels, filtered. √½ times its transpose makes small again: filtered, and
    every second pixel. The one undoes the other, but for the rows that reach beyond the border.
    """
    fine = torch.arange(2 * size + _TAPS - 2, device=taps.device)
    tap = fine[:, None] - 2 * torch.arange(size, device=taps.device)
    return taps[tap.clamp(0, _TAPS - 1)] * ((tap >= 0) & (tap < _TAPS))


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _per_row(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)
