"""Log-SNR per sample, λ = ln(alpha² / sigma²), from sigma, alpha and sigma, a table of ᾱ or a flow time.

Every function takes one value per sample, as a tensor or a NumPy array, and returns λ with shape [B], on the same
device, as float64 for float64 input and float32 otherwise. The limits of a process are legal: they give λ = ±inf, never
NaN. Values out of range are looked for on the CPU only: nothing here synchronises with a GPU, but for the first use of
a table there.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ops.problem import compute_dtype
from .schedule_checks import check_schedule

__all__ = ["from_alpha_sigma", "from_alphas_cumprod", "from_flow_time", "from_sigma"]

Values = Tensor | np.ndarray[Any, Any]

_PIXEL = 255.5  # noise levels of images with values up to 255 may be whole numbers
_FROM_TIMESTEPS = (
    "vadiff.log_snr.from_alphas_cumprod(scheduler.alphas_cumprod, timesteps), or for any diffusers scheduler "
    "vadiff.schedulers.log_snr_of(scheduler, timesteps)"
)


def from_sigma(sigma: Values) -> Tensor:
    """λ = -2 ln σ of a variance-exploding process (EDM, k-diffusion), where alpha = 1.

    For the σ of a variance-preserving process, √(1 - ᾱ), use `from_alpha_sigma` or `from_alphas_cumprod`.

    Args:
        sigma: [B] noise levels ≥ 0, any floating dtype. σ = 0 gives λ = +inf.

    Returns:
        λ, [B], float32 (float64 for float64 sigma).

    Raises:
        TypeError: sigma is not a floating-point tensor.
        ValueError: sigma is not one-dimensional or, on the CPU, has a negative value, or several whole numbers, some
            above 255, as timesteps are.

    Example:
        >>> from_sigma(torch.tensor([0.5, 80.0]))
        tensor([ 1.3863, -8.7641])
    """
    sigma = as_tensor("sigma", sigma)
    if not sigma.is_floating_point():
        raise TypeError(
            f"sigma has dtype {sigma.dtype}, expected a floating-point tensor. If these are timesteps, use "
            f"{_FROM_TIMESTEPS}; if they are noise levels, sigma.float()."
        )
    _require_one_per_sample("sigma", sigma)
    _require_range("sigma", sigma, 0.0, float("inf"), "sigma is a standard deviation")
    if may_read(sigma) and _are_timesteps(sigma):
        raise ValueError(
            f"sigma runs over whole numbers from {sigma.min().item():g} to {sigma.max().item():g}, expected standard "
            f"deviations of noise: these look like timesteps. Use {_FROM_TIMESTEPS}."
        )
    return (-2.0 * sigma.double().log()).to(compute_dtype(sigma))


def from_alpha_sigma(alpha: Values, sigma: Values) -> Tensor:
    """λ = 2 ln(alpha / sigma) of any process x_t = alpha·x0 + sigma·eps: SiT's paths, v-diffusion, sampled schedules.

    Args:
        alpha: [B] scales of the data ≥ 0, any floating dtype.
        sigma: [B] standard deviations of the noise ≥ 0, any floating dtype, on the same device.

    Returns:
        λ, [B], float32 (float64 if one of them is float64); +inf where sigma = 0, -inf where alpha = 0.

    Raises:
        TypeError: one is not a floating-point tensor.
        ValueError: they are not one-dimensional, differ in shape or device or, on the CPU, have a negative value or
            both are 0 for a sample.

    Example:
        >>> from_alpha_sigma(torch.tensor([0.8, 1.0]), torch.tensor([0.6, 80.0]))
        tensor([ 0.5754, -8.7641])
    """
    alpha, sigma = as_tensor("alpha", alpha), as_tensor("sigma", sigma)
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        _require_floating(name, value)
        _require_one_per_sample(name, value)
        _require_range(name, value, 0.0, float("inf"), "x_t = alpha·x0 + sigma·eps")
    if alpha.shape != sigma.shape or alpha.device != sigma.device:
        raise ValueError(
            f"alpha has shape {tuple(alpha.shape)} on {alpha.device}, sigma {tuple(sigma.shape)} on {sigma.device}: "
            "expected the same, one value per sample."
        )
    if may_read(alpha) and bool(((alpha == 0) & (sigma == 0)).any()):
        raise ValueError("alpha and sigma are both 0 for a sample, expected a sample with data or noise in it.")
    dtype = torch.promote_types(compute_dtype(alpha), compute_dtype(sigma))
    return (2.0 * (alpha.double().log() - sigma.double().log())).to(dtype)


def from_alphas_cumprod(alphas_cumprod: Values, timesteps: Values) -> Tensor:
    """λ = ln ᾱ - ln(1 - ᾱ) of a discrete variance-preserving schedule; ᾱ = alpha², DDPM's cumulative product.

    Args:
        alphas_cumprod: [T] table of ᾱ in [0, 1], falling, any floating dtype: diffusers' `scheduler.alphas_cumprod`,
            OpenAI's `diffusion.alphas_cumprod`. A table on the CPU is copied to the device of `timesteps` at every
            call; move it there once to save that. ᾱ = 0 (zero terminal SNR) gives λ = -inf, and ᾱ = 1, to which
            bfloat16 rounds the first timesteps, gives +inf. Each table is checked once, at its first use, which
            synchronises with its device.
        timesteps: [B] integers in [0, T), an index into the table.

    Returns:
        λ, [B], float32 (float64 for a float64 table), on the device of `timesteps`.

    Raises:
        TypeError: the table is not a floating-point tensor, or the timesteps are not integers.
        ValueError: a wrong shape or device; a table that is no falling ᾱ in [0, 1], or the alphas, betas or √ᾱ of a
            common schedule.
        IndexError: a timestep on the CPU is out of range.

    Example:
        >>> from_alphas_cumprod(torch.tensor([0.9, 0.5, 0.0]), torch.tensor([1, 2]))
        tensor([0., -inf])
    """
    alphas_cumprod, timesteps = as_tensor("alphas_cumprod", alphas_cumprod), as_tensor("timesteps", timesteps)
    _require_floating("alphas_cumprod", alphas_cumprod)
    if timesteps.is_floating_point() or timesteps.is_complex() or timesteps.dtype == torch.bool:
        raise TypeError(
            f"timesteps has dtype {timesteps.dtype}, expected integers that index alphas_cumprod. "
            "Use timesteps.long() if they are whole numbers; for continuous times use from_flow_time, or "
            "log_snr of vadiff.process.VPCosine or VPLinear."
        )
    _require_one_per_sample("timesteps", timesteps)
    check_schedule(alphas_cumprod)
    if alphas_cumprod.device != timesteps.device and alphas_cumprod.device.type != "cpu":
        raise ValueError(
            f"alphas_cumprod is on {alphas_cumprod.device}, timesteps on {timesteps.device}: expected the "
            "same device. Use timesteps.to(alphas_cumprod.device)."
        )
    timesteps, size = timesteps.long(), len(alphas_cumprod)
    if may_read(timesteps):
        low, high = int(timesteps.min()), int(timesteps.max())
        if low < 0 or high >= size:
            raise IndexError(
                f"timesteps run from {low} to {high}, expected 0 to {size - 1}: alphas_cumprod has {size} entries."
            )
    return log_snr_at(alphas_cumprod, timesteps).to(compute_dtype(alphas_cumprod))


def log_snr_at(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """λ of timesteps, int64 [B] on any device, of a table [T] of ᾱ; without checks. [B] float64."""
    # Without synchronising where the table is on the CPU and the timesteps are not.
    table = alphas_cumprod.to(timesteps.device, non_blocking=timesteps.device.type != "cpu")
    alpha_bar = table[timesteps].double()
    return alpha_bar.log() - torch.log1p(-alpha_bar)


def from_flow_time(t: Values, data_at: int = 0) -> Tensor:
    """λ = 2 ln(alpha / sigma) of the straight path of flow matching (rectified flow).

    Args:
        t: [B] times in [0, 1], any floating dtype.
        data_at: 0 where t = 0 is data: alpha = 1 - t, sigma = t (SD3, diffusers' `sigmas`);
            1 where t = 1 is data: alpha = t, sigma = 1 - t (torchcfm, flow_matching).

    Returns:
        λ, [B], float32 (float64 for float64 t); +inf at pure data, -inf at pure noise.

    Raises:
        TypeError: t is not a floating-point tensor.
        ValueError: t is not one-dimensional, `data_at` is neither 0 nor 1 or, on the CPU, a t outside [0, 1].

    Example:
        >>> from_flow_time(torch.tensor([0.0, 0.5, 1.0]))
        tensor([inf, 0., -inf])
    """
    t = as_tensor("t", t)
    _require_floating("t", t)
    _require_one_per_sample("t", t)
    if data_at not in (0, 1):
        raise ValueError(f"data_at is {data_at!r}, expected 0 (data at t = 0) or 1 (data at t = 1).")
    _require_range("t", t, 0.0, 1.0, "divide by num_train_timesteps if these are scheduler timesteps")
    time = t.double()
    log_t, log_rest = time.log(), torch.log1p(-time)
    return (2.0 * (log_t - log_rest if data_at == 1 else log_rest - log_t)).to(compute_dtype(t))


def _are_timesteps(sigma: Tensor) -> bool:
    """At least four different whole numbers, some beyond the noise levels of images with values up to 255."""
    values = sigma.detach()
    if values.numel() < 4 or not bool((values > _PIXEL).any()) or not bool((values == values.round()).all()):
        return False
    return len(values.unique()) >= 4


def as_tensor(name: str, value: Values) -> Tensor:
    """A tensor as it is, a NumPy array copied.

    Raises:
        TypeError: neither, or an array of a dtype that torch does not have.
    """
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a torch.Tensor or a NumPy array.")
    try:
        return torch.tensor(np.array(value, order="C"))  # torch takes no negative strides
    except TypeError as error:
        raise TypeError(
            f"{name} is a NumPy array of dtype {value.dtype}, expected numbers that torch has. Use "
            f"{name}.astype(numpy.float64), or int64 for timesteps."
        ) from error


def _require_floating(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}, expected a floating-point tensor. Use {name}.float().")


def _require_one_per_sample(name: str, value: Tensor) -> None:
    if value.dim() != 1:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, expected (B,): one value per sample. Use {name}.flatten()."
        )


def _require_range(name: str, value: Tensor, low: float, high: float, hint: str) -> None:
    if may_read(value) and bool(((value < low) | (value > high)).any()):
        raise ValueError(
            f"{name} runs from {value.min().item():g} to {value.max().item():g}, "
            f"expected values in [{low:g}, {high:g}]: {hint}."
        )


def may_read(value: Tensor) -> bool:
    """Whether Python may read the values without synchronising with a GPU or branching in compiled code."""
    return value.device.type == "cpu" and value.numel() > 0 and not torch.compiler.is_compiling()
