"""Log-SNR per sample, λ = ln(alpha² / sigma²), from sigma, a table of ᾱ or a flow time.

Every function takes one value per sample and returns λ with shape [B], on the same device, as float64 for
float64 input and float32 otherwise. The limits of a process are legal: they give λ = ±inf, never NaN. Nothing
here synchronises with a GPU: only CPU tensors are checked for values out of range.
"""

import torch
from torch import Tensor

__all__ = ["from_alphas_cumprod", "from_flow_time", "from_sigma"]


def from_sigma(sigma: Tensor) -> Tensor:
    """λ = -2 ln σ of a variance-exploding process (EDM, k-diffusion), where alpha = 1.

    Args:
        sigma: [B] noise levels ≥ 0, any floating dtype. σ = 0 gives λ = +inf.

    Returns:
        λ, [B], float32 (float64 for float64 sigma).

    Raises:
        TypeError: sigma is not a floating-point tensor.
        ValueError: sigma is not one-dimensional or, on the CPU, has a negative value.

    Example:
        >>> from_sigma(torch.tensor([0.5, 80.0]))
        tensor([ 1.3863, -8.7641])
    """
    _require_floating("sigma", sigma)
    _require_one_per_sample("sigma", sigma)
    _require_range("sigma", sigma, 0.0, float("inf"), "sigma is a standard deviation")
    return (-2.0 * sigma.double().log()).to(_result_dtype(sigma))


def from_alphas_cumprod(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """λ = ln ᾱ - ln(1 - ᾱ) of a discrete variance-preserving schedule; ᾱ = alpha², DDPM's cumulative product.

    Args:
        alphas_cumprod: [T] table of ᾱ in [0, 1], any floating dtype: diffusers' `scheduler.alphas_cumprod`.
            A table on the CPU is copied to the device of `timesteps` at every call; move it there once to
            save that. ᾱ = 0 (zero terminal SNR) gives λ = -inf.
        timesteps: [B] integers in [0, T), an index into the table.

    Returns:
        λ, [B], float32 (float64 for a float64 table), on the device of `timesteps`.

    Raises:
        TypeError: the table is not a floating-point tensor, or the timesteps are not integers.
        ValueError: a wrong shape or device.
        IndexError: a timestep on the CPU is out of range.

    Example:
        >>> from_alphas_cumprod(torch.tensor([0.9, 0.5, 0.0]), torch.tensor([1, 2]))
        tensor([0., -inf])
    """
    _require_floating("alphas_cumprod", alphas_cumprod)
    if alphas_cumprod.dim() != 1 or len(alphas_cumprod) == 0:
        raise ValueError(
            f"alphas_cumprod has shape {tuple(alphas_cumprod.shape)}, expected (T,): the schedule's whole "
            "table, not the values of a batch."
        )
    if timesteps.is_floating_point() or timesteps.is_complex() or timesteps.dtype == torch.bool:
        raise TypeError(
            f"timesteps has dtype {timesteps.dtype}, expected integers that index alphas_cumprod. "
            "Use timesteps.long() if they are whole numbers; for continuous times use from_flow_time, or "
            "log_snr of vadiff.process.VPCosine or VPLinear."
        )
    _require_one_per_sample("timesteps", timesteps)
    if alphas_cumprod.device != timesteps.device and alphas_cumprod.device.type != "cpu":
        raise ValueError(
            f"alphas_cumprod is on {alphas_cumprod.device}, timesteps on {timesteps.device}: expected the "
            "same device. Use timesteps.to(alphas_cumprod.device)."
        )
    size = len(alphas_cumprod)
    if _may_read(timesteps):
        low, high = int(timesteps.min()), int(timesteps.max())
        if low < 0 or high >= size:
            raise IndexError(
                f"timesteps run from {low} to {high}, expected 0 to {size - 1}: alphas_cumprod has {size} entries."
            )
    alpha_bar = alphas_cumprod.to(timesteps.device)[timesteps.long()].double()  # [B]
    return (alpha_bar.log() - torch.log1p(-alpha_bar)).to(_result_dtype(alphas_cumprod))


def from_flow_time(t: Tensor, data_at: int = 0) -> Tensor:
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
    _require_floating("t", t)
    _require_one_per_sample("t", t)
    if data_at not in (0, 1):
        raise ValueError(f"data_at is {data_at!r}, expected 0 (data at t = 0) or 1 (data at t = 1).")
    _require_range("t", t, 0.0, 1.0, "divide by num_train_timesteps if these are scheduler timesteps")
    time = t.double()
    log_t, log_rest = time.log(), torch.log1p(-time)
    return (2.0 * (log_t - log_rest if data_at == 1 else log_rest - log_t)).to(_result_dtype(t))


def _result_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _require_floating(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}, expected a floating-point tensor. Use {name}.float().")


def _require_one_per_sample(name: str, value: Tensor) -> None:
    if value.dim() != 1:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, expected (B,): one value per sample. Use {name}.flatten()."
        )


def _require_range(name: str, value: Tensor, low: float, high: float, hint: str) -> None:
    if _may_read(value) and bool(((value < low) | (value > high)).any()):
        raise ValueError(
            f"{name} runs from {value.min().item():g} to {value.max().item():g}, "
            f"expected values in [{low:g}, {high:g}]: {hint}."
        )


def _may_read(value: Tensor) -> bool:
    """Whether Python may read the values without synchronising with a GPU or branching in compiled code."""
    return value.device.type == "cpu" and value.numel() > 0 and not torch.compiler.is_compiling()
