"""The U-Net of diffusers, sized for small images."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from ..extras import import_extra
from .checkpointing import Checkpointing

# diffusers' timestep embedding, sines of period 2π and longer, is made for 0 to 1000; c_noise is -1.5 to 1.1.
_STEPS_PER_C_NOISE = 100.0


def unet(
    image_shape: tuple[int, int, int],
    channels: Sequence[int],
    *,
    layers_per_block: int = 1,
    attention_resolutions: Collection[int] = (),
    norm_groups: int = 8,
    dropout: float = 0.0,
    labels: int = 0,
    augmentation: int = 0,
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """An untrained F: (c_in·x [B, C, H, W], c_noise [B], and with classes labels [B]) → [B, C, H, W].

    Args:
        image_shape: (C, H, W).
        channels: width of each resolution, from H × W down; multiples of `norm_groups`.
        layers_per_block: residual blocks per resolution on the way down; one more on the way up.
        attention_resolutions: heights (in pixels) of the resolutions with self-attention.
        norm_groups: number of groups of group normalisation.
        dropout: in the residual blocks.
        labels: number of classes, to which one is added for "none given"; 0 for an unconditional network.
        augmentation: numbers that say how an image was augmented, see `vadiff.augmentation`; 0: not told.
        gradient_checkpointing: compute the activations of each residual block again in the backward pass, to save
            memory, by diffusers' own switch; the state of dropout's random numbers is restored for it.

    Raises:
        MissingExtraError: diffusers is not installed.
        ValueError: inconsistent sizes.
    """
    channel_count, height, width = image_shape
    check_halvings(image_shape, channels)
    if any(width_ % norm_groups for width_ in channels):
        raise ValueError(f"channels is {tuple(channels)}, expected multiples of norm_groups = {norm_groups}")
    check_attention(height, channels, attention_resolutions)
    attends = [height >> level in attention_resolutions for level in range(len(channels))]
    conditions: dict[str, object] = {"num_class_embeds": labels + 1 if labels else None}
    if augmentation:  # diffusers adds an embedding that is made here
        conditions = {"class_embed_type": "identity"}
    network = _UNet(
        _Conditions(labels, augmentation, 4 * channels[0]) if augmentation else None,
        sample_size=(height, width),
        in_channels=channel_count,
        out_channels=channel_count,
        block_out_channels=tuple(channels),
        down_block_types=tuple("AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends),
        up_block_types=tuple("AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)),
        layers_per_block=layers_per_block,
        add_attention=any(attends),
        norm_num_groups=norm_groups,
        dropout=dropout,
        **conditions,
    )
    if gradient_checkpointing:
        network.unet.enable_gradient_checkpointing(Checkpointing(random=dropout > 0.0))
    return network


def check_halvings(image_shape: tuple[int, int, int], channels: Sequence[int]) -> None:
    """Check that images of (C, H, W) have as many resolutions as there are widths.

    Raises:
        ValueError: they have fewer, or there is no width.
    """
    if not channels:
        raise ValueError("channels is (), expected one width per resolution, at least one")
    _, height, width = image_shape
    multiple = 2 ** (len(channels) - 1)
    if height % multiple or width % multiple:
        raise ValueError(
            f"channels has {len(channels)} resolutions, but images of {height} × {width} cannot be halved "
            f"{len(channels) - 1} times: give fewer widths, or an image size that is a multiple of {multiple}"
        )


def check_attention(height: int, channels: Sequence[int], attention_resolutions: Collection[int]) -> None:
    """Check that every resolution with self-attention is one of the network's.

    Raises:
        ValueError: some are not.
    """
    resolutions = [height >> level for level in range(len(channels))]
    unknown = [resolution for resolution in attention_resolutions if resolution not in resolutions]
    if unknown:
        raise ValueError(
            f"attention_resolutions has {', '.join(map(str, unknown))}, but with {len(channels)} widths images of "
            f"height {height} have the resolutions {', '.join(map(str, resolutions))}. Give some of these, or () for "
            "no attention"
        )


class _Conditions(nn.Module):
    """What is added to diffusers' embedding of the noise level: of the class, and of how an image was augmented."""

    def __init__(self, labels: int, augmentation: int, width: int) -> None:
        super().__init__()
        self.classes = nn.Embedding(labels + 1, width) if labels else None
        self.augmentation = nn.Linear(augmentation, width, bias=False)

    def forward(self, c_noise: Tensor, labels: Tensor | None, augmentation: Tensor | None) -> Tensor:
        if augmentation is None:
            augmentation = c_noise.new_zeros(len(c_noise), self.augmentation.in_features)
        embedding: Tensor = self.augmentation(augmentation)
        return embedding if self.classes is None else embedding + self.classes(labels)


class _UNet(nn.Module):
    def __init__(self, conditions: _Conditions | None, **options: object) -> None:
        super().__init__()
        unet_2d = import_extra("diffusers.models.unets.unet_2d", "train")
        # channels_last is 10 % faster on a CPU, and the layout of tensor cores.
        self.unet = unet_2d.UNet2DModel(**options).to(memory_format=torch.channels_last)
        self.conditions = conditions

    def forward(
        self, noisy: Tensor, c_noise: Tensor, labels: Tensor | None = None, augmentation: Tensor | None = None
    ) -> Tensor:
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        if self.conditions is not None:
            labels = self.conditions(c_noise, labels, augmentation)
        output: Tensor = self.unet(noisy, _STEPS_PER_C_NOISE * c_noise, class_labels=labels, return_dict=False)[0]
        return output
