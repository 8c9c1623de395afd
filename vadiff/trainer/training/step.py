"""One training step, in two parts: what the host decides before it, and what the device does."""

import contextlib
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ...ema import PowerFunctionEMA
from ...levels import LevelSampler
from ...log_snr import from_sigma
from ...loss import DiffusionLoss
from ...models import Denoiser, normalize_weights
from ..config import TrainConfig
from . import captured
from .batches import Batch, Batches, memory_format_of
from .distributed import Ranks
from .objective import Objective
from .optimisation import Optimisation, RunningAverage
from .posterior_targets import moved
from .streams import REFERENCES

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TrainingStep:
    """Call it with the number of the step: 0, 1, ...

    Attributes:
        network: the denoiser's network as it is trained: compiled, or in a distributed wrapper.
    """

    config: TrainConfig
    objective: Objective
    denoiser: Denoiser
    criterion: DiffusionLoss
    levels: LevelSampler
    batches: Batches
    optimisation: Optimisation
    running_average: RunningAverage
    power_averages: PowerFunctionEMA | None
    group: Ranks

    def __post_init__(self) -> None:
        self.device = self.batches.device
        self._in_graph = self._graph_if_possible()
        self.network = self._trained_network()
        self._step = 0
        self._sigma: Tensor | None = None  # noise levels of the last part of the batch

    def __call__(self, step: int) -> None:
        self._step = step
        self.batches.prepare(step)
        self.optimisation.prepare(step)
        self.running_average.prepare(step)
        self._seed_dropout(0)
        if self._in_graph is None:
            self.work()
        else:
            self._in_graph(self.work)
        if self.power_averages is not None:
            self.power_averages.update(step + 1)
        if (step + 1) % self.config.levels_every == 0 and self._sigma is not None:
            self.levels.update(self.criterion, from_sigma(self._sigma))  # no-op if not adaptive

    def work(self) -> None:
        """The device's part, which a CUDA graph can hold: the host reads no number, and no decision depends on one."""
        parts = self.batches.draw()
        losses = []
        for number, batch in enumerate(parts):
            if number > 0:
                self._seed_dropout(number)  # a graph has one part only, as it cannot seed
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last else self._no_sync():
                loss = self._loss(batch)
                self.optimisation.backward(loss)
            losses.append(loss.detach())
        self.group.average_gradients(self.criterion.parameters())  # DDP averages the network's
        self.optimisation.step(losses[0] if len(losses) == 1 else torch.stack(losses).mean())
        if self.config.model == "edm2":
            normalize_weights(self.denoiser)
        self.running_average.update()
        self._sigma = parts[-1].sigma

    def close(self) -> None:
        """Let go of the graph and of its memory, in which lies what the last step left, and of the processes that read.

        No step follows.
        """
        self.batches.source.close()
        if self._in_graph is not None:
            self._in_graph = self._sigma = None
            self.criterion.copy_last_call()

    def _loss(self, batch: Batch) -> Tensor:
        dtype = AUTOCAST[self.config.precision]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            output = self.denoiser.training_output(
                batch.x0, batch.eps, batch.sigma, batch.labels, augmentation=batch.augmentation, network=self.network
            )
        self.batches.memory_format = memory_format_of(output)
        # Copies at the first step only: later batches are made in this format.
        targets = moved(self.criterion, batch, self.batches.streams.generators[REFERENCES])
        x0, eps = (value.contiguous(memory_format=self.batches.memory_format) for value in targets)
        return self.objective(self.criterion, output, x0, eps, batch.sigma, self.config.sigma_data, batch.sample_weight)

    def _seed_dropout(self, part: int) -> None:
        if self.config.dropout:
            self.batches.streams.seed_dropout(self._step, part * self.group.size + self.group.rank)

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Context without DDP's gradient averaging, for all parts of a batch but the last."""
        if isinstance(self.network, nn.parallel.DistributedDataParallel):
            return self.network.no_sync()
        return contextlib.nullcontext()

    def _trained_network(self) -> nn.Module:
        network, compiled = self.denoiser.network, self.config.compile
        if compiled is None:
            compiled = self.config.graph and self.device.type == "cuda"
        if compiled:
            mode = compile_mode(self.config, self.device, captured=self._in_graph is not None)
            network = cast(nn.Module, torch.compile(network, dynamic=False, mode=mode))
        if self.group.size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            network = nn.parallel.DistributedDataParallel(network, device_ids=devices)
        return network

    def _graph_if_possible(self) -> captured.CapturedStep | None:
        """What captures the device's part, if the config asks for it and the run allows it."""
        if not self.config.graph:
            return None
        why_not = captured.why_not_captured(self.config, self.device, self.group.size)
        if why_not is None:
            return captured.CapturedStep(self.device, list(self.batches.streams.generators.values()))
        if self.device.type == "cuda" and self.group.is_main:
            captured.tell_why_not(why_not)
        return None


def compile_mode(config: TrainConfig, device: torch.device, *, captured: bool) -> str | None:
    """torch.compile's mode for the network; None is the default one.

    "reduce-overhead" launches forward and backward pass as CUDA graphs of its own. It cannot be in a graph of the whole
    step, nor add up the gradients of several parts of a batch: each part overwrites those of the one before.
    """
    if device.type != "cuda" or captured or config.accumulate > 1:
        return None
    return "reduce-overhead"
