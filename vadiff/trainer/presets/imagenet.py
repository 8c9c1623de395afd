"""EDM2's networks for ImageNet at their sizes, config G (arXiv 2312.02696).

The paper's: widths, three blocks per resolution, attention at 16 and 8, learning rates and their decay, ramp of ten
million images, batch, dropout, durations, noise levels, learned weighting, no label dropout (guidance is by a second
network), no flips, averages of 0.05 and 0.10 and their snapshots every 8 Mi images. Not the paper's: bf16 in place of
fp16, whose gradient scaler keeps a step out of a CUDA graph; and the plain running average, which is that of its config
A.
"""

import math
from typing import Any, NamedTuple

from ..config import TrainConfig

_MI = 2**20  # images
_BATCH = 2048
_HALF_LIFE = 50e6  # images, of the running average of config A


class _Size(NamedTuple):
    width: int  # of the highest resolution; the others have 2, 3 and 4 times that
    rate: float
    dropout: float
    duration: int  # in Mi images


_PIXELS = {
    "xs": _Size(128, 0.0120, 0.0, 1024),
    "s": _Size(192, 0.0100, 0.0, 1024),
    "m": _Size(256, 0.0090, 0.1, 2048),
    "l": _Size(320, 0.0080, 0.1, 1024),
    "xl": _Size(384, 0.0070, 0.1, 640),
}
_LATENTS = {
    "xs": _Size(128, 0.0120, 0.0, 2048),
    "s": _Size(192, 0.0100, 0.0, 2048),
    "m": _Size(256, 0.0090, 0.1, 2048),
    "l": _Size(320, 0.0080, 0.1, 1792),
    "xl": _Size(384, 0.0070, 0.1, 1280),
    "xxl": _Size(448, 0.0065, 0.1, 896),
}


def _config(size: _Size, **different: Any) -> TrainConfig:
    return TrainConfig(
        image_size=64,
        sigma_data=0.5,
        weighting="learned",
        model="edm2",
        channels=tuple(factor * size.width for factor in (1, 2, 3, 4)),
        layers_per_block=3,
        attention_resolutions=(16, 8),
        dropout=size.dropout,
        class_conditional=True,
        label_dropout=0.0,
        steps=size.duration * _MI // _BATCH,
        batch_size=_BATCH,
        learning_rate=size.rate,
        betas=(0.9, 0.99),
        warmup=round(10e6 / _BATCH),
        warmup_from_zero=True,
        schedule="inverse_sqrt",
        clip=math.inf,
        ema_decay=0.5 ** (_BATCH / _HALF_LIFE),
        ema_rampup=0.05,
        sigma_rel=(0.05, 0.10),
        snapshot_every=8 * _MI // _BATCH,
        precision="bf16",
        graph=True,  # on a CUDA device, with a compiled network
        log_every=100,
        checkpoint_every=8 * _MI // _BATCH,
        samples_every=16 * _MI // _BATCH,
        held_out_every=32 * _MI // _BATCH,
        **different,
    )


def _pixels(size: _Size) -> TrainConfig:
    return _config(size, dataset="images", p_mean=-0.8, p_std=1.6, schedule_steps=35_000)


def _latents(size: _Size) -> TrainConfig:
    return _config(size, dataset="latents", image_channels=4, p_mean=-0.4, p_std=1.0, schedule_steps=70_000)


PRESETS = {
    **{f"img64-{name}": _pixels(size) for name, size in _PIXELS.items()},
    **{f"img512-latent-{name}": _latents(size) for name, size in _LATENTS.items()},
}

ABOUT = {
    **{f"img64-{name}": f"EDM2's {name.upper()} for ImageNet at 64 x 64 pixels" for name in _PIXELS},
    **{f"img512-latent-{name}": f"EDM2's {name.upper()} for latents of ImageNet at 512 x 512" for name in _LATENTS},
}
