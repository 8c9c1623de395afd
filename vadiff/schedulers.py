"""Noise levels of a training batch from an HF diffusers scheduler, or any other with the same tables.

A scheduler is recognised by its attributes, so diffusers is not imported here:

| has | noise | timesteps |
|---|---|---|
| `alphas_cumprod`: DDPM, DDIM, Euler, OpenAI's | variance preserving, ᾱ from the table | 0 to T-1 |
| `sigmas`, `timesteps`: EDM, consistency models | x0 + sigma·eps | values of `timesteps`, in EDM ln(sigma)/4 |
| `scale_noise`: flow matching | (1 - sigma)·x0 + sigma·eps | sigma·num_train_timesteps, shifted or not |

A scheduler whose `timesteps` are `sigmas` · num_train_timesteps is a flow even without `scale_noise`.

For the first two kinds log-SNR is interpolated between timesteps; for EDM this is exact, also beyond the ends.

Each call reads the tables anew, so later changes of the schedule take effect. A table on the CPU is copied to the
device of the timesteps without synchronising. Timesteps out of range raise on the CPU; on other devices they give NaN,
and a criterion skips those samples.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import process
from .log_snr import Values, as_tensor, from_alphas_cumprod, from_flow_time, from_sigma, log_snr_at, may_read
from .ops.problem import Coefficient
from .schedule_checks import check_schedule

__all__ = [
    "coefficients_of",
    "is_flow",
    "log_snr_of",
    "log_snr_range_of",
    "loss_form_of",
    "prediction_type_of",
    "sigma_data_of",
    "sigma_of",
    "timesteps_of",
]

_FAR = 1e4  # a log-SNR in place of an infinite one
_BY_ALPHA, _BY_SIGMA, _FLOW = "alphas_cumprod", "sigmas", "flow"
_LARGEST_UNIT = 20  # of schedules with fewer timesteps, [0, 1] is a part that may be drawn


def log_snr_of(scheduler: Any, timesteps: Values) -> Tensor:
    """λ = ln(alpha²/sigma²) of each sample, as the scheduler's `add_noise` or `scale_noise` mixes data and noise.

    Args:
        scheduler: see the table above.
        timesteps: [B], as passed to `add_noise`, a tensor or NumPy array; integers if the scheduler has integer
            timesteps.

    Returns:
        λ, [B] float32 on the device of `timesteps`; -inf at zero terminal SNR (`rescale_betas_zero_snr`) and at t = 1
        of a flow.

    Raises:
        TypeError: not such a scheduler; integer timesteps for a scheduler with floating-point ones.
        ValueError: timesteps are not [B] or, on the CPU, out of range, or times from 0 to 1 where timesteps go to
            1,000; a flow with `invert_sigmas` or `use_flow_sigmas`; sigmas in the opposite order of the timesteps
            (DPM-Solver, UniPC and DEIS before `set_timesteps`), with which `add_noise` uses the noise level of another
            timestep.
        IndexError: timesteps on the CPU beyond `alphas_cumprod`.

    Example:
        >>> loss = criterion(model_pred, target, log_snr_of(noise_scheduler, timesteps))
    """
    kind = _kind_of(scheduler)
    timesteps = _checked_timesteps(timesteps)
    if kind == _BY_ALPHA:
        _check_direction(scheduler)
        table = torch.as_tensor(scheduler.alphas_cumprod)
        if timesteps.is_floating_point():
            check_schedule(table)
            _check_not_times(timesteps, len(table) - 1)
            return _interpolate_alphas(table, timesteps)
        if table.device.type != "cpu":
            table = table.to(timesteps.device)
        return from_alphas_cumprod(table, timesteps).float()
    if not timesteps.is_floating_point():
        raise TypeError(
            f"timesteps has dtype {timesteps.dtype}, but {type(scheduler).__name__} has floating-point timesteps: "
            "integers may be indices into them. Use scheduler.timesteps[indices], or timesteps.float() if they are "
            "not indices."
        )
    if kind == _FLOW:
        _check_not_times(timesteps, _option(scheduler, "num_train_timesteps", 1000))
        return from_flow_time(_flow_time(scheduler, timesteps)).float()
    return _interpolate_sigmas(scheduler, timesteps)


def sigma_of(scheduler: Any, timesteps: Values) -> Tensor:
    """sigma of each sample by the scheduler's own definition, [B] float32.

    It is the value of the table `sigmas`: sigma/alpha for Euler and DPM-Solver, the noise level for EDM, the time for
    a flow. For a scheduler without that table (DDPM) it is the standard deviation √(1 - ᾱ) of the noise.

    Arguments and errors as for `log_snr_of`.
    """
    kind = _kind_of(scheduler)
    log_snr = log_snr_of(scheduler, timesteps).double()
    if kind == _FLOW:
        return _flow_time(scheduler, torch.as_tensor(timesteps))
    if kind == _BY_ALPHA and not isinstance(getattr(scheduler, "sigmas", None), Tensor):
        return log_snr.neg().sigmoid().sqrt().float()
    return log_snr.mul(-0.5).exp().float()


def is_flow(scheduler: Any) -> bool:
    """Whether the scheduler is one of flow matching: its timesteps are sigma · num_train_timesteps.

    Raises:
        TypeError, ValueError: as `log_snr_of`, for a scheduler that it does not take.
    """
    return _kind_of(scheduler) == _FLOW


def timesteps_of(scheduler: Any, log_snr: Tensor) -> Tensor:
    """The scheduler's timesteps with the nearest noise levels: the inverse of `log_snr_of`, to whole timesteps.

    The level actually used is `log_snr_of(scheduler, timesteps_of(scheduler, log_snr))`. Reads the tables on the CPU,
    so not for the hot path.

    Args:
        scheduler: see the table above.
        log_snr: [B], any floating dtype.

    Returns:
        [B] on the device of `log_snr`: int64 indices into `alphas_cumprod`, or values of `scheduler.timesteps`.

    Raises:
        TypeError: not such a scheduler; log_snr is not a floating-point tensor.
        ValueError: log_snr is not [B], or beyond the schedule by more than half a timestep.

    Example:
        >>> timesteps_of(noise_scheduler, torch.tensor([0.0, 4.0]))
        tensor([258,  37])
    """
    if not isinstance(log_snr, Tensor) or not log_snr.is_floating_point():
        raise TypeError(f"log_snr is {log_snr!r}, expected a floating-point tensor: ln(alpha**2/sigma**2) per sample")
    if log_snr.dim() != 1:
        raise ValueError(f"log_snr has shape {tuple(log_snr.shape)}, expected (B,): one value per sample")
    times, table = _table_of(scheduler)
    wanted = log_snr.detach().double().cpu()
    ends = table.clamp(-_FAR, _FAR).sort().values  # [T] rising, finite at zero terminal SNR
    low, high = ends[0] - 0.5 * (ends[1] - ends[0]), ends[-1] + 0.5 * (ends[-1] - ends[-2])
    if not bool(((wanted >= low) & (wanted <= high)).all()):
        raise ValueError(
            f"log_snr runs from {wanted.min():.4g} to {wanted.max():.4g}, expected {ends[0]:.4g} to {ends[-1]:.4g}: "
            "the noise levels of the scheduler"
        )
    nearest = (table.clamp(-_FAR, _FAR) - wanted[:, None]).abs().argmin(1)
    return times[nearest].to(log_snr.device)


def prediction_type_of(scheduler: Any) -> str:
    """The prediction type of the network, one of `vadiff.process.PREDICTION_TYPES`.

    `flow` for flow matching, `edm` for a scheduler with EDM's preconditioning (whose "epsilon" and "v_prediction"
    only set the sign of c_out), else the scheduler's `config.prediction_type`.

    Raises:
        ValueError: a prediction type that is none of these.
        TypeError: not such a scheduler.
    """
    if is_flow(scheduler):
        return "flow"
    if hasattr(scheduler, "precondition_outputs"):
        return "edm"
    found = _option(scheduler, "prediction_type")
    if found not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(
            f"{type(scheduler).__name__} has prediction_type {found!r}, expected 'epsilon', 'sample' or "
            "'v_prediction'. Pass prediction_type= where the network predicts one of vadiff.process.PREDICTION_TYPES."
        )
    return str(found)


def loss_form_of(scheduler: Any) -> str:
    """Form of the trainer's loss: `prediction_type_of`, but `sample` for EDM, where trainers compare images.

    A weight that is a function of SNR has to be converted to this form.

    Raises as `prediction_type_of`.
    """
    predicted = prediction_type_of(scheduler)
    return "sample" if predicted == "edm" else predicted


def coefficients_of(
    scheduler: Any, timesteps: Values, prediction_type: str | None = None
) -> tuple[Coefficient, Coefficient, Coefficient]:
    """(a, b, c) of the residual a·output + b·x0 + c·eps, for `criterion(output, x0, ..., noise=eps, coefficients=)`.

    For EDM schedulers `output` is the raw network output, before `precondition_outputs`, and the residual is the error
    of the denoised image; with their `v_prediction` c_out is negative.

    Args:
        scheduler, timesteps: as for `log_snr_of`.
        prediction_type: of the network, if not the scheduler's (train_unconditional.py has a flag for it).

    Returns:
        Numbers, or [B] float64 where they depend on the noise level. See `vadiff.process.coefficients`.

    Raises as `log_snr_of` and `prediction_type_of`.
    """
    return coefficients_at(scheduler, log_snr_of(scheduler, timesteps), prediction_type)


def coefficients_at(
    scheduler: Any, log_snr: Tensor, prediction_type: str | None = None
) -> tuple[Coefficient, Coefficient, Coefficient]:
    """`coefficients_of` for a log-SNR [B] computed before."""
    predicted = prediction_type_of(scheduler) if prediction_type is None else prediction_type
    log_snr = log_snr.double()
    if predicted == "edm":
        sigma = log_snr.mul(-0.5).exp()
        c_out, b, c = process.coefficients("edm", 1.0, sigma, sigma_data=sigma_data_of(scheduler))
        return process.EDMTerms(-c_out if _option(scheduler, "prediction_type") == "v_prediction" else c_out, b, c)
    # alpha and sigma of a variance-preserving process; a flow's coefficients do not depend on them.
    return process.coefficients(predicted, log_snr.sigmoid().sqrt(), log_snr.neg().sigmoid().sqrt())


def sigma_data_of(scheduler: Any) -> float:
    """The scheduler's standard deviation of the data; 0.5, EDM's, if it has none."""
    return float(_option(scheduler, "sigma_data", 0.5))


def log_snr_range_of(scheduler: Any) -> tuple[float, float]:
    """Lowest and highest finite log-SNR of the scheduler's tables. Synchronises with their device.

    Raises as `log_snr_of`.
    """
    _, log_snr = _table_of(scheduler)
    finite = log_snr[log_snr.isfinite()]
    return finite.min().item(), finite.max().item()


def _kind_of(scheduler: Any) -> str:
    name = type(scheduler).__name__
    if _option(scheduler, "use_flow_sigmas", False) or _option(scheduler, "invert_sigmas", False):
        raise ValueError(
            f"{name} has use_flow_sigmas or invert_sigmas, with which its timesteps are not those of training. "
            "Use FlowMatchEulerDiscreteScheduler, or vadiff.log_snr.from_flow_time(t, data_at=...)."
        )
    continuous = _option(scheduler, "timestep_type") == "continuous"
    if continuous and _option(scheduler, "prediction_type") == "v_prediction":  # EulerDiscreteScheduler
        return _BY_SIGMA
    if isinstance(getattr(scheduler, "alphas_cumprod", None), (Tensor, np.ndarray)):
        return _BY_ALPHA
    if hasattr(scheduler, "scale_noise") and hasattr(scheduler, "config"):
        return _FLOW
    if getattr(scheduler, "sigmas", None) is not None and getattr(scheduler, "timesteps", None) is not None:
        return _FLOW if _has_flow_timesteps(scheduler) else _BY_SIGMA
    raise TypeError(
        f"scheduler is a {name}, expected one with alphas_cumprod, with sigmas and timesteps, or with scale_noise "
        "(flow matching), like diffusers' training schedulers. For other schedules use vadiff.log_snr."
    )


def _has_flow_timesteps(scheduler: Any) -> bool:
    """Whether timesteps are sigmas · num_train_timesteps, as in flow schedulers without `scale_noise` (HunyuanVideo).

    A scheduler with `sigma_data` is EDM's: the tables are not read, because they may be on a GPU.
    """
    steps = _option(scheduler, "num_train_timesteps")
    if steps is None or _option(scheduler, "sigma_data") is not None:
        return False
    times = torch.as_tensor(scheduler.timesteps).cpu().double()
    sigmas = torch.as_tensor(scheduler.sigmas).cpu().double()[: len(times)]  # without an appended 0 or 1
    in_range = times.shape == sigmas.shape and bool((sigmas <= 1.0).all())
    return in_range and torch.allclose(times, sigmas * steps, rtol=1e-3, atol=1.0)


def _table_of(scheduler: Any) -> tuple[Tensor, Tensor]:
    """The timesteps of training and their log-SNR, on the CPU; each [T]."""
    if _kind_of(scheduler) == _BY_ALPHA:
        alphas_cumprod = torch.as_tensor(scheduler.alphas_cumprod).cpu()
        times = torch.arange(len(alphas_cumprod))
        return times, from_alphas_cumprod(alphas_cumprod, times).double()
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or len(timesteps) == 0:
        raise ValueError(f"{type(scheduler).__name__} has no timesteps of training: use a scheduler that has them")
    times = torch.as_tensor(timesteps).cpu()
    return times, log_snr_of(scheduler, times.float()).double()


def _option(scheduler: Any, name: str, default: Any = None) -> Any:
    """An entry of the scheduler's config, which is a dict with attributes."""
    return getattr(getattr(scheduler, "config", None), name, default)


def _checked_timesteps(timesteps: Values) -> Tensor:
    timesteps = as_tensor("timesteps", timesteps)
    if timesteps.dim() != 1:
        advice = "timesteps.expand(batch_size)" if timesteps.dim() == 0 else "timesteps.flatten()"
        raise ValueError(f"timesteps has shape {tuple(timesteps.shape)}, expected (B,): one per sample. Use {advice}.")
    return timesteps


def _check_not_times(timesteps: Tensor, last: int) -> None:
    """Raise ValueError for times from 0 to 1 in place of timesteps from 0 to `last`, on the CPU.

    One or two such values may be timesteps, by chance; three are all below 1 once in 10⁹ batches.
    """
    if not may_read(timesteps) or len(timesteps) < 3 or last <= _LARGEST_UNIT:
        return
    if bool((timesteps <= 1).all()) and bool((timesteps >= 0).all()) and len(timesteps.unique()) >= 3:
        raise ValueError(
            f"timesteps run from {timesteps.min().item():g} to {timesteps.max().item():g}, expected 0 to {last}: these "
            f"look like times from 0 to 1. Multiply them by {last}; or, for the times of a flow, "
            "use vadiff.log_snr.from_flow_time(t)."
        )


def _check_direction(scheduler: Any) -> None:
    sigmas, times = getattr(scheduler, "sigmas", None), getattr(scheduler, "timesteps", None)
    if not isinstance(sigmas, Tensor) or not isinstance(times, Tensor) or not (may_read(sigmas) and may_read(times)):
        return
    if sigmas[0] < sigmas[-1] and times[0] > times[-1]:
        raise ValueError(
            f"scheduler is a {type(scheduler).__name__} with sigmas that rise while its timesteps fall: its add_noise "
            "would mix in the noise of another timestep. Train with DDPMScheduler.from_config(scheduler.config)."
        )


def _to_device_of(table: Tensor, timesteps: Tensor) -> Tensor:
    """The table on the device of the timesteps, copied without synchronising."""
    return table.to(timesteps.device, non_blocking=timesteps.device.type != "cpu")


def _flow_time(scheduler: Any, timesteps: Tensor) -> Tensor:
    """t in [0, 1], data at 0. [B] float32.

    Timesteps up to one step beyond the end are clamped: musubi-tuner's are 1000·t + 1.
    """
    steps = _option(scheduler, "num_train_timesteps", 1000)
    position = timesteps.double()
    outside = ~((position >= 0) & (position <= steps + 1))  # true for NaN
    if may_read(timesteps) and bool(outside.any()):
        raise ValueError(
            f"timesteps run from {timesteps.min().item():g} to {timesteps.max().item():g}, expected 0 to {steps}: "
            "values of scheduler.timesteps, which are sigmas * num_train_timesteps."
        )
    return (position.clamp(max=steps) / steps).masked_fill(outside, math.nan).float()


def _interpolate_alphas(table: Tensor, timesteps: Tensor) -> Tensor:
    """λ at fractional timesteps, linear between the whole ones. [B] float32."""
    position, last = timesteps.double(), len(table) - 1
    outside = ~((position >= 0) & (position <= last))  # true for NaN
    if may_read(timesteps) and bool(outside.any()):
        raise IndexError(
            f"timesteps run from {timesteps.min().item():g} to {timesteps.max().item():g}, expected 0 to {last}: "
            f"alphas_cumprod has {last + 1} entries."
        )
    below = position.clamp(0, last).nan_to_num(0.0).floor().long()
    share = (position - below).clamp(0.0, 1.0)
    table = _to_device_of(table, timesteps)
    lower, upper = log_snr_at(table, below), log_snr_at(table, (below + 1).clamp(max=last))
    return _mix(lower, upper, share).masked_fill(outside, math.nan).float()


def _interpolate_sigmas(scheduler: Any, timesteps: Tensor) -> Tensor:
    """λ = -2 ln sigma, linear in the timestep between entries of the table and beyond its ends. [B] float32."""
    times = _to_device_of(torch.as_tensor(scheduler.timesteps), timesteps).double().flip(0)  # [T], rising
    sigmas = _to_device_of(torch.as_tensor(scheduler.sigmas), timesteps)[: len(times)].double().flip(0)  # no final 0
    position, span = timesteps.double(), times[-1] - times[0]
    outside = ~((position >= times[0] - span) & (position <= times[-1] + span))
    if may_read(timesteps) and bool(outside.any()):
        raise ValueError(
            f"timesteps run from {timesteps.min().item():g} to {timesteps.max().item():g}, expected values of "
            f"scheduler.timesteps, {times[0].item():g} to {times[-1].item():g}. Use scheduler.timesteps[indices], or "
            "vadiff.log_snr.from_sigma(sigmas) for noise levels of your own."
        )
    below = (torch.searchsorted(times, position, right=True) - 1).clamp(0, len(times) - 2)
    share = (position - times[below]) / (times[below + 1] - times[below])
    lower, upper = from_sigma(sigmas[below]), from_sigma(sigmas[below + 1])
    return _mix(lower, upper, share).masked_fill(outside, math.nan).float()


def _mix(lower: Tensor, upper: Tensor, share: Tensor) -> Tensor:
    """lower + share·(upper - lower); at share 0 and 1 exact even if the other end is infinite."""
    between = lower + share * (upper - lower)
    return torch.where(share == 0, lower, torch.where(share == 1, upper, between))
