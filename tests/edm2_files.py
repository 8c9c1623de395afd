"""Files in the layout of NVlabs' EDM2 networks, and what these networks compute, from the paper's formulas.

Nothing here was compared with a file of theirs: the layout is that of published descriptions.
"""

from __future__ import annotations

import math
import pickle
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SOURCE = "raise RuntimeError('the source in a file was run')"  # of every persistent class


class EasyDict(dict[str, Any]):
    """Pickled as dnnlib.util.EasyDict."""


def _reconstruct_persistent_obj(meta: Any) -> None:
    raise RuntimeError("the loader of persistent objects was run")


def pretend_modules() -> dict[str, types.ModuleType]:
    """The modules that these pickles name, for sys.modules."""
    found: dict[str, types.ModuleType] = {}
    for name, thing in (("dnnlib.util", EasyDict), ("torch_utils.persistence", _reconstruct_persistent_obj)):
        parent, _, _ = name.partition(".")
        found |= {parent: types.ModuleType(parent), name: types.ModuleType(name)}
        setattr(found[name], thing.__name__, thing)
        thing.__module__ = name
    return found


class Persistent(nn.Module):
    """A module that is pickled as a persistent object: the name of its class, a source and its state."""

    def __init__(self, kind: str, parts: Mapping[str, Any]) -> None:
        super().__init__()
        self.kind = kind
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            elif isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def __reduce__(self) -> Any:
        state = {name: value for name, value in vars(self).items() if name != "kind"}
        meta = EasyDict(type="class", version=6, module_src=SOURCE, class_name=self.kind, state=state)
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


def network(
    *,
    height: int = 8,
    images: int = 3,
    channels: Sequence[int] = (32, 64),
    layers: int = 1,
    attention: Sequence[int] = (4,),
    classes: int = 5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **attributes: Any,
) -> Persistent:
    """A network with random weights, whose gains are not 0 and whose weights are not of magnitude 1."""
    random = torch.Generator().manual_seed(seed)
    embedding = max(channels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    def mp(*shape: int) -> Persistent:
        return Persistent("MPConv", {"weight": nn.Parameter(1.5 * normal(*shape), requires_grad=False)})

    def fourier() -> Persistent:
        freqs = 2.0 * math.pi * normal(channels[0])
        return Persistent("MPFourier", {"freqs": freqs, "phases": 6.0 * normal(channels[0]).abs()})

    def gain() -> nn.Parameter:
        return nn.Parameter(0.5 + 0.1 * normal()[()], requires_grad=False)

    def block(inputs: int, outputs: int, *, decoder: bool, attends: bool = False) -> Persistent:
        parts = {
            "emb_gain": gain(),
            "conv_res0": mp(outputs, inputs if decoder else outputs, 3, 3),
            "emb_linear": mp(outputs, embedding),
            "conv_res1": mp(outputs, outputs, 3, 3),
            "conv_skip": mp(outputs, inputs, 1, 1) if inputs != outputs else None,
            "attn_qkv": mp(3 * outputs, outputs, 1, 1) if attends else None,
            "attn_proj": mp(outputs, outputs, 1, 1) if attends else None,
            "num_heads": outputs // 64 if attends else 0,
            "res_balance": 0.3,
            "clip_act": 256,
        }
        return Persistent("Block", parts)

    heights = [height >> level for level in range(len(channels))]
    enc, dec, width, skips = {f"{height}x{height}_conv": mp(channels[0], images + 1, 3, 3)}, {}, channels[0], []
    skips.append(width)
    for size, outputs in zip(heights, channels, strict=True):
        if size != height:
            enc[f"{size}x{size}_down"] = block(width, width, decoder=False)
            skips.append(width)
        for number in range(layers):
            enc[f"{size}x{size}_block{number}"] = block(width, outputs, decoder=False, attends=size in attention)
            width = outputs
            skips.append(width)
    for size, outputs in reversed(list(zip(heights, channels, strict=True))):
        if size == heights[-1]:
            for number in range(2):
                dec[f"{size}x{size}_in{number}"] = block(
                    width, width, decoder=True, attends=number == 0 and width >= 64
                )
        else:
            dec[f"{size}x{size}_up"] = block(width, width, decoder=True)
        for number in range(layers + 1):
            attends = size in attention
            dec[f"{size}x{size}_block{number}"] = block(width + skips.pop(), outputs, decoder=True, attends=attends)
            width = outputs
    unet = {
        "emb_fourier": fourier(),
        "emb_noise": mp(embedding, channels[0]),
        "emb_label": mp(embedding, classes) if classes else None,
        "enc": nn.ModuleDict(enc),
        "dec": nn.ModuleDict(dec),
        "out_conv": mp(images, channels[0], 3, 3),
        "out_gain": gain(),
        "label_balance": 0.5,
        "concat_balance": 0.5,
    }
    precond = {
        "unet": Persistent("UNet", unet),
        "logvar_fourier": fourier(),
        "logvar_linear": mp(1, channels[0]),
        "img_resolution": height,
        "img_channels": images,
        "label_dim": classes,
        "use_fp16": True,
        "sigma_data": 0.5,
        "_init_args": (),
        "_init_kwargs": EasyDict(img_resolution=height, dtype=torch.float16),
    }
    return Persistent("Precond", precond | attributes)


def write(path: Path, ema: Any, **others: Any) -> Path:
    """Write a file with a network under "ema"; needs `pretend_modules` in sys.modules."""
    content = EasyDict(dataset_kwargs=EasyDict(class_name="training.dataset.ImageFolderDataset"), ema=ema, **others)
    path.write_bytes(pickle.dumps(content))
    return path


def denoised(ema: nn.Module, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
    """D(x; sigma) by the formulas of EDM2's paper (arXiv 2312.02696, eqs. 4 to 8 and appendix B), in float64."""
    tensors = {name: value.double() for name, value in ema.state_dict().items()}
    x, sigma = x.double(), sigma.double()
    total = sigma.square() + 0.25
    c_skip, c_out, c_in = 0.25 / total, 0.5 * sigma / total.sqrt(), 1 / total.sqrt()
    each = (slice(None), None, None, None)
    return c_skip[each] * x + c_out[each] * _unet(tensors, c_in[each] * x, sigma.log() / 4, labels)


def _unit(x: Tensor, *dims: int) -> Tensor:
    return x / (1e-4 + x.square().mean(dims, keepdim=True).sqrt())


def _silu(x: Tensor) -> Tensor:
    return x * x.sigmoid() / 0.596


def _mix(a: Tensor, b: Tensor, t: float) -> Tensor:
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def _unet(tensors: Mapping[str, Tensor], x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
    def learned(name: str, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = tensors[f"unet.{name}.weight"]
        weight = _unit(weight, *range(1, weight.dim())) * gain / math.sqrt(weight[0].numel())
        return x @ weight.T if weight.dim() == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    def attention(name: str, x: Tensor) -> Tensor:
        heads = x.shape[1] // 64
        parts = _unit(learned(f"{name}.attn_qkv", x).reshape(len(x), heads, 64, 3, -1), 2)
        q, k, v = parts.unbind(3)
        weights = torch.einsum("bhcq,bhck->bhqk", q, k / 8.0).softmax(3)
        y = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(x.shape)
        return _mix(x, learned(f"{name}.attn_proj", y), 0.3)

    def block(name: str, x: Tensor) -> Tensor:
        full, encoder = f"unet.{name}", name.startswith("enc.")
        if name.endswith("_down"):
            x = F.avg_pool2d(x, 2)
        if name.endswith("_up"):
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        skip = learned(f"{name}.conv_skip", x) if f"{full}.conv_skip.weight" in tensors else x
        if encoder:
            x = skip = _unit(skip, 1)
        scale = 1 + learned(f"{name}.emb_linear", embedding, tensors[f"{full}.emb_gain"])
        y = learned(f"{name}.conv_res0", _silu(x)) * scale[:, :, None, None]
        x = _mix(skip, learned(f"{name}.conv_res1", _silu(y)), 0.3)
        x = attention(name, x) if f"{full}.attn_qkv.weight" in tensors else x
        return x.clip(-256, 256)

    angles = noise[:, None] * tensors["unet.emb_fourier.freqs"] + tensors["unet.emb_fourier.phases"]
    embedding = learned("emb_noise", math.sqrt(2) * angles.cos())
    if "unet.emb_label.weight" in tensors:
        classes = tensors["unet.emb_label.weight"].shape[1]
        one_hot = x.new_zeros(len(x), classes) if labels is None else F.one_hot(labels, classes).double()
        embedding = _mix(embedding, learned("emb_label", one_hot * math.sqrt(classes)), 0.5)
    embedding = _silu(embedding)
    names = {
        name.split(".")[1] + "." + name.split(".")[2]: None for name in tensors if ".enc." in name or ".dec." in name
    }
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    skips: list[Tensor] = []
    for name in names:
        if name.endswith("_conv"):
            x = learned(name, x)
        elif name.startswith("dec.") and "_block" in name:
            skip = skips.pop()
            n, m = x.shape[1], skip.shape[1]
            x = torch.cat([x / math.sqrt(n), skip / math.sqrt(m)], 1) * math.sqrt((n + m) / 2)
            x = block(name, x)
        else:
            x = block(name, x)
        if name.startswith("enc."):
            skips.append(x)
    return learned("out_conv", x, tensors["unet.out_gain"])
