"""The data types of one call: `Problem` (constants), `Inputs`, `State` (updated in place) and `Step` (results).

Every backend is a module with four functions:

    step(problem, inputs, state, *, gradient, update, gather) -> Step
    backward(problem, inputs, per_sample, upstream) -> Tensor        gradient of a loss that `step` returned
    scale(gradient, upstream) -> None                                gradient *= upstream, a scalar
    reweight(problem, inputs, state, *, update, gather) -> Tensor    factors of losses computed elsewhere

`vadiff.ops.reference` defines what they compute. Backends do not check their inputs: `make_inputs` checks those of
users, `vadiff.ops.operators` brings prediction, target and noise into one dense layout with the batch outermost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._validation import check_elements, check_per_sample, check_prediction, is_number

Coefficient = float | Tensor  # one number, or one per sample [B]
Gather = Callable[[Tensor], Tensor]  # batch statistics [4K + 5] of this rank -> [ranks, 4K + 5]

REDUCTIONS = ("mean", "none")


class Bins(NamedTuple):
    """K equal-width intervals of log-SNR; values outside fall in the end bins."""

    size: int  # K
    low: float
    high: float

    @property
    def width(self) -> float:
        return (self.high - self.low) / self.size

    @property
    def inv_width(self) -> float:
        return self.size / (self.high - self.low)

    def centers(self, device: torch.device) -> Tensor:
        """Log-SNR in the middle of each bin. [K] float32."""
        ks = torch.arange(self.size, dtype=torch.float64, device=device)
        return (self.low + (ks + 0.5) * self.width).float()


class TableRule(NamedTuple):
    """Parameters of an adaptive weight table; `statistic` "" means no table (fixed weighting)."""

    statistic: str = ""  # "std", "mean" or "rms" of the base loss
    strength: float = 1.0
    smoothing: float = 0.5  # h, in log-SNR units
    clip: float = 10.0
    prior: float = 32.0

    def radius(self, bins: Bins) -> int:
        """Bins within three smoothing widths, to each side (the slack keeps exact multiples inside)."""
        return int(min(3.0 * self.smoothing / bins.width + 1e-6, bins.size - 1))


NO_TABLE = TableRule()


class Problem(NamedTuple):
    """What is constant over the calls of a criterion."""

    bins: Bins
    half_life: float  # mean number of samples per bin after which a sample counts half
    rule: TableRule = NO_TABLE
    huber_delta: float = 0.0  # 0: squared error
    sync: bool = True  # merge the statistics of all ranks
    backend: str = "auto"


class Inputs(NamedTuple):
    """The inputs of one call. For `reweight`, `prediction` holds the per-sample losses [B], and a = 1, b = c = 0.

    [B]-shaped tensors are contiguous, float32 (float64 with a float64 prediction); log_snr is always float32."""

    prediction: Tensor  # F [B, ...], float32, bfloat16, float16 or float64
    target: Tensor | None  # x0 [B, ...], any of these dtypes; None: not read
    noise: Tensor | None  # eps [B, ...], likewise
    a: Coefficient
    b: Coefficient
    c: Coefficient
    log_snr: Tensor  # [B] float32
    base_weight: Tensor | None  # u [B]; None: 1
    sample_weight: Tensor | None  # v [B]; None: 1
    weight: Tensor | None  # w [B]; None: from the table, or 1 without a table
    mean: bool  # reduction "mean"; False: "none"
    plan: Plan | None = None  # None: `vadiff.ops` has to look at the tensors of this call


@dataclass(slots=True, eq=False)
class Plan:
    """What follows from how the tensors of a call look, for all calls that look alike; see `vadiff.ops.plan`.

    A call has a plan only if nothing observes it and kernels can read all its tensors as they are."""

    kind: tuple[Any, ...]  # the problem, and what else is no tensor: of numbers whether they are 0
    fits: Callable[..., bool]  # whether tensors look like those of the first call
    reads_target: bool
    reads_noise: bool
    mean: bool
    kernels: Any  # module of the backend
    prepared: Any = None  # what a backend keeps for the next call


class State(NamedTuple):
    """The buffers of a criterion that a call reads and, in training, updates in place."""

    # int64 [6K + 14]. At 0: bits of float64 count n, mean, M2 (sum of squared deviations) and mass (sum of v), [4, K].
    # At 4K: number of skipped samples; ticket by which a CUDA kernel counts its finished blocks, 0 between calls.
    # At 4K + 2: bits of float64 [12], the fields of `StateTotals`.
    # At 4K + 14: bits of float64 [2, K]: a level sampler's share of draws in each bin (all 0: not known), mean v there.
    state: Tensor
    log_weights: Tensor  # int32 [K]: bits of float32 ln w at the bin centres


class Step(NamedTuple):
    """The results of a step."""

    loss: Tensor  # scalar, or [B] for reduction "none"
    per_sample: Tensor  # [4, B], rows ELL, FACTOR, SLOPE, MASKED
    gradient: Tensor  # of the mean loss by the prediction, in its dtype and layout; [0] if not requested


def state_size(bins: int) -> int:
    """Entries of `State.state`."""
    return 6 * bins + 14


class StateTotals(NamedTuple):
    """The numbers of a state that belong to no bin, float64 each, in their order."""

    below: Tensor  # samples below and above the range, forgotten like n
    above: Tensor
    level_free: Tensor  # sum of B*L since the last read, L being the level-free loss
    samples: Tensor  # sum of B since then
    covariance: Tensor  # decayed sum of S*V over calls, S the sum of v*g and V that of v*mu
    variance: Tensor  # decayed sum of V*V
    size: Tensor  # decayed sum of |S|
    recorded: Tensor  # decayed sum of N, the samples recorded
    mass: Tensor  # decayed sum of v
    sampled_mass: Tensor  # decayed sum of the v that the sampler gives
    since_shares: Tensor  # samples recorded since the sampler's shares were set
    last_read: Tensor  # the level-free loss last read


# What the statistics of a batch [4K + 5] hold after the bins' moments: sums over its samples. Below and above: those
# that entered an end bin from outside the range.
BATCH_TOTALS = ("skipped", "loss", "samples", "below", "above")  # loss: of v*g, samples: B, both over all samples

# Rows of `Step.per_sample`.
ELL = 0  # ell
FACTOR = 1  # w*u*v, 0 where masked: the gradient's factor
SLOPE = 2  # w*v*ell, 0 where masked: derivative of the weighted loss by u
MASKED = 3  # 1 where u = 0 or v = 0, else 0


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for a float64 tensor, else float32. The prediction's is that of a call's arithmetic."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def make_inputs(
    prediction: Tensor,
    target: Tensor,
    log_snr: Tensor,
    noise: Tensor | None,
    coefficients: tuple[Coefficient, Coefficient, Coefficient] | None,
    base_weight: Tensor | None,
    sample_weight: Tensor | None,
    reduction: str,
) -> Inputs:
    """Check the arguments of `DiffusionLoss.forward`. A tensor whose coefficient is the number 0 is dropped.

    Raises:
        ValueError, TypeError: a bad argument; the message names it, what it is and what was expected.
    """
    check_prediction("prediction", prediction)
    shape, device, dtype = prediction.shape, prediction.device, compute_dtype(prediction)
    samples = shape[0]
    check_elements("target", target, shape, device)
    a: Coefficient = 1.0
    b: Coefficient = -1.0
    c: Coefficient = 0.0
    if coefficients is not None or noise is not None:
        if noise is not None:
            check_elements("noise", noise, shape, device)
        a, b, c = _check_coefficients(coefficients, noise, samples, device, dtype)
    log_snr = check_per_sample("log_snr", log_snr, samples, device, torch.float32)
    if base_weight is not None:
        base_weight = check_per_sample("base_weight", base_weight, samples, device, dtype, differentiable=True)
    if sample_weight is not None:
        sample_weight = check_per_sample("sample_weight", sample_weight, samples, device, dtype)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, expected one of {', '.join(REDUCTIONS)}")
    target_read = target if isinstance(b, Tensor) or b != 0.0 else None
    noise_read = noise if isinstance(c, Tensor) or c != 0.0 else None
    return Inputs(
        prediction, target_read, noise_read, a, b, c, log_snr, base_weight, sample_weight,
        weight=None, mean=reduction == "mean",
    )  # fmt: skip


def check_state(state: State, bins: Bins, name: str, tensor: Tensor) -> State:
    """Check the buffers that a call on `tensor` reads and updates, because kernels write into them; return them.

    Raises:
        ValueError: they are on another device than `tensor`, the argument `name`.
        RuntimeError: they have another dtype or size than the bins need.
    """
    moments, log_weights = state
    for buffer in state:
        if buffer.device != tensor.device:
            advice = f"Use criterion.to({str(tensor.device)!r})."
            raise ValueError(f"{name} is on {tensor.device}, but the criterion is on {buffer.device}. {advice}")
    found = moments.dtype, log_weights.dtype, moments.numel(), log_weights.numel()
    if found != (torch.int64, torch.int32, state_size(bins.size), bins.size):
        raise RuntimeError(
            f"the criterion's statistics are {moments.dtype} {tuple(moments.shape)} and {log_weights.dtype} "
            f"{tuple(log_weights.shape)}, expected torch.int64 ({state_size(bins.size)},) and torch.int32 "
            f"({bins.size},): bits of floats, which module.type(...) destroys and module.to(...) keeps. "
            "Make a new criterion"
        )
    return state


def make_loss_inputs(loss_per_sample: Tensor, log_snr: Tensor, sample_weight: Tensor | None) -> Inputs:
    """Check the arguments of `DiffusionLoss.reweight`.

    Raises:
        ValueError, TypeError: a bad argument; the message names it, what it is and what was expected.
    """
    check_prediction("loss_per_sample", loss_per_sample)
    dtype = compute_dtype(loss_per_sample)
    samples, device = loss_per_sample.shape[0], loss_per_sample.device
    loss = check_per_sample("loss_per_sample", loss_per_sample, samples, device, dtype, differentiable=True)
    log_snr = check_per_sample("log_snr", log_snr, samples, device, torch.float32)
    if sample_weight is not None:
        sample_weight = check_per_sample("sample_weight", sample_weight, samples, device, dtype)
    return Inputs(loss, None, None, 1.0, 0.0, 0.0, log_snr, None, sample_weight, weight=None, mean=False)


def _check_coefficients(
    coefficients: object, noise: Tensor | None, samples: int, device: torch.device, dtype: torch.dtype
) -> list[Coefficient]:
    """[a, b, c] of r = a*prediction + b*target + c*noise; a nonzero c requires noise."""
    if coefficients is None:
        raise ValueError("noise is given without coefficients: pass coefficients=(a, b, c), or leave noise out")
    if not isinstance(coefficients, (tuple, list)) or len(coefficients) != 3:
        got = f"{len(coefficients)} values" if isinstance(coefficients, (tuple, list)) else type(coefficients).__name__
        raise ValueError(f"coefficients is {got}, expected (a, b, c) of the residual a*prediction + b*target + c*noise")
    checked: list[Coefficient] = []
    for name, value in zip("abc", coefficients, strict=True):
        if isinstance(value, Tensor):
            checked.append(check_per_sample(f"coefficients {name}", value, samples, device, dtype))
        elif is_number(value):
            checked.append(float(value))
        else:
            raise TypeError(
                f"coefficients {name} is a {type(value).__name__}, expected a number or a tensor of shape ({samples},)"
            )
    c = checked[2]
    if noise is None and (isinstance(c, Tensor) or c != 0.0):
        raise ValueError("coefficients has a c for the noise, but noise is None: pass noise=eps")
    return checked
