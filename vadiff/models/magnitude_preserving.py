"""Magnitude-preserving layers: inputs of RMS 1 give outputs of RMS 1.

Source: EDM2 (arXiv 2312.02696); equation numbers refer to it. "Magnitude" is the root mean
square over elements. Norms are computed in at least float32, whatever the dtype of the activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SILU_RMS = 0.596  # of silu(x) for x ~ N(0, 1)


def normalized(x: Tensor, dims: Sequence[int], eps: float = 1e-4) -> Tensor:
    """x / (eps + RMS of x over `dims`); shape and dtype of x."""
    wide = x if x.dtype == torch.float64 else x.float()
    rms = wide.square().mean(tuple(dims), keepdim=True).sqrt()
    return (wide / (rms + eps)).to(x.dtype)


def pixel_norm(x: Tensor) -> Tensor:
    """Every pixel of x [B, C, H, W] scaled to magnitude 1 over its channels (eq. 30)."""
    return normalized(x, [1])


def mp_silu(x: Tensor) -> Tensor:
    """silu(x)/0.596, of magnitude 1 for x ~ N(0, 1) (eq. 81)."""
    return F.silu(x) / _SILU_RMS


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """((1-t)·a + t·b) / √((1-t)² + t²), of magnitude 1 for uncorrelated a and b of magnitude 1 (eq. 88)."""
    return torch.lerp(a, b, t) / math.hypot(1.0 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """a [B, N, ...] and b [B, M, ...] along the channels, weighted 1-t and t, of magnitude 1 (eq. 103)."""
    n, m = a.shape[1], b.shape[1]
    scale = math.sqrt((n + m) / ((1.0 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1.0 - t) / math.sqrt(n)), b * (scale * t / math.sqrt(m))], 1)


class MPFourier(nn.Module):
    """√2·cos(2π(f·a + φ)) with f ~ N(0, 1) and φ ~ U(0, 1), neither of them trained (eq. 75).

    Maps a [B] to [B, channels], in at least float32.

    Args:
        channels: number of features.
    """

    frequencies: Tensor  # [channels]
    phases: Tensor  # [channels]

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(channels))
        self.register_buffer("phases", torch.rand(channels))

    def forward(self, a: Tensor) -> Tensor:
        turns = a[:, None] * self.frequencies + self.phases
        return math.sqrt(2.0) * (2.0 * math.pi * turns).cos()


class MPWeight(nn.Module):
    """A weight [out, in, ...] that is normalised to magnitude 1 per output whenever it is used.

    The effective weight is gain·w/(√fan_in·RMS(w)), per output (eqs. 47, 66). The division is part of the graph, so
    that the gradient is orthogonal to w. Each step then lengthens w, which makes the next step relatively smaller:
    `normalize_weights` after the step rescales w ("forced weight normalisation") without changing the function.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.normalize()

    def effective(self, gain: float | Tensor = 1.0) -> Tensor:
        """The effective weight, of the shape of `weight`."""
        return self._unit() * (gain / math.sqrt(self.weight[0].numel()))

    @torch.no_grad()
    def normalize(self) -> None:
        """Scale the weight to magnitude 1 for every output."""
        self.weight.copy_(self._unit())

    def _unit(self) -> Tensor:
        return normalized(self.weight, range(1, self.weight.dim()))


class MPLinear(MPWeight):
    """x [B, inputs] → [B, outputs], without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(outputs, inputs)

    def forward(self, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        return F.linear(x, self.effective(gain).to(x.dtype))


class MPConv(MPWeight):
    """x [B, inputs, H, W] → [B, outputs, H, W], without bias, padded with zeros to keep H and W.

    Args:
        inputs: channels.
        outputs: channels.
        kernel_size: odd.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int) -> None:
        super().__init__(outputs, inputs, kernel_size, kernel_size)

    def forward(self, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        return F.conv2d(x, self.effective(gain).to(x.dtype), padding=self.weight.shape[-1] // 2)


class CosineAttention(nn.Module):
    """Self-attention by cosine similarity over the pixels of x [B, C, H, W], added to x.

    Queries, keys and values have magnitude 1 over the N channels of a head, so that scores q·k/√N lie within ±√N and
    fit into float16. The sum with x is `mp_sum`.

    Args:
        channels: C.
        heads: divides C.
        share: weight t of the attention output in `mp_sum`.
    """

    def __init__(self, channels: int, heads: int, share: float = 0.3) -> None:
        super().__init__()
        self.heads = heads
        self.share = share
        self.qkv = MPConv(channels, 3 * channels, 1)
        self.out = MPConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        pixels = self.qkv(x).permute(0, 2, 3, 1)  # no copy if memory is channels_last
        heads = pixels.reshape(batch, height * width, 3, self.heads, channels // self.heads)
        q, k, v = normalized(heads, [-1]).permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, H·W, N] each
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        attended = attended.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return mp_sum(x, self.out(attended), self.share)


def normalize_weights(module: nn.Module) -> None:
    """Scale every `MPWeight` in a module to magnitude 1, after an optimiser's step; the function does not change.

    Adam's steps have a fixed size: with weights of a fixed size, the schedule alone sets the relative learning rate.
    In your own loop: `optimizer.register_step_post_hook(lambda *_: normalize_weights(network))`.
    """
    for part in module.modules():
        if isinstance(part, MPWeight):
            part.normalize()
