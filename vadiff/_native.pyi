"""What csrc/module.cpp defines; tests/test_csrc.py compares the two. An address of 0 stands for "not given"."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .reference import Bins, Coefficient, TableRule

INTERFACE: int
cuda_architectures: str | None

class Settings:
    def __init__(
        self,
        bins: int,
        low: float,
        high: float,
        half_life: float,
        statistic: str,
        strength: float,
        smoothing: float,
        log_clip: float,
        prior: float,
        radius: int,
        /,
    ) -> None: ...

class Inputs:
    def __init__(
        self,
        output: int,
        output_dtype: int,
        target: int,
        target_dtype: int,
        noise: int,
        noise_dtype: int,
        a_each: int,
        b_each: int,
        c_each: int,
        a: float,
        b: float,
        c: float,
        huber_delta: float,
        elements: int,
        /,
    ) -> None: ...

class Where:
    def __init__(self, device: int, stream: int, workspace: int, /) -> None: ...

def diffusion_loss(
    inputs: Inputs,
    log_snr: int,
    base_weight: int,
    sample_weight: int,
    weight: int,
    state: int,
    log_weights: int,
    settings: Settings,
    samples: int,
    loss: int,
    mean: bool,
    ell: int,
    saved: int,
    gradient: int,
    update: bool,
    batch: int,
    where: int | Where,
    /,
) -> None: ...
def diffusion_loss_backward(
    inputs: Inputs,
    upstream: int,
    stride: int,
    mean: bool,
    saved: int,
    samples: int,
    gradient: int,
    where: int | Where,
    /,
) -> None: ...
def scale_gradient(
    gradient: int, out: int, dtype: int, size: int, upstream: int, mean_loss: int, where: int | Where, /
) -> None: ...
def reweight(
    loss: int,
    dtype: int,
    log_snr: int,
    sample_weight: int,
    weight: int,
    state: int,
    log_weights: int,
    settings: Settings,
    samples: int,
    saved: int,
    update: bool,
    batch: int,
    where: int | Where,
    /,
) -> None: ...
def fold(parts: int, count: int, state: int, log_weights: int, settings: Settings, where: int | Where, /) -> None: ...

# The short way of vadiff/eager.py.

class Losses:
    """Per-sample losses of a criterion's last step."""

    tensor: Tensor | None  # on a CUDA device
    def __init__(self) -> None: ...
    def copy(self) -> bytearray: ...

def know_torch(
    tensor: type[Tensor],
    dtypes: tuple[torch.dtype, ...],
    exchange: object,
    empty_like: Callable[[Tensor], Tensor],
    scalar: Tensor,
    threads: Callable[[], int],
    cuda: int,
    settings_of: Callable[..., Settings],
    usable: Callable[[int], bool],
    stream: Callable[[int], int],
    forward: tuple[tuple[Any, object], ...],
    backward: tuple[tuple[Any, object], ...],
    /,
) -> bool: ...
def direct_step(
    prediction: Tensor,
    target: Tensor,
    noise: Tensor | None,
    coefficients: tuple[Coefficient, Coefficient, Coefficient] | None,
    log_snr: Tensor,
    base_weight: Tensor | None,
    sample_weight: Tensor | None,
    weigh: Callable[[Tensor], Tensor] | None,
    state: Tensor,
    log_weights: Tensor,
    bins: Bins,
    half_life: float,
    rule: TableRule,
    huber_delta: float,
    backend: str,
    losses: Losses,
    /,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor] | None: ...  # loss, gradient; on a CUDA device saved too
def direct_scale(upstream: Tensor, gradient: Tensor, saved: Tensor = ..., /) -> bool: ...
def cpu_instruction_sets() -> tuple[str, ...]: ...
def cpu_select(name: str, /) -> None: ...
def cpu_selected() -> str: ...
def cuda_workspace_size(samples: int, elements: int, bins: int, device: int, /) -> int: ...
