"""EDM2's magnitude-preserving U-Net, config G."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpointing import Checkpointing
from .magnitude_preserving import (
    CosineAttention,
    MPConv,
    MPFourier,
    MPLinear,
    mp_cat,
    mp_silu,
    mp_sum,
    pixel_norm,
)
from .unet import check_attention, check_halvings

_BRANCH_SHARE = 0.3  # weight t of the residual branch in `mp_sum`
_LARGEST = 256.0  # activations are clipped to +-this, far below float16's 65504


class EDM2UNet(nn.Module):
    """An untrained F: (c_in·x [B, C, H, W], c_noise [B], with classes labels [B]) → [B, C, H, W] in x's dtype.

    Config G of EDM2 (arXiv 2312.02696): no biases and no group norms; the layers preserve magnitudes; the noise
    level and the class scale the channels of each block; an input channel of ones replaces biases; the output starts
    at 0. Call `normalize_weights` after each optimiser step; `vadiff train` does.

    Runs in the dtype of `torch.autocast` if enabled. Initialised from torch's global random state.

    Args:
        image_shape: (C, H, W).
        channels: width of each resolution, from H × W down; the paper's S at 64 × 64 is (192, 384, 576, 768).
        layers_per_block: residual blocks per resolution on the way down; one more on the way up.
        attention_resolutions: heights (in pixels) of the resolutions with self-attention; None is the paper's 16 and 8,
            where present. The middle blocks always have it.
        dropout: in the residual blocks.
        labels: number of classes, to which one is added for "none given"; 0 for an unconditional network.
        head_channels: channels per attention head; a narrower layer has one head.
        augmentation: numbers that say how an image was augmented, see `vadiff.augmentation`; 0: not told.
        gradient_checkpointing: compute the activations of each block again in the backward pass, to save memory; the
            state of dropout's random numbers is restored for it.

    Raises:
        ValueError: inconsistent sizes.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        channels: Sequence[int],
        *,
        layers_per_block: int = 3,
        attention_resolutions: Collection[int] | None = None,
        dropout: float = 0.0,
        labels: int = 0,
        head_channels: int = 64,
        augmentation: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        image_channels, height, _ = image_shape
        check_halvings(image_shape, channels)
        if attention_resolutions is None:
            attention_resolutions = {16, 8} & {height >> level for level in range(len(channels))}
        check_attention(height, channels, attention_resolutions)
        embedding = max(channels)
        self.labels = labels
        self._checkpointing = Checkpointing(random=dropout > 0.0) if gradient_checkpointing else None
        self.noise_features = MPFourier(channels[0])
        self.noise_embedding = MPLinear(channels[0], embedding)
        self.class_embedding = MPLinear(labels + 1, embedding) if labels else None
        self.augmentation_embedding = MPLinear(augmentation, embedding) if augmentation else None
        self.first = MPConv(image_channels + 1, channels[0], 3)
        self.last = MPConv(channels[0], image_channels, 3)
        self.last_gain = nn.Parameter(torch.zeros(()))

        def block(inputs: int, outputs: int, *, decoder: bool, attention: bool = False, resample: str = "") -> _Block:
            heads = _heads(outputs, head_channels) if attention else 0
            return _Block(inputs, outputs, embedding, decoder=decoder, heads=heads, resample=resample, dropout=dropout)

        attends = [height >> level in attention_resolutions for level in range(len(channels))]
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        width, skipped = channels[0], [channels[0]]
        for level, (outputs, attention) in enumerate(zip(channels, attends, strict=True)):
            if level:
                self.encoder.append(block(width, width, decoder=False, resample="down"))
                skipped.append(width)
            for _ in range(layers_per_block):
                self.encoder.append(block(width, outputs, decoder=False, attention=attention))
                width = outputs
                skipped.append(width)
        self.middle = nn.ModuleList(
            [block(width, width, decoder=True, attention=True), block(width, width, decoder=True)]
        )
        for level, (outputs, attention) in reversed(list(enumerate(zip(channels, attends, strict=True)))):
            for _ in range(layers_per_block + 1):
                self.decoder.append(block(width + skipped.pop(), outputs, decoder=True, attention=attention))
                width = outputs
            if level:
                self.decoder.append(block(width, width, decoder=True, resample="up"))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it

    def forward(
        self, noisy: Tensor, c_noise: Tensor, labels: Tensor | None = None, augmentation: Tensor | None = None
    ) -> Tensor:
        embedding = self.noise_embedding(self.noise_features(c_noise))
        if self.class_embedding is not None:
            if labels is None:
                raise ValueError(f"labels is None, expected [B] of 0 to {self.labels}, which means none given")
            classes = torch.arange(self.labels + 1, device=labels.device)
            one_hot = (labels[:, None] == classes).to(c_noise.dtype) * (self.labels + 1) ** 0.5
            embedding = mp_sum(embedding, self.class_embedding(one_hot))
        if self.augmentation_embedding is not None and augmentation is not None:
            embedding = embedding + self.augmentation_embedding(augmentation)  # nothing, for images as they are
        embedding = mp_silu(embedding)
        x = torch.cat([noisy, torch.ones_like(noisy[:, :1])], 1).contiguous(memory_format=torch.channels_last)
        x = self.first(x)
        skips = [x]
        for block in self.encoder:
            x = self._run(block, x, embedding)
            skips.append(x)
        for block in self.middle:
            x = self._run(block, x, embedding)
        for block in self.decoder:
            x = self._run(block, x, embedding, None if block.resample else skips.pop())
        output: Tensor = self.last(x, self.last_gain)
        return output.to(noisy.dtype)

    def _run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self._checkpointing is None or not torch.is_grad_enabled():
            output: Tensor = block(*inputs)
            return output
        output = self._checkpointing(block, *inputs)
        return output


@torch.no_grad()
def with_null_class(weight: Tensor) -> Tensor:
    """The class embedding of a network that was trained without a class for "none given".

    The embedding of class c is weight[:, c] over the RMS of the row. The further column is the row's RMS, which leaves
    that of the row, and so the embeddings of all classes, as they are. The class itself, "none given", was never
    trained.

    Args:
        weight: of one column per class, [E, classes].

    Returns:
        [E, classes + 1], in the dtype of `weight`.
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()
    rms = wide.square().mean(1, keepdim=True).sqrt()
    return torch.cat([wide, rms], 1).to(weight.dtype)


class _Block(nn.Module):
    """A residual block, with attention after it where `heads` is not 0."""

    def __init__(
        self, inputs: int, outputs: int, embedding: int, *, decoder: bool, heads: int, resample: str, dropout: float
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.resample = resample
        self.dropout = dropout
        self.match = MPConv(inputs, outputs, 1) if inputs != outputs else None
        self.conv0 = MPConv(inputs if decoder else outputs, outputs, 3)
        self.conv1 = MPConv(outputs, outputs, 3)
        self.modulation = MPLinear(embedding, outputs)
        self.modulation_gain = nn.Parameter(torch.zeros(()))
        self.attention = CosineAttention(outputs, heads, _BRANCH_SHARE) if heads else None

    def forward(self, x: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:  # concatenated here, so that gradient checkpointing keeps no copy of both
            x = mp_cat(x, skip)
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if not self.decoder:  # the decoder needs no norm: its inputs come from the encoder
            x = pixel_norm(self._matched(x))
        scale = 1.0 + self.modulation(embedding, self.modulation_gain)
        branch = self.conv0(mp_silu(x)) * scale[:, :, None, None]
        branch = self.conv1(F.dropout(mp_silu(branch), self.dropout, self.training))
        x = mp_sum(self._matched(x) if self.decoder else x, branch, _BRANCH_SHARE)
        if self.attention is not None:
            x = self.attention(x)
        return x.clamp(-_LARGEST, _LARGEST)

    def _matched(self, x: Tensor) -> Tensor:
        return x if self.match is None else self.match(x)


def _heads(width: int, head_channels: int) -> int:
    heads = max(1, width // head_channels)
    if width % heads:
        raise ValueError(f"channels has {width} with attention, expected multiples of head_channels = {head_channels}")
    return heads
