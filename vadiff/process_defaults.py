"""Default arguments of `DiffusionLoss` for a noise process, used by `DiffusionLoss.for_process`."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from . import schedulers
from ._validation import require_known
from .errors import DiffusionLossWarning
from .process import EDM, PREDICTION_TYPES, DiscreteVP, Flow, NoiseProcess, VPCosine, VPLinear
from .statistics import checked_bins
from .weighting import MinSNR, SNRWeighting, VarianceAware, from_name, takes_prediction_type

_BIN = 0.25  # width in log-SNR: that of the default 128 bins over 32
_BIN_FINE_TUNING = 0.5  # a fine-tune sees some thousand samples, not millions
_FINE_TUNING_STRENGTH = 0.5
_EARLIEST, _LATEST = 1e-3, 1.0 - 1e-3  # ends of a continuous process, as for 1,000 steps

_PROCESSES: dict[str, NoiseProcess] = {
    "edm": EDM(),
    "flow": Flow(),
    "vp_cosine": VPCosine(),
    "vp_linear": VPLinear(),
}
STABLE_DIFFUSION = "stable_diffusion"


def available() -> tuple[str, ...]:
    """Names of processes that `DiffusionLoss.for_process` accepts, sorted."""
    return tuple(sorted([*_PROCESSES, STABLE_DIFFUSION]))


def arguments_for(
    process: Any, prediction_type: str | None = None, fine_tuning: bool = False, **overrides: Any
) -> dict[str, Any]:
    """Arguments of `DiffusionLoss`; see `DiffusionLoss.for_process`."""
    if prediction_type is not None:
        require_known("prediction_type", prediction_type, PREDICTION_TYPES)
    form, low, high = _form_and_range(process, prediction_type)
    width = _BIN_FINE_TUNING if fine_tuning else _BIN
    low, high = math.floor(low / width) * width, math.ceil(high / width) * width
    arguments: dict[str, Any] = {"log_snr_range": (low, high), **overrides}
    bounds = checked_bins(2, arguments["log_snr_range"])
    arguments.setdefault("bins", min(1024, max(2, math.ceil((bounds.high - bounds.low) / width))))
    weighting = overrides.get("weighting", "variance_aware")
    if weighting == "variance_aware":
        halved = fine_tuning and form not in ("edm", "flow")
        strength = _FINE_TUNING_STRENGTH if halved else 1.0
        # Two weights can differ by clip² at most; x0 losses of different levels differ by more.
        arguments["weighting"] = VarianceAware(strength, clip=math.inf) if form == "sample" else VarianceAware(strength)
    elif isinstance(weighting, str) and takes_prediction_type(weighting):
        if form is None:
            raise ValueError(
                f"weighting is {weighting!r}, which depends on the form of the loss, but prediction_type is "
                f"None: expected one of {', '.join(PREDICTION_TYPES)}"
            )
        arguments["weighting"] = from_name(
            weighting, prediction_type=form, sigma_data=schedulers.sigma_data_of(process)
        )
    elif isinstance(weighting, SNRWeighting) and form is not None and weighting.prediction_type != form:
        name = type(weighting).__name__
        raise ValueError(
            f"weighting is {name}(prediction_type={weighting.prediction_type!r}), expected {form!r}: the form of "
            f"this process's loss. Use {name}(prediction_type={form!r}), or pass prediction_type= for another form."
        )
    if problem := untrained_terminal_step(process, arguments.get("weighting")):
        warnings.warn(problem, DiffusionLossWarning, stacklevel=3)  # at the caller of `for_process`
    return arguments


def untrained_terminal_step(process: Any, weighting: Any) -> str | None:
    """What to say if a fixed weighting is 0 at the last timestep of a table that ends in pure noise; else None.

    min(S, gamma)/(S + 1), Min-SNR's weight of a loss of v, goes to 0 with S, and so does every weight of v, x0 or a
    velocity that is bounded on the loss of eps.
    """
    table = getattr(process, "alphas_cumprod", None)
    if table is None or not isinstance(weighting, SNRWeighting) or float(table[-1]) > 0.0:
        return None
    if weighting(torch.tensor([-math.inf])).item() > 0.0 or getattr(weighting, "terminal", None) is not None:
        return None
    remedy = "Use a weighting that is not 0 there, as constant."
    if isinstance(weighting, MinSNR):
        remedy = (
            f"MinSNR(prediction_type={weighting.prediction_type!r}, terminal=1.0) gives it the weight 1, as the code "
            "of its paper does; terminal=0.0 is the formula without this warning."
        )
    return (
        f"weighting {type(weighting).__name__} for {weighting.prediction_type!r} is 0 at zero SNR, and the last "
        "timestep of the process is pure noise (zero terminal SNR): samples start there, and it is not trained. "
        f"{remedy}"
    )


def resolved(process: Any) -> Any:
    """The noise process or scheduler that a name stands for; anything else unchanged.

    Raises:
        ValueError: an unknown name.
    """
    if not isinstance(process, str):
        return process
    if process == STABLE_DIFFUSION:
        return DiscreteVP.scaled_linear()
    require_known("process", process, available())
    return _PROCESSES[process]


def log_snr_range_of(process: Any) -> tuple[float, float]:
    """Lowest and highest log-SNR of a process, which `DiffusionLoss.for_process` takes for its bins.

    Raises:
        ValueError: an unknown name, or a scheduler that `vadiff.schedulers.log_snr_of` refuses.
        TypeError: not a process.
    """
    process = resolved(process)
    if isinstance(process, NoiseProcess) and not isinstance(process, DiscreteVP):
        ends = (0.002, 80.0) if isinstance(process, EDM) else (_EARLIEST, _LATEST)  # EDM's sigma_min and sigma_max
        low, high = sorted(process.log_snr(torch.tensor(ends, dtype=torch.float64)).tolist())
        return low, high
    try:
        return schedulers.log_snr_range_of(process)
    except TypeError as error:
        raise TypeError(
            f"process is a {type(process).__name__}, expected a name ({', '.join(available())}), an object from "
            "vadiff.process, or a diffusers scheduler"
        ) from error


def _form_and_range(process: Any, prediction_type: str | None) -> tuple[str | None, float, float]:
    """Form of the loss (None if unknown), lowest and highest log-SNR."""
    process = resolved(process)
    low, high = log_snr_range_of(process)
    if isinstance(process, NoiseProcess):
        implied = "edm" if isinstance(process, EDM) else "flow" if isinstance(process, Flow) else None
        return prediction_type or implied, low, high
    return prediction_type or schedulers.loss_form_of(process), low, high
