"""Optimisation: learning rate, clipping, the optimiser's step, the running average of the weights."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..config import TrainConfig


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """The learning rate of step 0, 1, ...: a linear warm-up times the schedule."""
    done = step / config.steps
    if config.schedule == "linear":
        factor = 1.0 - done
    elif config.schedule == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * done))
    elif config.schedule == "inverse_sqrt":  # EDM2 (arXiv 2312.02696), eq. 67
        factor = 1.0 / math.sqrt(max(step / config.schedule_steps, 1.0))
    else:
        factor = 1.0
    done_warm = step if config.warmup_from_zero else step + 1
    warm = min(done_warm / config.warmup, 1.0) if config.warmup else 1.0
    return config.learning_rate * warm * factor


class Optimisation:
    """An optimiser that skips steps with a non-finite loss or gradient, without waiting for the device.

    The learning rate is a number on the device, so that a captured step reads the one of its step.

    Args:
        config: optimiser, clipping, precision.
        parameters: what is trained.
        device: where they are.
    """

    def __init__(self, config: TrainConfig, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self._config = config
        self._parameters = list(parameters)
        self._learning_rate = torch.zeros((), device=device)
        options: dict[str, Any] = {"lr": self._learning_rate, "betas": config.betas, "fused": True}
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(self._parameters, weight_decay=config.weight_decay, **options)
        else:
            self.optimizer = torch.optim.Adam(self._parameters, **options)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        # Sums since the last line of metrics: loss, gradient norm and clipped steps of the finite steps, number of
        # finite steps; then non-finite steps: in the whole run, in a row up to now, and in the longest row.
        self.totals = torch.zeros(7, dtype=torch.float64, device=device)
        self._zero, self._one = torch.zeros((), device=device), torch.ones((), device=device)
        self._nan = torch.full((), math.nan, device=device)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one part of a batch, NaN if the loss is non-finite.

        An infinite loss may have a finite gradient (Huber's loss of an infinite prediction), which neither the gradient
        scaler nor the gradient norm would detect. Averaging spreads the NaN to all ranks, so all skip the step, without
        waiting for a device.
        """
        parts = self._config.accumulate
        scaled = self.scaler.scale(loss if parts == 1 else loss / parts)
        scaled.backward(torch.where(loss.isfinite(), self._one, self._nan).to(scaled.dtype))

    def prepare(self, step: int) -> None:
        """What the host does before step 0, 1, ...: set the learning rate."""
        self._learning_rate.fill_(learning_rate_at(self._config, step))

    def step(self, loss: Tensor) -> None:
        """Update the weights unless the gradient is non-finite, and clear the gradient.

        Args:
            loss: of the whole batch, for the totals.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        # As torch's get_total_norm, without its check of every gradient's device.
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self._config.clip < math.inf:
            nn.utils.clip_grads_with_norm_(self._parameters, self._config.clip, norm, foreach=True)
        finite = norm.isfinite()
        broken = (~finite).float()
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # As GradScaler does: fused optimisers then skip the step on the device, without a synchronisation.
            self.optimizer.found_inf = broken  # type: ignore[attr-defined]
            with self._capturable():
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._count(loss, norm, finite, broken)

    @contextlib.contextmanager
    def _capturable(self) -> Iterator[None]:
        """torch refuses to capture an optimiser that is not `capturable`, and warns of one that is when it is not
        captured. For the fused ones it means nothing else."""
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        for group in self.optimizer.param_groups if capturing else ():
            group["capturable"] = True
        yield
        for group in self.optimizer.param_groups if capturing else ():
            group["capturable"] = False

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state, with the learning rate as a number."""
        state = self.optimizer.state_dict()
        rate = float(self._learning_rate)
        state["param_groups"] = [{**group, "lr": rate} for group in state["param_groups"]]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned; the learning rate stays on the device."""
        self.optimizer.load_state_dict(state)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate.fill_(group["lr"])

    def _count(self, loss: Tensor, norm: Tensor, finite: Tensor, broken: Tensor) -> None:
        """Update the totals in few operations: each is a launch on a GPU, and costs some µs anywhere."""
        clipped = (norm > self._config.clip).float() if self._config.clip < math.inf else self._zero
        self.totals[:4] += torch.stack([loss, norm, clipped, self._one]).where(finite, self._zero)
        skipped, in_a_row, longest = self.totals[4:].unbind()
        skipped += broken
        in_a_row.add_(1.0).mul_(broken)
        torch.maximum(longest, in_a_row, out=longest)


class LateReading:
    """Reads a number on the device, without waiting for what the device has yet to do: as it was one reading before.

    On a CPU, which nothing has to wait for, as it is.
    """

    def __init__(self, number: Tensor) -> None:
        self._number = number
        self._copied = torch.cuda.Event() if number.device.type == "cuda" else None
        self._copy = torch.zeros_like(number, device="cpu", pin_memory=self._copied is not None)
        self._step = 0

    def __call__(self, step: int) -> tuple[float, int]:
        """The number, and the step after which it was that; to be called after `step` steps."""
        if self._copied is None:
            return float(self._number), step
        self._copied.synchronize()  # with the copy of the reading before, not with the steps since
        earlier = float(self._copy), self._step
        self._copy.copy_(self._number, non_blocking=True)
        self._copied.record(torch.cuda.current_stream(self._number.device))
        self._step = step
        return earlier


def decay_at(config: TrainConfig, step: int) -> float:
    """The decay of the running average after step 0, 1, ...: `ema_decay`, or less while it ramps up.

    With the ramp-up the average's half-life is at most `ema_rampup` times the images so far, as in the code of EDM.
    """
    if not config.ema_rampup or not config.ema_decay:
        return config.ema_decay
    half_life = min(math.log(0.5) / math.log(config.ema_decay), config.ema_rampup * step)  # in steps
    return 0.5 ** (1.0 / half_life) if half_life > 0.0 else 0.0


class RunningAverage:
    """Exponential moving average of a network's parameters, ema ← decay·ema + (1 - decay)·parameter."""

    def __init__(self, average: nn.Module, network: nn.Module, config: TrainConfig) -> None:
        self._config = config
        self._average: list[Tensor] = list(average.parameters())
        self._network: list[Tensor] = list(network.parameters())
        self._update = get_ema_multi_avg_fn(config.ema_decay)
        # On the device, so that a captured step reads the one of its step.
        self._new_share = torch.zeros((), device=self._network[0].device) if config.ema_rampup else None

    def prepare(self, step: int) -> None:
        """What the host does before step 0, 1, ...: set the decay, if it changes."""
        if self._new_share is not None:
            self._new_share.fill_(1.0 - decay_at(self._config, step))

    @torch.no_grad()
    def update(self) -> None:
        if self._new_share is None:
            self._update(self._average, self._network, 0)
            return
        differences = torch._foreach_sub(self._network, self._average)
        torch._foreach_mul_(differences, self._new_share)
        torch._foreach_add_(self._average, differences)
