"""A batch as diffusers' training scripts have it when they compute their loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

SHAPES = {"image": (6, 4, 8, 8), "video": (6, 4, 3, 8, 8)}


def scheduler_for(form: str, **options: Any) -> Any:
    if form == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return DDPMScheduler(prediction_type=form, **options)


def batch(scheduler: Any, shape: tuple[int, ...] = SHAPES["image"], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pred, clean, noise = torch.randn(3, *shape, generator=generator)
    indices = torch.randint(0, 1000, shape[:1], generator=generator)
    timesteps = scheduler.timesteps[indices] if hasattr(scheduler, "scale_noise") else indices
    return {"model_pred": pred.requires_grad_(), "clean": clean, "noise": noise, "timesteps": timesteps}


def target_of(form: str, scheduler: Any, values: dict[str, Tensor]) -> Tensor:
    """What the scripts compare with."""
    clean, noise = values["clean"], values["noise"]
    if form == "v_prediction":
        return scheduler.get_velocity(clean, noise, values["timesteps"])
    return {"epsilon": noise, "sample": clean, "flow": noise - clean}[form]


def gradient_of(loss: Tensor, values: dict[str, Tensor]) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, values["model_pred"], retain_graph=True)
    return gradient


def ulps(found: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the last place of the expected value."""
    spacing = np.spacing(expected.detach().abs().numpy())
    return float(np.max((found - expected).detach().abs().numpy() / spacing))
