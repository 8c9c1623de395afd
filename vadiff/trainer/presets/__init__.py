"""Ready-made configs."""

from . import imagenet, small

PRESETS = {**small.PRESETS, **imagenet.PRESETS}
ABOUT = {**small.ABOUT, **imagenet.ABOUT}

__all__ = ["ABOUT", "PRESETS"]
