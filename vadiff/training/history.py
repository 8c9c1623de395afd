"""What a run did, step by step: in memory for pictures, in metrics.jsonl for everything else."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..loss import DiffusionLoss
from .held_out import HeldOutLoss


@dataclass
class History:
    """The criterion over the run: R entries, one every `log_every` steps and one at the end; on the CPU."""

    steps: list[int] = field(default_factory=list)  # [R]
    loss: list[float] = field(default_factory=list)  # [R] weighted training loss, mean since the last entry
    count: list[Tensor] = field(default_factory=list)  # R × [K] float64
    mean: list[Tensor] = field(default_factory=list)  # R × [K] float64, of the base loss
    variance: list[Tensor] = field(default_factory=list)  # R × [K] float64, of the base loss
    weights: list[Tensor] = field(default_factory=list)  # R × [K] float32

    def add(self, step: int, loss: float, criterion: DiffusionLoss) -> None:
        """Read the criterion. Copies to the CPU, hence waits for the device."""
        statistics = criterion.statistics
        self.steps.append(step)
        self.loss.append(loss)
        self.count.append(statistics.count.cpu())
        self.mean.append(statistics.mean.cpu())
        self.variance.append(statistics.variance.cpu())
        self.weights.append(criterion.weights.cpu())

    def as_dict(self) -> dict[str, Tensor]:
        """For the checkpoint: steps [R], loss [R], and [R, K] each."""
        return {
            "steps": torch.tensor(self.steps),
            "loss": torch.tensor(self.loss),
            **{name: torch.stack(getattr(self, name)) for name in ("count", "mean", "variance", "weights")},
        }


def append_metrics(
    path: Path | None,
    step: int,
    images: int,
    loss: float,
    criterion: DiffusionLoss,
    held_out: HeldOutLoss | None = None,
) -> None:
    """Add one line of JSON: step, images seen, losses, samples skipped; the last line has `held_out`.

    `loss` is the weighted one; `base_loss` is the trainer's own objective, from the running statistics as
    Σ mass·mean / Σ mass.
    """
    if path is None:
        return
    mass, mean = criterion.statistics.mass, criterion.statistics.mean.nan_to_num()
    entry: dict[str, object] = {
        "step": step,
        "images": images,
        "loss": loss,
        "base_loss": ((mass * mean).sum() / mass.sum()).item(),
        "skipped": int(criterion.statistics.skipped),
    }
    if held_out is not None:
        entry["held_out"] = {"log_snr": held_out.log_snr.tolist(), "loss": held_out.mean.tolist()}
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
