"""NVlabs' EDM2 networks (config G) as parameters of a `vadiff.models.Denoiser` of `EDM2UNet`.

Both compute the same, up to the rounding of Fourier features and but for images without a class:

qkv       rows (head, channel, q|k|v) in the file, (q|k|v, head, channel) here
Fourier   cos(f·a + φ) in the file, cos(2π(f·a + φ)) here: f and φ are divided by 2π
classes   one column per class in the file; here one more for "none given", see `with_null_class`
logvar_*  the learned uncertainty, which only training needs, is left out
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from ...errors import DataError
from ...models.edm2 import with_null_class
from .pickled_modules import PickledModule

_HEAD = 64  # channels of an attention head
# Attributes of the file's modules, where they have them, with the values that are constants in vadiff's network.
_CONSTANTS = {"res_balance": 0.3, "attn_balance": 0.3, "clip_act": 256, "label_balance": 0.5, "concat_balance": 0.5}
_CLASSES = "network.class_embedding.weight"
_FIRST = re.compile(r"enc\.([1-9][0-9]{0,4})x\1_conv\.weight")


class ImportedNetwork(NamedTuple):
    """A network of a file, in vadiff's layout."""

    image_shape: tuple[int, int, int]
    classes: int  # 0: unconditional
    sigma_data: float
    channels: tuple[int, ...]  # of each resolution, the highest first
    layers_per_block: int
    attention_resolutions: tuple[int, ...]
    parameters: dict[str, Tensor]  # of the denoiser, in the file's precision
    buffers: dict[str, Tensor]  # of the denoiser, float32

    def state(self) -> dict[str, Tensor]:
        """The state of a denoiser, float32."""
        state = {name: value.float() for name, value in self.parameters.items()} | self.buffers
        if self.classes:  # the further column is rounded to the file's precision
            state[_CLASSES] = with_null_class(state[_CLASSES][:, :-1])
        return state

    def is_like(self, other: ImportedNetwork) -> bool:
        """Whether two networks differ in the values of their weights only."""
        mine, theirs = (
            (*network[:6], {name: value.shape for name, value in network.parameters.items()})
            for network in (self, other)
        )
        return mine == theirs


def converted(network: PickledModule) -> ImportedNetwork:
    """The denoiser of a module that is EDM2's network with its preconditioning.

    Raises:
        DataError: a part is missing, or is one that vadiff's network does not have; the message names it.
    """
    if "unet" not in network.children:
        raise DataError(f"ema is of class {network.kind} without a part unet, expected EDM2's network (config G)")
    sigma_data = network.attributes.get("sigma_data")
    if not isinstance(sigma_data, float | int) or isinstance(sigma_data, bool) or not 1e-6 < sigma_data < 1e6:
        raise DataError(f"sigma_data of ema is {sigma_data}, expected the standard deviation of its data")
    unet = network.children["unet"]
    _check_constants(unet, "unet")
    tensors = _Tensors(unet.flat())
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise DataError(f"unet.{name} is not of finite floating-point numbers")
    heights = _heights(tensors)
    layers = _count(tensors, f"enc.{_at(heights[0])}_block")
    first = [f"enc.{_at(height)}_block0." for height in heights]
    attention = tuple(
        height for height, block in zip(heights, first, strict=True) if f"{block}attn_qkv.weight" in tensors
    )
    parameters = {
        "noise_embedding.weight": tensors["emb_noise.weight"],
        "first.weight": tensors[f"enc.{_at(heights[0])}_conv.weight"],
        "last.weight": tensors["out_conv.weight"],
        "last_gain": tensors["out_gain"].reshape(()),
    }
    classes = 0
    if "emb_label.weight" in tensors:
        classes = tensors["emb_label.weight"].shape[1]
        parameters["class_embedding.weight"] = with_null_class(tensors["emb_label.weight"])
    for mine, theirs, attends in _blocks(heights, layers, attention):
        parameters |= {f"{mine}.{name}": value for name, value in _block(tensors, theirs, attends).items()}
    buffers = {
        "noise_features.frequencies": tensors["emb_fourier.freqs"],
        "noise_features.phases": tensors["emb_fourier.phases"],
    }
    if left := sorted(tensors.keys() - tensors.read):
        raise DataError(f"the file has unet.{left[0]}, which has no place in vadiff's network ({len(left)} such)")
    return ImportedNetwork(
        (parameters["last.weight"].shape[0], heights[0], heights[0]),
        classes,
        float(sigma_data),
        tuple(tensors[f"{block}conv_res0.weight"].shape[0] for block in first),
        layers,
        attention,
        {f"network.{name}": value for name, value in parameters.items()},
        {f"network.{name}": (value.double() / (2.0 * math.pi)).float() for name, value in buffers.items()},
    )


class _Tensors(dict[str, Tensor]):
    """The tensors of a U-Net by name; notes which were read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def __missing__(self, name: str) -> Tensor:
        hint = ""
        if name.endswith("_in0.attn_qkv.weight"):
            hint = f". Below {_HEAD} channels such files have no attention, and vadiff's network always has it there"
        raise DataError(f"the file has no unet.{name}, expected an EDM2 network (config G){hint}")


def _at(height: int) -> str:
    return f"{height}x{height}"


def _heights(tensors: Mapping[str, Tensor]) -> list[int]:
    """Height of each resolution, the highest first."""
    found = [int(match[1]) for name in tensors if (match := _FIRST.fullmatch(name))]
    if len(found) != 1:
        raise DataError(
            f"the file has {len(found)} tensors of the name unet.enc.NxN_conv.weight, expected one, for N the images' "
            "height: it is no EDM2 network (config G)"
        )
    heights = found
    while heights[-1] % 2 == 0 and _count(tensors, f"enc.{_at(heights[-1] // 2)}_block"):
        heights.append(heights[-1] // 2)
    return heights


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Number of blocks <prefix>0, <prefix>1, ..."""
    number = 0
    while f"{prefix}{number}.conv_res0.weight" in tensors:
        number += 1
    return number


def _blocks(heights: list[int], layers: int, attention: tuple[int, ...]) -> Iterator[tuple[str, str, bool]]:
    """Name of each block here and in the file, and whether it has attention."""
    encoder, decoder = [], []
    for height in heights:
        if height != heights[0]:
            encoder.append((f"enc.{_at(height)}_down", False))
        encoder += [(f"enc.{_at(height)}_block{number}", height in attention) for number in range(layers)]
    for height in reversed(heights):
        if height != heights[-1]:
            decoder.append((f"dec.{_at(height)}_up", False))
        decoder += [(f"dec.{_at(height)}_block{number}", height in attention) for number in range(layers + 1)]
    middle = [(f"dec.{_at(heights[-1])}_in{number}", number == 0) for number in range(2)]
    for part, blocks in (("encoder", encoder), ("middle", middle), ("decoder", decoder)):
        for place, (theirs, attends) in enumerate(blocks):
            yield f"{part}.{place}", theirs, attends


def _block(tensors: Mapping[str, Tensor], name: str, attends: bool) -> dict[str, Tensor]:
    """Parameters of a block, by their names in vadiff's."""
    found = {
        "conv0.weight": tensors[f"{name}.conv_res0.weight"],
        "conv1.weight": tensors[f"{name}.conv_res1.weight"],
        "modulation.weight": tensors[f"{name}.emb_linear.weight"],
        "modulation_gain": tensors[f"{name}.emb_gain"].reshape(()),
    }
    if f"{name}.conv_skip.weight" in tensors:
        found["match.weight"] = tensors[f"{name}.conv_skip.weight"]
    if attends:
        found["attention.qkv.weight"] = _qkv(tensors[f"{name}.attn_qkv.weight"], name)
        found["attention.out.weight"] = tensors[f"{name}.attn_proj.weight"]
    return found


def _qkv(weight: Tensor, name: str) -> Tensor:
    """Rows (head, channel, q|k|v) in the order (q|k|v, head, channel)."""
    width = weight.shape[1] if weight.dim() == 4 else 0
    heads = width // _HEAD
    if not heads or width % heads or weight.shape[0] != 3 * width:
        raise DataError(
            f"unet.{name}.attn_qkv.weight has shape {tuple(weight.shape)}, expected [3 C, C, 1, 1] with C of {_HEAD} "
            "channels per head"
        )
    rows = weight.reshape(heads, width // heads, 3, *weight.shape[1:])
    return rows.permute(2, 0, 1, *range(3, rows.dim())).reshape(weight.shape)


def _check_constants(module: PickledModule, name: str) -> None:
    """Raise if a module says that it computes with other constants than vadiff's network."""
    for attribute, expected in _CONSTANTS.items():
        found = module.attributes.get(attribute, expected)
        if found != expected:
            raise DataError(
                f"{attribute} of {name} is {found}, expected {expected}, which is fixed in vadiff's network"
            )
    heads = module.attributes.get("num_heads", 0)
    if heads and "attn_qkv" in module.children:
        shape = module.children["attn_qkv"].tensors["weight"].shape
        if heads != shape[1] // _HEAD:
            raise DataError(f"num_heads of {name} is {heads}, expected {shape[1] // _HEAD}: {_HEAD} channels per head")
    for child, part in module.children.items():
        _check_constants(part, f"{name}.{child}")
